"""`RayWorker.start` after its process died, and without devices."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fakes import PATIENCE_S, fake_engine, no_cpu_is_free, seen_by_watchdog, write_config

from rlx.cluster import ray_worker
from rlx.cluster.ray_runtime import RayRuntime
from rlx.cluster.ray_worker import RayWorker, WeightParcel
from rlx.cluster.rollout_actor import Place
from rlx.errors import ServiceUnavailable
from rlx.processes import start_of
from rlx.rollout.fake_engine import FakeEngine
from rlx.rollout.worker import NoDevices
from rlx.wire import Sampling

pytestmark = pytest.mark.slow

PROMPT = np.array([1, 2], np.int32)


def make_worker(runtime: RayRuntime, folder: Path, index: int, **options: float) -> RayWorker:
    build = partial(fake_engine, write_config(folder), index)
    return RayWorker(index, build, runtime=runtime, log_dir=folder / "logs", parcel=WeightParcel(), **options)


async def test_a_killed_worker_starts_again_after_all_that_it_left_and_goes_on_in_its_log(runtime, tmp_path):
    worker = make_worker(runtime, tmp_path, 0)
    await worker.start()
    try:
        node, pid = worker.node_id, (await worker.status()).pid
        child = (await worker.openai("child", {}))["pid"]
        await asyncio.to_thread(seen_by_watchdog, pid)
        assert start_of(child) is not None
        worker.log.write_text("the first life\n")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ServiceUnavailable, match=r"rlx-rollout-0 died: .*killed.*rlx-rollout-0\.log"):
            await worker.generate("a", PROMPT, 1, Sampling(max_tokens=10**6))
        await worker.start()
        assert start_of(child) is None
        assert (await worker.status()).pid != pid
        assert worker.node_id == node
        assert worker.log.read_text().startswith("the first life\n")
        assert len(await worker.generate("a", PROMPT, 2, Sampling(max_tokens=4))) == 2
    finally:
        await worker.close()


async def test_what_a_process_left_is_waited_for_also_after_a_start_that_found_no_devices(monkeypatch, tmp_path):
    worker = RayWorker(
        0, FakeEngine, runtime=RayRuntime(write_config(tmp_path)), log_dir=tmp_path, parcel=WeightParcel()
    )
    places = [Place("node", "here", number, (number, 0)) for number in (1, 2)]
    made, waited_for = iter([places[0], None, places[1]]), []

    async def make_actor():
        worker._place = next(made)
        if worker._place is None:
            raise NoDevices("none")

    async def start(method, before, node):
        waited_for.append(before)

    monkeypatch.setattr(worker, "_make_actor", make_actor)
    monkeypatch.setattr(worker, "_call", start)
    monkeypatch.setattr(ray_worker, "_this_node", lambda: "node")
    await worker.start()
    with pytest.raises(NoDevices):
        await worker.start()
    await worker.start()
    assert waited_for == [None, places[0]]


async def test_without_devices_a_new_worker_says_what_is_missing_and_leaves_no_request(runtime, tmp_path):
    await runtime.reserve(PATIENCE_S)
    await no_cpu_is_free()
    worker = make_worker(runtime, tmp_path, 8, reserve_timeout_s=1.5)
    with pytest.raises(NoDevices) as caught:
        await worker.start()
    assert str(caught.value) == (
        "rollout worker rlx-rollout-8 has no 1 CPU on one node of the Ray cluster, where 0 of 2 are free, within 1.5 s"
    )
    assert not await runtime.reservation(8).held()
    await worker.close()
