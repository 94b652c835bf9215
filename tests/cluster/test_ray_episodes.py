"""Rollout functions in processes of a real Ray cluster, around rollout actors with the fake engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fakes import fake_engine
from tiny_models import make_tiny_model

from rlx.cluster import ray_episodes
from rlx.cluster.ray_episodes import RayEpisodes
from rlx.cluster.ray_runtime import RayRuntime
from rlx.cluster.ray_worker import RayWorker, WeightParcel
from rlx.config import Config, load_config
from rlx.errors import ServiceUnavailable, UserCodeError
from rlx.processes import LOG_BYTES, alive, start_of
from rlx.wire import GroupRequest, Sampling

pytestmark = pytest.mark.slow

FUNCTIONS = """
import asyncio, os, re, time
from rlx.processes import LOG_BYTES

async def two_turns(ctx):
    first = await ctx.turn(max_tokens=4)
    ctx.observe({"role": "user", "content": "again"})
    await ctx.turn(max_tokens=4)
    ctx.metric("pid", os.getpid())
    return float(len(first.ids))

async def misbehaves(ctx):
    await ctx.turn(max_tokens=2)
    what = ctx.task["what"]
    if what == "blocks":
        time.sleep(1000)
    if what == "exits":
        os._exit(7)
    if what == "exits once" and not os.path.exists(ctx.task["marker"]):
        open(ctx.task["marker"], "w").close()
        os._exit(7)
    if what == "raises":
        raise ValueError("a mistake of the user")
    if what == "waits":
        await asyncio.sleep(2.5)
    if what == "waits for another process" and not os.path.exists(ctx.task["marker"]):
        open(ctx.task["marker"], "w").close()
        await asyncio.sleep(1000)
    if what == "prints":
        print("x" * (LOG_BYTES + 1), flush=True)
    if what == "interrupts":
        raise KeyboardInterrupt
    if what == "exits in a task":
        await asyncio.create_task(leaves())
    if what == "blocks in C":
        re.match("(a+)+$", "a" * 40 + "b")
    return 1.0

async def leaves():
    raise SystemExit(3)

async def never_ends(ctx):
    await asyncio.to_thread(time.sleep, 1000)
