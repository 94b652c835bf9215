from __future__ import annotations

import asyncio
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from fakes import PATIENCE_S, broken_engine, fake_engine, no_cpu_is_free, write_config

from rlx.cluster.ray_runtime import RayRuntime
from rlx.cluster.ray_worker import RayWorker, WeightParcel
from rlx.errors import ModelError, ServiceError, ServiceUnavailable
from rlx.rollout.manifest import WeightManifest, fingerprint
from rlx.wire import Sampling

pytestmark = pytest.mark.slow

PROMPT = np.array([1, 2], np.int32)


def make_workers(runtime: RayRuntime, folder: Path, engine=fake_engine) -> list[RayWorker]:
    config, parcel = write_config(folder), WeightParcel()
    return [
        RayWorker(i, partial(engine, config, i), runtime=runtime, log_dir=folder / "logs", parcel=parcel)
        for i in (0, 1)
    ]


@pytest_asyncio.fixture
async def workers(runtime: RayRuntime, tmp_path: Path):
    workers = make_workers(runtime, tmp_path)
    await asyncio.gather(*(worker.start() for worker in workers))
    yield workers
    await asyncio.gather(*(worker.close() for worker in workers))


async def test_a_worker_generates_and_says_who_it_is(workers):
    worker = workers[0]
    first, second = await worker.generate("a", PROMPT, 2, Sampling(max_tokens=5))
    status = await worker.status()
    assert (first.ids.dtype, first.logprobs.dtype, first.versions) == (np.int32, np.float32, ((0, first.ids.size),))
    assert second.ids.size <= 5
    assert (status.name, status.state, status.in_flight) == ("rlx-rollout-0", "ready", 0)
    assert status.pid != (await workers[1].status()).pid
    assert (await worker.prompt_logprobs(np.arange(4, dtype=np.int32))).shape == (3,)


async def test_cancelling_the_caller_cancels_the_request_in_the_engine(workers):
    worker = workers[0]
    task = asyncio.create_task(worker.generate("long", PROMPT, 1, Sampling(max_tokens=10**6)))
    await in_flight(worker, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await in_flight(worker, 0)
    assert (await worker.status()).in_flight == 0


async def test_errors_of_the_engine_arrive_as_themselves_and_bugs_as_service_errors(workers):
    with pytest.raises(ServiceError, match=r"^refused: too long$"):
        await workers[0].generate("refuse", PROMPT, 1, Sampling(max_tokens=1))
    with pytest.raises(ServiceError, match=r"(?s)rlx-rollout-0 failed.*KeyError"):
        await workers[0].generate("bug", PROMPT, 1, Sampling(max_tokens=1))


async def test_openai_answers_stream_and_a_dropped_stream_ends_in_the_engine(workers):
    worker = workers[0]
    assert (await worker.openai("completions", {"max_tokens": 3}))["choices"][0]["index"] == 0
    lines = [line async for line in await worker.openai("completions", {"max_tokens": 3, "stream": True})]
    assert lines[-1] == "data: [DONE]\n\n"
    refusal = await worker.openai("unknown", {"stream": True})
    assert refusal["error"]["code"] == 404
    endless = await worker.openai("endless", {"stream": True})
    assert await anext(endless) == "data: more\n\n"
    await endless.aclose()


async def test_a_dead_worker_is_named_with_its_log_and_can_be_started_again(workers, tmp_path):
    worker = workers[1]
    pid = (await worker.status()).pid
    waiting = asyncio.create_task(worker.generate("a", PROMPT, 1, Sampling(max_tokens=10**6)))
    await in_flight(worker, 1)
    with pytest.raises(ServiceUnavailable, match=r"rlx-rollout-1 died: .*rlx-rollout-1\.log"):
        await worker.openai("die", {})
    with pytest.raises(ServiceUnavailable, match="rlx-rollout-1 died"):
        await waiting
    with pytest.raises(ServiceUnavailable, match="rlx-rollout-1 died"):
        await worker.status()
    assert (tmp_path / "logs" / "rlx-rollout-1.log").exists()
    await worker.start()
    assert (await worker.status()).pid != pid


async def test_a_model_that_does_not_load_is_the_engines_own_error(runtime, tmp_path):
    workers = make_workers(runtime, tmp_path, broken_engine)
    with pytest.raises(ModelError, match=r"^no model here; its log.*: .*/rlx-rollout-0\.log$"):
        await workers[0].start()
    await workers[0].close()


async def test_weights_reach_workers_on_the_gateways_node_and_on_another(workers, tmp_path):
    from safetensors.numpy import save

    data = save({})
    path = tmp_path / "weights.safetensors"
    path.write_bytes(data)
    manifest = WeightManifest(3, len(data), fingerprint(data), ())
    assert len({worker.node_id for worker in workers}) == 2
    for worker in workers:
        await worker.announce(manifest)
    assert [(await worker.commit(manifest, str(path))).fingerprint for worker in workers] == [manifest.fingerprint] * 2
    assert [(await worker.status()).weight_version for worker in workers] == [3, 3]
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("rlx-rollout-")]


async def test_reserving_more_than_is_free_ends_with_what_is_missing(runtime, tmp_path):
    second = RayRuntime(write_config(tmp_path))
    second.layout = runtime.layout
    await runtime.reserve(PATIENCE_S)
    await no_cpu_is_free()
    with pytest.raises(ServiceUnavailable, match=r"2 vLLM engines, 1 CPU each .* 0 of its 2 CPUs are free"):
        await second.reserve(1.0)


async def in_flight(worker: RayWorker, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await worker.openai("in_flight", {}))["in_flight"] != count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
