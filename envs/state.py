"""What the rollouts of one episode share: its rows, its budget, its rewards, its environments, and why it fails."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol

import numpy as np

from rlx.envs.errors import EnvLost, EpisodeTruncated
from rlx.envs.messages import Message, Tool
from rlx.envs.session import Environments, EnvSession
from rlx.envs.tape import Tape
from rlx.episode import StepReward
from rlx.errors import DeadlineExceeded, ServiceError
from rlx.wire import Completion, GroupRequest, Sampling

Sampler = Callable[[str, np.ndarray, Sampling], Awaitable[Completion]]
"""(request_id, prompt_ids int32 [P], sampling) -> one completion."""
_SAMPLING = {field.name for field in fields(Sampling)}
_CHARACTERS_PER_TOKEN = 16
"""More than any text has on average."""
CLOSE_TIMEOUT_S = 10.0
"""Seconds that closing an environment may take; then the episode goes on without."""


class OpenAIEndpoint(Protocol):
    """Where the agent of one rollout finds its model."""

    @property
    def base_url(self) -> str: ...
    @property
    def api_key(self) -> str: ...


class Endpoint(Protocol):
    """Serves the OpenAI API to the agents of the rollouts that are registered."""

    def register(self, ctx: Any) -> OpenAIEndpoint: ...
    def unregister(self, ctx: Any) -> None: ...


@dataclass
class Line:
    """One row as a conversation. `plain`: it did not begin with messages, so that what is observed is appended as it
    is. `phase`: the policy speaks next (prompt), may go on (open: cut by length or a stop string), or ended its turn.
    """

    tape: Tape
    messages: list[Message]
    tools: list[Tool] | None = None
    plain: bool = False
    phase: Literal["prompt", "open", "ended"] = "prompt"
    busy: bool = False
    turn_start: int = 0
    """Where in the tape, prompt included, the turn that is open began."""
    first_message: int = 0
    """Of `messages`, where the prompt ends."""
    spoken: list[str | np.ndarray] = field(default_factory=list)
    """What followed the prompt: text of turns, token ids of context."""


class EpisodeState:
    """Shared by a rollout and its forks. `max_model_len` bounds prompt and tokens of a row."""

    def __init__(
        self,
        sample: Sampler,
        request: GroupRequest,
        index: int,
        attempt: int,
        *,
        deadline: float,
        max_model_len: int,
        environments: Environments | None = None,
        endpoint: Endpoint | None = None,
    ):
        self.request, self.index, self.attempt, self.deadline = request, index, attempt, deadline
        self.endpoint = endpoint
        self.lines: list[Line] = []
        self.rewards: list[StepReward] = []
        self.metrics: dict[str, float] = {}
        self.extra: dict[str, Any] = {}
        self.completion: str | list[Message] | None = None
        self.exact = True
        self.turns = 0
        self.turn_times: list[tuple[float, float]] = []
        """(asked for, answered) of each turn, in unix seconds"""
        self.calls = 0
        self.over_budget = False
        self.told_truncated = False
        """An agent that knows no EpisodeTruncated was told in its own terms."""
        self.lost: EnvLost | None = None
        self.failure: BaseException | None = None
        """What failed outside of the user's function and decides how the episode ends; of the service or endpoint."""
        self.registered: list[Any] = []
        self._sample = sample
        self._max_model_len = max_model_len
        self._environments = environments
        self._requests = 0
        self._leases: list[EnvSession] = []
        self._over = False

    async def sample(self, line: Line, changes: Mapping[str, Any]) -> Completion:
        """The next tokens of `line`, on its tape. EpisodeTruncated when nothing is left of its budget."""
        await self.still_running()
        sampling = self._sampling(line, changes)
        request_id = f"{self.request.key}:{self.index}.{self.attempt}.{self._requests}"
        self._requests += 1
        line.busy, asked_at = True, time.time()
        try:
            completion = await self._sample(request_id, line.tape.ids(), sampling)
        except (ServiceError, DeadlineExceeded) as error:
            self.failure = self.failure or error
            raise
        finally:
            line.busy = False
        await self.still_running()
        line.tape.sampled(completion)
        self.turn_times.append((round(asked_at, 4), round(time.time(), 4)))
        if completion.finish_reason == "length" and len(completion.ids) >= self.left(line, len(completion.ids)):
            self.over_budget = True
        return completion

    def left(self, line: Line, more: int = 0) -> int:
        """Tokens that `line` may still get, had it `more` fewer."""
        used = len(line.tape) - more
        return min(self.request.sampling.max_tokens, self._max_model_len - len(line.tape.prompt_ids)) - used

    def check_length(self, messages: Sequence[Message]) -> None:
        """EpisodeTruncated for text that cannot fit: it would be tokenised for seconds while all other episodes of the
        process stand still."""
        most = _CHARACTERS_PER_TOKEN * self._max_model_len
        length = sum(len(content) for m in messages if isinstance(content := m.get("content"), str))
        if length > most:
            raise EpisodeTruncated(f"{length:,} characters were to be shown to the policy; {most:,} cannot fit")

    async def lease(self, ref: str | int | None, reset: Mapping[str, Any]) -> EnvSession:
        """An environment session; closed with the episode at the latest."""
        await self.still_running()
        if self._environments is None:
            raise RuntimeError("there are no environments: name one in the configuration, under `envs:`")
        try:
            session = await self._environments.open(ref, seed=self.request.seed, deadline=self.deadline, **reset)
        except EnvLost as error:
            raise self.lose(error) from error.__cause__
        self._leases.append(session)
        if self._over:
            await self.close()
        await self.still_running()
        return session

    def lose(self, error: EnvLost) -> EnvLost:
        self.lost = self.lost or error
        return error

    def record(self, reward: StepReward) -> None:
        if not self._over:
            self.rewards.append(reward)

    async def still_running(self) -> None:
        """Raises what ended the episode, so that a function that goes on regardless comes to an end."""
        if self._over:
            await asyncio.sleep(0.1)  # a loop that catches everything must not block the others
            raise asyncio.CancelledError("the episode is over")
        for error in (self.failure, self.lost):
            if error is not None:
                raise error

    def end(self) -> None:
        """Nothing is sampled or recorded from now on; no agent reaches the endpoint."""
        self._over = True
        if self.endpoint is not None:
            for ctx in self.registered:
                self.endpoint.unregister(ctx)
        self.registered.clear()

    @property
    def over(self) -> bool:
        return self._over

    async def close(self) -> list[str]:
        """Close every environment, each within its deadline; what went wrong, one sentence each."""
        leases, self._leases = self._leases, []
        return [said for said in await asyncio.gather(*map(_close, leases)) if said]

    def _sampling(self, line: Line, changes: Mapping[str, Any]) -> Sampling:
        left = self.left(line)
        if left <= 0:
            self.over_budget = True
            raise EpisodeTruncated(self._full(line))
        number = (self.request.seed, self.request.key, self.index, self.attempt, self._requests)
        digest = hashlib.blake2b(repr(number).encode(), digest_size=8).digest()
        if unknown := set(changes) - _SAMPLING:
            raise TypeError(f"there is no sampling field {min(unknown)!r}. There are: {', '.join(sorted(_SAMPLING))}")
        if not changes.get("temperature", 1) > 0:
            raise ValueError(f"temperature={changes['temperature']!r} samples nothing to learn from; give one above 0")
        sampling = replace(self.request.sampling, **{"seed": int.from_bytes(digest, "big") >> 1, **changes})
        if isinstance(sampling.stop, str):
            sampling = replace(sampling, stop=(sampling.stop,))
        if sampling.max_tokens < 1:
            raise ValueError(f"max_tokens is {sampling.max_tokens}; a turn has at least one token")
        return replace(sampling, max_tokens=min(sampling.max_tokens, left), stop=tuple(sampling.stop))

    def _full(self, line: Line) -> str:
        prompt, tokens = len(line.tape.prompt_ids), len(line.tape)
        return (
            f"nothing is left to sample: {tokens} tokens after a prompt of {prompt}, and "
            f"trl.max_completion_length is {self.request.sampling.max_tokens}, vllm.max_model_len {self._max_model_len}"
        )


async def _close(session: EnvSession) -> str:
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await session.close()
    except TimeoutError:
        return f"{session.name} did not close within {CLOSE_TIMEOUT_S:g} s"
    except Exception as error:  # the episode is over; a session that does not close must not change its outcome
        return f"{session.name} did not close: {type(error).__name__}: {error}"
    return ""


def finite(what: str, value: Any) -> float:
    """`value` as a number; ValueError when it is none that can be averaged."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{what}: {number} is not a finite number")
    return number


def new_deadline(timeout: float) -> float:
    """`timeout` seconds from now, on time.monotonic()."""
    return time.monotonic() + timeout