"""


def make_config(folder: Path, function: str, **episodes: Any) -> Config:
    make_tiny_model(folder / "model")
    (folder / "functions.py").write_text(FUNCTIONS)
    settings = {
        "base_model": "model",
        "rl": "grpo",
        "output_dir": str(folder / "out"),
        "datasets": [{"path": "none"}],
        "trl": {"rollout_func": f"functions.{function}", "max_prompt_length": 32, "max_completion_length": 64},
        "episodes": {"timeout": 120, "stall_timeout": 60, **episodes},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return load_config(folder / "config.yaml")


def request(key: str = "g", n: int = 2, **columns: Any) -> GroupRequest:
    ids = np.array([65, 66, 67], np.int32)
    return GroupRequest(key, [{"role": "user", "content": "ABC"}], ids, n, Sampling(64), columns)


@asynccontextmanager
async def running(config: Config, runtime: RayRuntime) -> AsyncIterator[tuple[RayEpisodes, RayWorker]]:
    """Episodes and a rollout worker; afterwards nothing of them is left."""
    worker = RayWorker(
        0, partial(fake_engine, config, 0), runtime=runtime, log_dir=Path(config.output_dir), parcel=WeightParcel()
    )
    episodes = RayEpisodes(config)
    await worker.start()
    try:
        await episodes.start()
        yield episodes, worker
    finally:
        await episodes.close()
        await worker.close()


async def gone(pid: int, start: int | None) -> None:
    assert start is not None
    async with asyncio.timeout(120):
        while alive(pid, start):  # noqa: ASYNC110 - a process that ends sets no event here
            await asyncio.sleep(0.05)


async def test_episodes_run_beside_each_other_in_a_process_of_their_own(tmp_path: Path, runtime: RayRuntime) -> None:
    async with running(make_config(tmp_path, "two_turns"), runtime) as (episodes, worker):
        results = await asyncio.gather(*(episodes.run(worker, request(f"g{i}", 4)) for i in range(3)))
        pids = {int(e.metrics["pid"]) for group in results for e in group}
        assert len(pids) == 1
        assert os.getpid() not in pids
        for group in results:
            assert [e.status for e in group] == ["ok"] * 4
            for e in group:
                [row] = e.rows
                assert (e.turns, len(e.turn_times), e.process) == (2, 2, "rlx-episodes-0")
                assert e.reward == float(row.versions[0][1])
                assert [v for v, _ in row.versions] == [0, -1, 0]
                assert np.isfinite(row.logprobs[row.mask]).all()
                assert [m["role"] for m in e.completion] == ["assistant", "user", "assistant"], "its own, no other's"
        assert len({e.text for group in results for e in group}) > 3, "every episode is sampled for itself"
        [pid] = pids
        start = start_of(pid)
    await gone(pid, start)


async def test_a_function_that_blocks_is_named_with_its_line_and_the_process_replaced(
    tmp_path: Path, runtime: RayRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path, "misbehaves", failure_budget=1.0, stall_timeout=3)
    async with running(config, runtime) as (episodes, worker):
        marker = tmp_path / "marker"
        beside = request("run/0/1", what="waits for another process", marker=str(marker))
        innocent = asyncio.create_task(episodes.run(worker, beside))
        async with asyncio.timeout(60):
            while not marker.exists():  # noqa: ASYNC110 - another process makes it
                await asyncio.sleep(0.05)
        blocked = await episodes.run(worker, request("run/0/10", what="blocks"))
        assert [e.status for e in blocked] == ["aborted"] * 2
        assert "functions.py:16, in misbehaves" in blocked[0].error
        assert [e.status for e in await innocent] == ["ok"] * 2, "groups beside it begin anew on a fresh process"
    assert "group run/0/1, attempt 1: a rollout function blocked its process" in caplog.text


async def test_a_call_in_c_that_keeps_the_lock_of_python_ends_its_process_and_is_named_in_the_log(
    tmp_path: Path, runtime: RayRuntime
) -> None:
    config = make_config(tmp_path, "misbehaves", failure_budget=1.0, retries=0, stall_timeout=3)
    async with running(config, runtime) as (episodes, worker):
        async with asyncio.timeout(100):  # before episodes.timeout
            blocked = await episodes.run(worker, request("g", what="blocks in C"))
        assert [e.status for e in blocked] == ["aborted"] * 2
        log = tmp_path / "out" / "logs" / "rlx-episodes-0.log"
        assert str(log) in blocked[0].error
        assert 'functions.py", line 36 in misbehaves' in log.read_text()
        assert [e.status for e in await episodes.run(worker, request("h", what="nothing"))] == ["ok"] * 2


async def test_what_ends_a_program_ends_one_episode(tmp_path: Path, runtime: RayRuntime) -> None:
    async with running(make_config(tmp_path, "misbehaves", failure_budget=1.0), runtime) as (episodes, worker):
        [pid] = episodes.pids
        for what, error in (("interrupts", "KeyboardInterrupt"), ("exits in a task", "SystemExit")):
            beside = asyncio.create_task(episodes.run(worker, request(f"beside {what}", what="waits")))
            ended = await episodes.run(worker, request(what, what=what))
            assert [e.status for e in ended] == ["aborted"] * 2
            assert error in ended[0].error
            assert [e.status for e in await beside] == ["ok"] * 2
        assert episodes.pids == [pid]
        await episodes.run(worker, request("prints", what="prints"))
        log = tmp_path / "out" / "logs" / "rlx-episodes-0.log"
        async with asyncio.timeout(60):
            while "earlier output was removed" not in log.read_text()[:100]:  # noqa: ASYNC110 - another process makes it shorter
                await asyncio.sleep(0.05)
        assert log.stat().st_size <= LOG_BYTES


async def test_a_function_that_ends_its_process_is_tried_again_and_then_aborted(
    tmp_path: Path, runtime: RayRuntime
) -> None:
    async with running(make_config(tmp_path, "misbehaves", failure_budget=1.0), runtime) as (episodes, worker):
        marker = str(tmp_path / "marker")
        once = await episodes.run(worker, request("once", what="exits once", marker=marker))
        assert [e.status for e in once] == ["ok"] * 2
        always = await episodes.run(worker, request("always", what="exits"))
        assert [(e.status, e.attempts, e.rows) for e in always] == [("aborted", 3, ())] * 2
        assert "rlx-episodes-0" in always[0].error
        assert "died" in always[0].error


async def test_a_thread_that_never_ends_times_out_and_its_process_goes(tmp_path: Path, runtime: RayRuntime) -> None:
    config = make_config(tmp_path, "never_ends", timeout=1.5, failure_budget=1.0)
    async with running(config, runtime) as (episodes, worker):
        pid = episodes.pids[0]
        start = start_of(pid)
        stuck = await episodes.run(worker, request())
        assert [e.status for e in stuck] == ["timeout"] * 2
        await gone(pid, start)


async def test_too_many_failures_end_the_run_with_the_first_traceback(tmp_path: Path, runtime: RayRuntime) -> None:
    async with running(make_config(tmp_path, "misbehaves"), runtime) as (episodes, worker):
        first = await episodes.run(worker, request("a", 8, what="raises"))
        assert [e.status for e in first] == ["aborted"] * 8
        with pytest.raises(
            UserCodeError, match=r"(?s)trl\.rollout_func \(functions\.misbehaves\).*16 aborted.*a mistake of the user"
        ):
            await episodes.run(worker, request("b", 8, what="raises"))


async def test_a_worker_that_dies_is_the_services_failure_not_the_episodes(tmp_path: Path, runtime: RayRuntime) -> None:
    async with running(make_config(tmp_path, "two_turns"), runtime) as (episodes, worker):
        with pytest.raises(ServiceUnavailable, match="rlx-rollout-0"):
            await worker.openai("die", {})
        with pytest.raises(ServiceUnavailable, match="worker rlx-rollout-0"):
            await episodes.run(worker, request())


async def test_a_start_of_a_process_goes_on_for_the_others_when_one_group_that_waits_for_it_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, begun, goes_on = ray_episodes._Process(0, make_config(tmp_path, "two_turns")), [], asyncio.Event()

    async def begin() -> object:
        begun.append(len(begun))
        await goes_on.wait()
        if len(begun) == 1:
            raise UserCodeError("it does not load")
        return process

    monkeypatch.setattr(process, "_begin", begin)
    for outcome in ("it does not load", process):
        goes_on.clear()
        waiting = [asyncio.create_task(process._running()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.wait(waiting[:1])
        goes_on.set()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(ended[0], asyncio.CancelledError)
        assert [outcome if isinstance(end, UserCodeError) else end for end in ended[1:]] == [outcome] * 2
    assert begun == [0, 1], "each start was that of all three"


async def test_a_function_that_does_not_exist_is_named_at_the_start(tmp_path: Path, runtime: RayRuntime) -> None:
    with pytest.raises(UserCodeError, match=r"trl\.rollout_func.*two_turn"):
        async with running(make_config(tmp_path, "two_turn"), runtime):
            pass
