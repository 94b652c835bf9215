"""The plain episode: one prompt, its completions, no environment."""

from __future__ import annotations

import numpy as np

from rlx.episode import Episode, Row
from rlx.errors import ServiceError
from rlx.rollout.worker import Worker
from rlx.wire import Completion, GroupRequest, Sampling

_FINISHED = ("stop", "length")


class SingleTurn:
    """One request for the whole group; each completion is an episode of one row."""

    own_reward = False

    async def start(self) -> None: ...

    async def run(self, worker: Worker, request: GroupRequest) -> list[Episode]:
        n = request.num_generations
        completions = await sample(worker, request.key, request.prompt_ids, n, request.sampling)
        return [
            Episode(
                rows=(Row(c.ids, c.logprobs, c.versions),),
                text=c.text,
                status="truncated" if c.finish_reason == "length" else "ok",
            )
            for c in completions
        ]

    async def close(self) -> None: ...


async def sample(
    worker: Worker, request_id: str, prompt_ids: np.ndarray, n: int, sampling: Sampling
) -> list[Completion]:
    """`n` completions by one worker; ServiceError naming it when they break the contract."""
    completions = await worker.generate(request_id, prompt_ids, n, sampling)
    if len(completions) != n:
        raise ServiceError(
            f"worker {worker.name} returned {len(completions)} completions for {request_id!r}, {n} were asked for"
        )
    if wrong := next(filter(None, map(_wrong_form, completions)), None) or _wrong_values(completions):
        raise ServiceError(f"worker {worker.name}, {request_id!r}: {wrong}")
    return completions


def _wrong_form(completion: Completion) -> str | None:
    ids, logprobs = completion.ids, completion.logprobs
    counts = [count for _, count in completion.versions]
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        return f"token ids must be one row of integers, got {ids.dtype} {ids.shape}"
    if logprobs.shape != ids.shape:
        return f"{ids.size} token ids with {logprobs.size} log-probabilities"
    if sum(counts) != ids.size or min(counts, default=1) < 1:
        return f"the weight versions {completion.versions} do not partition the {ids.size} tokens"
    if completion.finish_reason not in _FINISHED:
        return f"a completion was not finished but {completion.finish_reason!r}"
    return None


def _wrong_values(completions: list[Completion]) -> str | None:
    """Of all completions at once, which costs little more than of one."""
    ids, logprobs = (np.concatenate([getattr(c, name) for c in completions]) for name in ("ids", "logprobs"))
    if ids.size and (ids.min() < 0 or ids.max() >= 2**31):
        return f"token ids must fit int32 and not be negative, got {ids.min()} to {ids.max()}"
    if ((logprobs > 1e-3) & (logprobs < np.inf)).any():  # what is not finite the learner leaves out, and counts
        return "a log-probability of a sampled token is above 0"
    return None
