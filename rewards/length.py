"""Rewards that depend on the length of the completion alone, in tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CACHE_FRACTION = 0.2
"""The part of the maximum length over which `soft_overlong` falls; DAPO's 4,096 of 20,480 tokens."""


def overlong_penalty(num_tokens: int, max_tokens: int, cache_tokens: int) -> float:
    """DAPO's equation 13: 0 up to `max_tokens - cache_tokens`, then falling linearly to -1 at `max_tokens`."""
    if num_tokens > max_tokens:
        return -1.0
    return min(0.0, (max_tokens - cache_tokens - num_tokens) / cache_tokens)


def soft_overlong(completion_ids: Sequence[Sequence[int]], max_completion_length: int, **kwargs: Any) -> list[float]:
    """`overlong_penalty` against `trl.max_completion_length`, falling over the last fifth of it."""
    cache_tokens = max(1, round(CACHE_FRACTION * max_completion_length))
    return [overlong_penalty(len(ids), max_completion_length, cache_tokens) for ids in completion_ids]


def brevity(completion_ids: Sequence[Sequence[int]], max_completion_length: int, **kwargs: Any) -> list[float]:
    """1 for an empty completion, falling linearly to 0 at `trl.max_completion_length`."""
    return [max(0.0, 1.0 - len(ids) / max_completion_length) for ids in completion_ids]


reward = soft_overlong
