"""The plain episode: one prompt, its completions, no environment."""

from __future__ import annotations

import numpy as np

from rlx.errors import ServiceError
from rlx.rollout.worker import Worker
from rlx.wire import Completion, GroupRequest

_FINISHED = ("stop", "length")


async def single_turn(worker: Worker, request: GroupRequest) -> list[Completion]:
    """`request.num_generations` completions by one worker; ServiceError naming it when they break the contract."""
    completions = await worker.generate(request.key, request.prompt_ids, request.num_generations, request.sampling)
    if len(completions) != request.num_generations:
        raise ServiceError(
            f"worker {worker.name} returned {len(completions)} completions for group {request.key!r}, "
            f"{request.num_generations} were asked for"
        )
    for index, completion in enumerate(completions):
        if wrong := _what_is_wrong(completion):
            raise ServiceError(f"worker {worker.name}, group {request.key!r}, completion {index}: {wrong}")
    return completions


def _what_is_wrong(completion: Completion) -> str | None:
    ids, logprobs = completion.ids, completion.logprobs
    stamped = sum(count for _, count in completion.versions)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        return f"token ids must be one row of integers, got {ids.dtype} {ids.shape}"
    if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(np.int32).max):
        return f"token ids must fit int32 and not be negative, got {ids.min()} to {ids.max()}"
    if logprobs.shape != ids.shape:
        return f"{ids.size} token ids with {logprobs.size} log-probabilities"
    if not np.isfinite(logprobs).all() or (logprobs > 1e-3).any():
        return "a log-probability of a sampled token is not a finite number below 0"
    if stamped != ids.size or any(count < 1 for _, count in completion.versions):
        return f"the weight versions {completion.versions} do not partition the {ids.size} tokens"
    if completion.finish_reason not in _FINISHED:
        return f"it was not finished but {completion.finish_reason!r}"
    return None
