"""The processes of one reward function.

    score ─► turn: the least busy process ─► RewardActor ─► answer ─► failure budget
                        ▲                         │ hangs or dies: no values, and the process is killed
                        └── a fresh process ◄─────┘ in the background

Nothing here knows of episodes or of the other functions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
import signal
import time
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlx.cluster.calls import call
from rlx.cluster.killable import KillableActor
from rlx.cluster.reward_actor import AsyncRewardActor, RewardActor
from rlx.config import Config
from rlx.config.sections import RewardLimits
from rlx.errors import DeadlineExceeded, RlxError, ServiceError, ServiceUnavailable, UserCodeError
from rlx.processes import shorten, start_of
from rlx.rewards.budget import FailureBudget
from rlx.rewards.scoring import Answer, ScoreRequest, no_values
from rlx.rewards.sources import kind_of
from rlx.wire import Outcome, RewardOutcome

LOAD_TIMEOUT_S = 120.0
GROUPS_SIDE_BY_SIDE = 64
"""In one process of an async function."""
_GRACE_S = 2.0
"""What an async call gets beyond its deadline to be cancelled, before its process is killed."""
_KILL_GRACE_S = 1.0
_STARTS = 2
"""Tries to replace a process; what it died of may have killed the next one as well."""
_log = logging.getLogger(__name__)


class RewardPool:
    """Entry `index` of `trl.reward_funcs`, in as many processes as the configuration says; `of` sets their names apart
    from those of other pools of the same function."""

    def __init__(self, name: str, index: int, config: Config, of: str = ""):
        limits = config.rewards.functions.get(name, RewardLimits())
        self.name = name
        self.budget = FailureBudget(
            config.rewards.reward_failure_budget, key="rewards.reward_failure_budget", items="completions"
        )
        self._who = f"trl.reward_funcs[{index}] ({name})"
        self._label = f"rlx-reward-{index}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}" + (f"-{of}" if of else "")
        self._log_dir = Path(config.output_dir).absolute() / "logs"
        self._entry = (name, index, str(config.base_dir))
        is_model = kind_of(name, config.base_dir) == "model"  # may come from the hub, and be of any size
        self._memory_gib = math.inf if is_model else config.rewards.memory_gib
        self._load_timeout_s = max(LOAD_TIMEOUT_S, config.vllm.start_timeout) if is_model else LOAD_TIMEOUT_S
        self._timeout_s = limits.timeout or config.rewards.timeout
        self._num_workers = limits.workers or config.rewards.workers
        self._is_async = False
        self._processes: list[_Process] = []
        self._num_starting = 0
        self._cause: RlxError = ServiceUnavailable(f"{self._who} has no process: it was not started")
        self._changed, self._line = asyncio.Event(), asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def pids(self) -> list[int]:
        return [process.actor.pid for process in self._processes]

    async def start(self) -> None:
        """Import the function in every process; UserCodeError when that fails, DeadlineExceeded when it hangs."""
        self._processes.append(await self._new_process(0))  # tells whether the function is async
        others = [self._spawn(self._add_process(number)) for number in range(1, self._num_workers)]
        await asyncio.gather(*others)

    async def score(self, group: ScoreRequest) -> Answer:
        """What fails is in the outcome; UserCodeError when it failed too often or will never get better.

        The deadline counts from the group's turn. A caller that goes away leaves the call to its end: the next group
        must not pay for it.
        """
        answer: Answer = await asyncio.shield(self._spawn(self._score(group)))
        self.budget.check(self._who)
        return answer

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(asyncio.to_thread(process.kill) for process in self._processes))
        self._processes.clear()

    # --- a group ----------------------------------------------------------------------------------------------------

    async def _score(self, group: ScoreRequest) -> Answer:
        process = await self._turn()
        began_at = time.time()
        process.in_flight += 1
        try:
            answer = await self._call(process, group)
        except (DeadlineExceeded, ServiceError) as error:
            answer = self._lost(process, error, len(group.completions)), {}
        finally:
            process.in_flight -= 1
            self._changed.set()
        outcome = replace(answer[0], process=process.actor.label, began_at=round(began_at, 4))
        self._record(outcome)
        return outcome, answer[1]

    async def _turn(self) -> _Process:
        """A process with room for a group. While there is none, callers wait, the oldest first: each call has a deadline,
        and so has the group (service.group_timeout)."""
        room = GROUPS_SIDE_BY_SIDE if self._is_async else 1
        async with self._line:
            while True:
                free = [process for process in self._processes if process.in_flight < room]
                if free:
                    return min(free, key=lambda process: process.in_flight)
                if not self._processes and not self._num_starting:
                    raise self._cause
                self._changed.clear()
                await self._changed.wait()

    async def _call(self, process: _Process, group: ScoreRequest) -> Answer:
        handle, timeout_s = process.actor.handle, self._timeout_s
        if self._is_async:
            return await call(handle.score_beside.remote(group, timeout_s), self._who, timeout_s + _GRACE_S)
        return await call(handle.score.remote(group), self._who, timeout_s)

    def _lost(self, process: _Process, error: RlxError, num_completions: int) -> RewardOutcome:
        """The outcome of a call that did not come back, after which its process is replaced."""
        outcome: Outcome = "crash"
        told = f"{error}. A reward function must return, and must not end its process. It printed to {process.log}."
        if process.blocked:
            outcome, told = "timeout", f"{self._who} was stopped with its process, which another call blocked."
        elif isinstance(error, DeadlineExceeded):
            process.blocked, outcome = True, "timeout"
            told = f"{self._who} did not answer within {self._timeout_s:g} s (rewards.timeout); its process was killed."
        if process in self._processes:
            self._processes.remove(process)
            self._num_starting += 1
            self._spawn(self._replace(process))
        return no_values(self.name, num_completions, outcome, told)

    def _record(self, outcome: RewardOutcome) -> None:
        if outcome.failed and not self.budget.counts:
            _log.warning("%s", outcome.error)
        num_ok = len(outcome.values) - outcome.failed
        self.budget.record(num_ok, outcome.failed, outcome.error, outcome.outcome)

    # --- processes --------------------------------------------------------------------------------------------------

    async def _replace(self, lost: _Process) -> None:
        try:
            await asyncio.to_thread(lost.kill)
            for _ in range(_STARTS):
                try:
                    return await self._add_process(lost.number)
                except RlxError as error:
                    self._cause = error
                    _log.warning("no new process for a lost one: %s", error)
        finally:
            self._num_starting -= 1
            self._changed.set()

    async def _add_process(self, number: int) -> None:
        self._processes.append(await self._new_process(number))
        self._changed.set()

    async def _new_process(self, number: int) -> _Process:
        process = _Process(number, f"{self._label}.{number}" if number else self._label, self._log_dir)
        try:
            is_async = await self._load(process)
        except BaseException:  # whatever ends the loading ends the process, too
            process.kill()
            raise
        if self._is_async or not is_async:
            return process
        self._is_async = True
        await asyncio.to_thread(process.kill)
        return await self._new_process(number)

    async def _load(self, process: _Process) -> bool:
        actor, kind = process.actor, AsyncRewardActor if self._is_async else RewardActor
        options = {"max_concurrency": GROUPS_SIDE_BY_SIDE + 1} if self._is_async else {}
        handle = await actor.create(kind, actor.label, str(process.log), self._memory_gib, **options)
        try:
            actor.runs_as(await call(handle.pid.remote(), self._who, self._load_timeout_s))
            return await call(handle.load.remote(*self._entry), self._who, self._load_timeout_s)
        except ServiceUnavailable as error:
            raise UserCodeError(f"{error}, while it was imported. It printed to {process.log}.") from None
        except DeadlineExceeded:
            raise DeadlineExceeded(f"{self._who} was not imported within {self._load_timeout_s:g} s") from None

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen, also when the caller went away


class _Process:
    """Number `number` of a function's processes, in one of its lives. `blocked`: killed for what a call did."""

    def __init__(self, number: int, label: str, log_dir: Path):
        self.number, self.in_flight, self.blocked = number, 0, False
        self.log = log_dir / f"{label}.log"
        self.actor = KillableActor(label)

    def kill(self) -> None:
        """End it with all that it started, also when it has died by itself. Idempotent; blocks for some 0.1 s."""
        self.actor.kill(_KILL_GRACE_S)
        if self.actor.pid and start_of(self.actor.pid) in (None, self.actor.start):  # else it is another's by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.actor.pid, signal.SIGKILL)
        shorten(self.log)
