"""The processes of rollout functions as `cluster/ray_episodes.py` replaces and ends them, with actors that are made up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import write_config

from rlx.cluster import ray_episodes
from rlx.cluster.episode_actor import Loaded
from rlx.cluster.ray_episodes import RayEpisodes
from rlx.cluster.ray_worker import RayWorker, WeightParcel
from rlx.errors import DeadlineExceeded, ServiceUnavailable, UserCodeError
from rlx.wire import GroupRequest, Sampling

Method = Callable[..., Awaitable[Any]]


async def forever(*_: Any) -> None:
    await asyncio.Event().wait()


async def nothing(*_: Any) -> list[str]:
    return []


class Actors:
    """All actors that were made, by label. Method `name` of the actor `label` is `methods[label, name]`, or of every
    actor `methods[name]`."""

    def __init__(self) -> None:
        self.made: dict[str, Actor] = {}
        self.methods: dict[Any, Method] = {"load": self._load, "close": nothing, "stuck": nothing, "run": nothing}

    async def _load(self, *_: Any) -> Loaded:
        return Loaded(1, own_reward=True)

    def __call__(self, label: str) -> Actor:
        self.made[label] = Actor(label, self)
        return self.made[label]


class Actor:
    """As KillableActor."""

    def __init__(self, label: str, actors: Actors):
        self.label, self.pid, self.handle, self.killed = label, 0, None, 0
        self._actors = actors

    async def create(self, *_: Any, **__: Any) -> Any:
        def method(name: str) -> Any:
            def remote(*arguments: Any) -> Awaitable[Any]:
                methods = self._actors.methods
                return methods.get((self.label, name), methods[name])(*arguments)

            return SimpleNamespace(remote=remote)

        self.handle = SimpleNamespace(**{name: method(name) for name in ("load", "close", "stuck", "run")})
        return self.handle

    def runs_as(self, pid: int) -> None:
        self.pid = pid

    def kill(self, grace_s: float = 0.0) -> None:
        self.handle, self.killed = None, self.killed + 1


async def call(answer: Awaitable[Any], who: str, timeout_s: float | None = None, hint: str = "") -> Any:
    return await answer


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> Actors:
    actors = Actors()
    monkeypatch.setattr(ray_episodes, "KillableActor", actors)
    monkeypatch.setattr(ray_episodes, "call", call)
    return actors


def episodes_of(folder: Path, processes: int = 1) -> RayEpisodes:
    return RayEpisodes(write_config(folder, f"episodes: {{processes: {processes}}}"))


def fails(error: Exception) -> Method:
    async def method(*_: Any) -> None:
        raise error

    return method


REQUEST = GroupRequest("g", "x", np.array([1], np.int32), 1, Sampling(8))


def worker_in(folder: Path, actor: Any) -> RayWorker:
    runtime: Any = None
    worker = RayWorker(0, runtime, runtime=runtime, log_dir=folder, parcel=WeightParcel())
    worker._actor = actor
    return worker


def tasks() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]


async def test_when_one_process_cannot_start_those_that_still_do_end_with_the_closing(
    tmp_path: Path, actors: Actors
) -> None:
    loading = asyncio.Event()

    async def loads(*_: Any) -> None:
        loading.set()
        await forever()

    async def refuses(*_: Any) -> None:
        await loading.wait()
        raise UserCodeError("there is no such function")

    episodes = episodes_of(tmp_path, 2)
    actors.methods |= {("rlx-episodes-0", "load"): loads, ("rlx-episodes-1", "load"): refuses}
    async with asyncio.timeout(60):
        with pytest.raises(UserCodeError, match="no such function"):
            await episodes.start()
        await episodes.close()
    assert [actor.killed for actor in actors.made.values()] == [1, 1]
    assert not tasks()


async def test_a_process_that_does_not_answer_while_it_is_closed_is_killed_and_so_are_the_servers(
    tmp_path: Path, actors: Actors
) -> None:
    episodes = episodes_of(tmp_path, 3)
    await episodes.start()
    actors.methods["rlx-episodes-1", "close"] = fails(DeadlineExceeded("it did not answer"))
    actors.methods["rlx-episodes-2", "close"] = fails(ServiceUnavailable("it died"))
    closed = []

    async def close() -> None:
        closed.append("servers")

    episodes._servers = SimpleNamespace(close=close)  # type: ignore[assignment]
    await episodes.close()
    assert [actor.killed for actor in actors.made.values()] == [1, 1, 1]
    assert closed == ["servers"]


async def test_servers_are_closed_also_when_the_closing_of_processes_is_cancelled(
    tmp_path: Path, actors: Actors
) -> None:
    episodes = episodes_of(tmp_path)
    await episodes.start()
    asked, closed = asyncio.Event(), []

    async def hangs() -> None:
        asked.set()
        await forever()

    async def close() -> None:
        closed.append("servers")

    actors.methods["close"] = hangs
    episodes._servers = SimpleNamespace(close=close)  # type: ignore[assignment]
    closing = asyncio.create_task(episodes.close())
    async with asyncio.timeout(60):
        await asked.wait()
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
    assert actors.made["rlx-episodes-0"].killed == 1
    assert closed == ["servers"]


@pytest.mark.parametrize("how", ["ended", "silent"])
async def test_a_process_is_looked_at_only_while_it_is_the_one_that_runs_groups(
    tmp_path: Path, actors: Actors, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(ray_episodes, "STUCK_AFTER_S", 0.0)
    episodes = episodes_of(tmp_path)
    await episodes.start()
    [process] = episodes._processes
    life = process._now
    assert life is not None
    look = asyncio.create_task(process._retire_if_stuck(life))
    if how == "ended":
        process._end(life)
    actors.methods["stuck"] = fails(DeadlineExceeded("it did not answer"))
    await look
    assert life.actor.killed == (how == "ended")


async def test_groups_do_not_all_wait_for_the_one_process_that_starts(tmp_path: Path, actors: Actors) -> None:
    episodes = episodes_of(tmp_path, 2)
    await episodes.start()
    first, second = episodes._processes
    assert first._now is not None
    first._end(first._now)
    actors.methods["rlx-episodes-0.1", "load"] = forever
    actors.methods["run"] = forever
    groups = [asyncio.create_task(episodes.run(worker_in(tmp_path, object()), REQUEST)) for _ in range(4)]
    await asyncio.sleep(0)
    assert (first.in_flight, second.in_flight) == (2, 2)
    for group in groups:
        group.cancel()
    await asyncio.wait(groups)
    assert (first.in_flight, second.in_flight) == (0, 0)
    await episodes.close()


async def test_a_worker_that_is_replaced_while_the_episodes_process_is_too_is_the_workers_failure(
    tmp_path: Path, actors: Actors
) -> None:
    """Between the worker's turn for the group and the first sample lies the start of a process."""
    with pytest.raises(ServiceUnavailable, match="rlx-rollout-0 is not running"):
        await episodes_of(tmp_path).run(worker_in(tmp_path, None), REQUEST)
    assert actors.made["rlx-episodes-0"].killed == 0
