"""Rollout functions in processes that can be killed: `rlx.rollout.group_runner.Episodes` over Ray actors.

A process runs many groups. When it dies, or a function blocks it, it is killed and replaced; the groups that it ran
begin anew on another one, at most `episodes.retries` times, and then count as aborted.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlx.cluster.calls import all_or_first_error, call
from rlx.cluster.episode_actor import EpisodeActor, Loaded, Stalled
from rlx.cluster.killable import KillableActor
from rlx.cluster.ray_worker import RayWorker
from rlx.config import Config
from rlx.envs.openenv_server import EnvServers
from rlx.envs.threads import GRACE_S
from rlx.episode import Episode
from rlx.errors import DeadlineExceeded, ServiceError, ServiceUnavailable, UserCodeError
from rlx.rewards.budget import FailureBudget
from rlx.rollout.worker import Worker
from rlx.wire import GroupRequest

LOAD_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S, LOOK_TIMEOUT_S = 10.0, 60.0
STUCK_AFTER_S = 2 * GRACE_S
LOOK_INTERVAL_S = 30.0
"""Between two looks for threads that episodes left behind, where none has timed out."""
_CONCURRENCY = 4096
_log = logging.getLogger(__name__)


class RayEpisodes:
    """`episodes.processes` actors on the gateway's node, and the environment servers that the YAML starts."""

    def __init__(self, config: Config):
        self.own_reward = True
        self._config = config
        self._servers: EnvServers | None = None
        self._processes = [_Process(index, config) for index in range(config.episodes.processes)]
        share = config.episodes.failure_budget
        self._budget = FailureBudget(share, key="episodes.failure_budget", items="episodes")

    @property
    def pids(self) -> list[int]:
        return [pid for process in self._processes for pid in process.pids]

    async def start(self) -> None:
        urls: Mapping[str, str] = {}
        if self._config.envs:
            self._servers = EnvServers(self._config)
            await self._servers.start()
            urls = self._servers.urls
        loaded = await all_or_first_error([process.start(urls) for process in self._processes])
        self.own_reward = loaded[0].own_reward

    async def run(self, worker: Worker, request: GroupRequest) -> list[Episode]:
        assert isinstance(worker, RayWorker), "the workers of this service are Ray actors"
        if self._servers is not None and (failures := self._servers.failures):
            raise ServiceError("; ".join(failures.values()))
        episodes = await self._run(worker, request)
        self._budget.record(sum(e.scorable for e in episodes), 0)
        for episode in episodes:
            if not episode.scorable:
                self._budget.record(0, 1, f"{episode.status}: {episode.error}", episode.status)
        self._budget.check(self._who())
        return episodes

    async def close(self) -> None:
        try:
            await asyncio.gather(*[process.close() for process in self._processes])
        finally:
            if self._servers is not None:
                await self._servers.close()

    async def _run(self, worker: RayWorker, request: GroupRequest) -> list[Episode]:
        cause = ""
        for attempt in range(self._config.episodes.retries + 1):
            process = min(self._processes, key=lambda p: p.in_flight)
            try:
                return await process.run(worker, request)
            except (Stalled, _Lost) as error:
                cause = str(error)
                if isinstance(error, Stalled) and error.group.startswith(f"{request.key}:"):
                    break  # this group's own function blocks: it would again
                _log.warning("group %s, attempt %d: %s", request.key, attempt + 1, cause)
        aborted = Episode(rows=(), text="", status="aborted", turns=0, attempts=attempt + 1, error=cause)
        return [aborted] * request.num_generations

    def _who(self) -> str:
        trl = self._config.trl
        key = "trl.rollout_func" if trl.rollout_func else "trl.environment_factory" if trl.environment_factory else ""
        return f"{key} ({trl.rollout_func or trl.environment_factory})" if key else "the episodes"


class _Lost(ServiceUnavailable):
    """The process is gone, with every group that it ran."""


class _Generation:
    """One life of a process. `in_flight` counts groups; `stalled` is why it was ended, where a function blocked it."""

    def __init__(self, actor: KillableActor, loaded: Loaded):
        self.actor, self.loaded, self.in_flight = actor, loaded, 0
        self.stalled: Stalled | None = None


