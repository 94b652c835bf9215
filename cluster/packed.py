"""Completions on their way through Ray: two byte strings for all of a request. To pickle an object and two arrays for each
of them takes ten times longer."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray

from rlx.wire import Completion, Sampling

Packed = tuple[bytes, bytes, list[tuple[Any, ...]]]
"""Token ids as int32, log-probabilities as float32, and of each completion how many it has of both, and the rest."""


def ask(actor: Any, request_id: str, prompt_ids: np.ndarray, n: int, sampling: Sampling) -> ray.ObjectRef[Packed]:
    """Call `RolloutActor.generate`."""
    prompt = prompt_ids.astype(np.int32, copy=False).tobytes()
    return actor.generate.remote(request_id, prompt, n, vars(sampling))


def unpack_request(prompt: bytes, sampling: dict[str, Any]) -> tuple[np.ndarray, Sampling]:
    return np.frombuffer(prompt, np.int32), Sampling(**sampling)


def pack(completions: list[Completion]) -> Packed:
    return (
        b"".join([c.ids.astype(np.int32, casting="safe", copy=False).tobytes() for c in completions]),
        b"".join([c.logprobs.astype(np.float32, copy=False).tobytes() for c in completions]),
        [(c.ids.size, c.logprobs.size, c.versions, c.finish_reason, c.text) for c in completions],
    )


def unpack(packed: Packed) -> list[Completion]:
    ids, logprobs, heads = np.frombuffer(packed[0], np.int32), np.frombuffer(packed[1], np.float32), packed[2]
    completions = []
    for num_ids, num_logprobs, *rest in heads:
        completions.append(Completion(ids[:num_ids], logprobs[:num_logprobs], *rest))
        ids, logprobs = ids[num_ids:], logprobs[num_logprobs:]
    return completions
