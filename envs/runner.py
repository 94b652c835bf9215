"""All episodes of a group, side by side in this process: deadlines, retries, and how each of them ended.

    function(ctx) ── returned ──► ok, truncated when its token budget was cut
                  ── raised ────► truncated, env_lost (begun again), aborted with the user's traceback
                  ── neither ───► timeout: cancelled, together with the request that runs

A failure of the service is nobody's status: it ends the whole group. Environments are closed on every path.
"""

from __future__ import annotations

import asyncio
import json
import math
import numbers
import reprlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np

from rlx.config.sections import EpisodesSection
from rlx.dotted import user_traceback
from rlx.envs.chat import Chat
from rlx.envs.errors import EnvLost, EpisodeTruncated
from rlx.envs.rollout import Rollout
from rlx.envs.session import Environments
from rlx.envs.state import Endpoint, EpisodeState, Sampler, new_deadline
from rlx.envs.threads import Work, leave_behind, working_for
from rlx.episode import SCORABLE, Episode, Status
from rlx.errors import ConfigError, DeadlineExceeded, ServiceError, UserCodeError
from rlx.wire import GroupRequest

Native = Callable[[Rollout], Awaitable[float | None]]
"""A rollout function: one episode; its reward, or None."""
_SHARE_OF_GROUP = 0.9
"""Of the group's deadline is for its episodes, so that they end as episodes, with a status, before the group fails."""
GRACE_S = 5.0
"""Seconds that a cancelled function may take to clean up; then it is left to itself."""
_OURS = [str(file) for file in Path(__file__).parent.glob("*.py")]