class _Process:
    """An actor, replaced when it hangs, dies, or runs functions that do not end."""

    def __init__(self, index: int, config: Config):
        self._name = f"rlx-episodes-{index}"
        self._config = config
        self._urls: Mapping[str, str] = {}
        self._log = Path(config.output_dir).absolute() / "logs" / f"{self._name}.log"
        self._now: _Generation | None = None
        self._retired: set[_Generation] = set()
        self._starting: asyncio.Task[_Generation] | None = None
        self._waiting = 0
        self._lives = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._look_at = 0.0

    @property
    def pids(self) -> list[int]:
        """Of the process, and of retired ones that still run."""
        return [life.actor.pid for life in (self._now, *self._retired) if life is not None]

    @property
    def in_flight(self) -> int:
        """Groups that run in it, or wait for it to start."""
        return self._waiting + (self._now.in_flight if self._now else 0)

    async def start(self, urls: Mapping[str, str]) -> Loaded:
        self._urls = urls
        return (await self._running()).loaded

    async def run(self, worker: RayWorker, request: GroupRequest) -> list[Episode]:
        """Raises _Lost when the process died, Stalled when it was killed because a function blocked it."""
        self._waiting += 1
        try:
            life = await self._running()
        finally:
            self._waiting -= 1
        life.in_flight += 1
        try:
            ref = life.actor.handle.run.remote(worker.handle, worker.name, request)
            episodes: list[Episode] = await call(ref, self._name, hint=f". Its log: {self._log}")
        except Stalled as error:
            life.stalled = error  # the other groups hear of it as the death of the process
            self._end(life)
            raise
        except ServiceUnavailable as error:
            if not str(error).startswith(self._name):
                raise  # of a worker
            self._end(life)
            raise life.stalled or _Lost(str(error)) from None
        finally:
            life.in_flight -= 1
            if life in self._retired and not life.in_flight:
                self._end(life)
        if any(episode.status == "timeout" for episode in episodes) or time.monotonic() > self._look_at:
            self._look_at = time.monotonic() + LOOK_INTERVAL_S
            self._later(self._retire_if_stuck(life))
        return [replace(episode, process=self._name) for episode in episodes]

    async def close(self) -> None:
        tasks: list[asyncio.Task[Any]] = [*self._tasks, *([self._starting] if self._starting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        lives = [*self._retired, *([self._now] if self._now else [])]
        await asyncio.gather(*[self._close(life) for life in lives])

    async def _close(self, life: _Generation) -> None:
        try:
            with contextlib.suppress(ServiceError, DeadlineExceeded):  # it is killed next
                await call(life.actor.handle.close.remote(), self._name, CLOSE_TIMEOUT_S)
        finally:
            self._end(life)

    async def _retire_if_stuck(self, life: _Generation) -> None:
        """A thread that goes on although its episode is over cannot be ended alone: new groups go to a new process,
        and this one ends after those that it has."""
        await asyncio.sleep(STUCK_AFTER_S)
        if life is not self._now:
            return
        try:
            stuck = await call(life.actor.handle.stuck.remote(), self._name, LOOK_TIMEOUT_S)
        except (ServiceError, DeadlineExceeded) as error:
            _log.warning("%s: %s", self._name, error)
            return
        if stuck and life is self._now:
            _log.warning("%s is replaced, as these do not end: %s", self._name, ", ".join(stuck))
            self._now = None
            self._retired.add(life)
            if not life.in_flight:
                self._end(life)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _running(self) -> _Generation:
        """The process, started unless it runs. A start is that of all who wait for it: it goes on when one of them is
        cancelled."""
        while self._now is None:
            if self._starting is None:
                self._starting = asyncio.create_task(self._begin())
                self._starting.add_done_callback(self._started)
            await asyncio.shield(self._starting)
        return self._now

    def _started(self, start: asyncio.Task[_Generation]) -> None:
        self._starting = None
        if not start.cancelled() and start.exception() is None:
            self._now = start.result()

    async def _begin(self) -> _Generation:
        life = next(self._lives)  # a retired one may still be there, with its name
        actor = KillableActor(f"{self._name}.{life}" if life else self._name)
        handle = await actor.create(EpisodeActor, actor.label, str(self._log), max_concurrency=_CONCURRENCY)
        try:
            loading = handle.load.remote(self._config, self._urls)
            loaded: Loaded = await call(loading, self._name, LOAD_TIMEOUT_S, f". Its log: {self._log}")
        except BaseException as error:  # whatever ends the loading ends the process, too
            actor.kill()
            if isinstance(error, ServiceUnavailable):
                raise UserCodeError(f"{error}, while the rollout function was imported") from None
            raise
        actor.runs_as(loaded.pid)
        return _Generation(actor, loaded)

    def _end(self, life: _Generation) -> None:
        self._retired.discard(life)
        if self._now is life:
            self._now = None
        life.actor.kill()