class EpisodeRunner:
    """Runs `function` for every episode of a group. `settings.timeout` seconds are those of one attempt."""

    def __init__(
        self,
        function: Native,
        chat: Chat,
        settings: EpisodesSection,
        *,
        max_model_len: int,
        environments: Environments | None = None,
        endpoint: Endpoint | None = None,
    ):
        self._function, self._chat, self._settings = function, chat, settings
        self._max_model_len, self._environments, self._endpoint = max_model_len, environments, endpoint

    async def run(self, sample: Sampler, request: GroupRequest) -> list[Episode]:
        """`request.num_generations` episodes. Raises ServiceError or DeadlineExceeded of `sample`, and ConfigError;
        the other episodes are cancelled then, as they are when this is cancelled."""
        end = time.monotonic() + _SHARE_OF_GROUP * request.deadline_s
        tasks = [
            asyncio.create_task(self._episode(sample, request, index, end), name=f"{request.key}:{index}")
            for index in range(request.num_generations)
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _episode(self, sample: Sampler, request: GroupRequest, index: int, end: float) -> Episode:
        """`end`, on time.monotonic(): no attempt goes beyond it."""
        for attempt in range(self._settings.retries + 1):
            state = EpisodeState(
                sample,
                request,
                index,
                attempt,
                deadline=min(new_deadline(self._settings.timeout), end),
                max_model_len=self._max_model_len,
                environments=self._environments,
                endpoint=self._endpoint,
            )
            episode = await self._attempt(state)
            if episode.status != "env_lost" or time.monotonic() >= end:
                break
        return episode

    async def _attempt(self, state: EpisodeState) -> Episode:
        work = Work(f"{state.request.key}, episode {state.index}")
        call = asyncio.create_task(self._call(state, work), name=f"{state.request.key}:{state.index}.{state.attempt}")
        notes: list[str] = []
        try:
            await asyncio.wait({call}, timeout=state.deadline - time.monotonic())
            in_time = call.done()
        finally:
            state.end()
            work.end()
            notes += await _to_the_end(_cleaned_up(call, work, state))
        return self._ended(state, call if in_time else None, notes)

    async def _call(self, state: EpisodeState, work: Work) -> Any:
        working_for.set(work)
        try:
            return await self._function(Rollout(state, self._chat))
        except (SystemExit, KeyboardInterrupt) as error:  # would end the loop of all episodes
            raise UserCodeError(f"trl.rollout_func: it raised {error!r}, which ends a program") from error

    def _completion(self, state: EpisodeState) -> Any:
        """What the rewards get: what the function set, else what followed the prompt of the first row."""
        line = next((line for line in state.lines if line.tape.num_sampled), None)
        if state.completion is not None or line is None:
            return state.completion
        if not line.plain:
            return line.messages[line.first_message :]
        text = "".join(piece if isinstance(piece, str) else self._chat.decode(piece) for piece in line.spoken)
        return text if isinstance(state.request.prompt, str) else [{"role": "assistant", "content": text}]

    def _ended(self, state: EpisodeState, call: asyncio.Task[Any] | None, notes: list[str]) -> Episode:
        """How it ended; `call` is None where time ran out."""
        if isinstance(state.failure, ServiceError | DeadlineExceeded | ConfigError):
            raise state.failure
        value, raised = (None, None) if call is None else _outcome(call)
        if isinstance(raised, ConfigError):
            raise raised
        status, error = self._status(state, call is None, raised or state.failure)
        completion = self._completion(state)
        if status == "ok":
            status, error = _judged(state, value)
        if status in SCORABLE and (wrong := _not_json(state.extra, completion)):
            status, error = "aborted", f"ctx.extra and ctx.completion go to the reward functions as JSON: {wrong}"
        if status not in SCORABLE:
            completion, state.extra = None, {}
        error = "\n".join([error, *notes]).strip()
        return _episode(state, status, error, value, completion)

    def _status(self, state: EpisodeState, out_of_time: bool, raised: BaseException | None) -> tuple[Status, str]:
        late = isinstance(raised, TimeoutError) and time.monotonic() >= state.deadline
        if (lost := state.lost or raised) and isinstance(lost, EnvLost):
            return "env_lost", str(lost)
        if out_of_time or late:
            return "timeout", f"the episode did not end within episodes.timeout, {self._settings.timeout:g} s"
        if _only(EpisodeTruncated, raised) or (raised is not None and state.told_truncated):
            sampled = any(line.tape.num_sampled for line in state.lines)
            return ("truncated" if sampled else "aborted"), str(raised)
        if isinstance(raised, asyncio.CancelledError):
            return "aborted", "the rollout function cancelled itself"
        if raised is not None:
            return "aborted", user_traceback(raised, hide=_OURS)
        return "ok", ""


async def _to_the_end(work: Coroutine[Any, Any, list[str]]) -> list[str]:
    """The result of `work`, which is bounded, also where this is cancelled; the cancellation follows it."""
    task, cancelled = asyncio.create_task(work), None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()


async def _cleaned_up(call: asyncio.Task[Any], work: Work, state: EpisodeState) -> list[str]:
    return [*await _stopped(call, work), *await state.close()]


async def _stopped(call: asyncio.Task[Any], work: Work) -> list[str]:
    """Cancel `call` unless it is done, and wait until it is; a sentence where it does not end."""
    call.add_done_callback(lambda task: task.cancelled() or task.exception())  # else asyncio complains of it later
    if not call.done():
        call.cancel()
        await asyncio.wait({call}, timeout=GRACE_S)
    if call.done():
        return []
    leave_behind(call, work)
    return [f"the rollout function did not end within {GRACE_S:g} s of being cancelled; it is left running"]


def _outcome(call: asyncio.Task[Any]) -> tuple[Any, BaseException | None]:
    if call.cancelled():
        return None, asyncio.CancelledError()
    return (None, error) if (error := call.exception()) else (call.result(), None)


def _judged(state: EpisodeState, value: Any) -> tuple[Status, str]:
    """The status of an episode whose function returned `value`."""
    if value is not None and not isinstance(value, numbers.Real | np.bool_):
        kind, shown = type(value).__name__, reprlib.repr(value)
        return "aborted", f"trl.rollout_func returned a {kind}, {shown}. Return the reward as a number, or None."
    if value is not None and not _is_finite(value):
        return "aborted", f"trl.rollout_func returned {reprlib.repr(value)}. Return a finite number, or None."
    if not any(line.tape.num_sampled for line in state.lines):
        return "aborted", (
            "trl.rollout_func never generated through ctx: there is nothing to train. Sample with ctx.turn(), "
            "ctx.generate(ids), ctx.reply(messages), or an agent at ctx.openai."
        )
    if state.over_budget:
        return "truncated", ""
    return "ok", ""


def _episode(state: EpisodeState, status: Status, error: str, value: Any, completion: Any) -> Episode:
    own = None
    if status in SCORABLE and (value is not None or state.rewards):
        own = math.fsum(reward.value for reward in state.rewards) if value is None else float(value)
    texts = [piece for line in state.lines for piece in line.spoken if isinstance(piece, str)]
    return Episode(
        rows=tuple(line.tape.row() for line in state.lines if line.tape.num_sampled),
        text="".join(texts),
        status=status,
        completion=completion,
        reward=own,
        step_rewards=tuple(state.rewards),
        extra=state.extra,
        metrics=state.metrics,
        turns=state.turns,
        attempts=state.attempt + 1,
        exact=state.exact,
        error=error,
        turn_times=tuple(state.turn_times),
    )


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _not_json(*values: Any) -> str:
    """What keeps `values` from being JSON; empty where nothing does."""
    try:
        json.dumps(values)
    except (TypeError, ValueError, RecursionError) as error:
        return f"{error}"
    return ""


def _only(kind: type[BaseException], error: BaseException | None) -> bool:
    """Whether `error` is of `kind`, or a group of nothing else."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(kind)[1] is None
    return isinstance(error, kind)
