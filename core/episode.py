"""What one episode leaves behind: the rows to train on, what the rewards see of it, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

import numpy as np

from rlx.record import record

CONTEXT = -1
"""The weight version of tokens that no policy sampled: prompts, observations, bridge tokens."""

Status = Literal["ok", "truncated", "timeout", "env_lost", "aborted"]
"""How an episode ended: ok; truncated, at its token or turn budget; timeout, at `episodes.timeout`; env_lost, its
environment died, hung or broke its protocol; aborted, the user's function raised, or its process was lost."""
SCORABLE: tuple[Status, ...] = ("ok", "truncated")
"""Only these are given to the rewards and trained; the others have no reward, which is not a reward of 0."""


@record
class Row:
    """One training row: a prompt of P tokens, and T tokens after it, of which those with a version were sampled.

    `ids` int32 [T]; `logprobs` float32 [T], of the distribution that was sampled from, NaN for context; `versions`:
    run-length encoded `(weight_version, count)` whose counts sum to T, version -1 for context. `prompt_ids` int32
    [P], None where it is the prompt of the group.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    versions: tuple[tuple[int, int], ...]
    prompt_ids: np.ndarray | None = None

    @property
    def mask(self) -> np.ndarray:
        """bool [T], True where the policy sampled the token: these are trained."""
        return np.repeat([v != CONTEXT for v, _ in self.versions], [n for _, n in self.versions]).astype(bool)

    @property
    def sampled_ids(self) -> np.ndarray:
        """The ids that the policy sampled."""
        return self.ids if self.num_sampled == self.ids.size else self.ids[self.mask]

    @property
    def num_sampled(self) -> int:
        return sum(n for v, n in self.versions if v != CONTEXT)


@record
class StepReward:
    """A reward that the episode itself gave, by `ctx.reward(value, name=, turn=)` or by a step of its environment.
    `turn` counts from 0; None belongs to the whole episode."""

    value: float
    name: str = "env"
    turn: int | None = None


@record
class Episode:
    """One episode of a group. A single-turn completion is an episode of one row."""

    rows: tuple[Row, ...]
    text: str
    """What the policy wrote, its turns one after the other, without special tokens."""
    status: Status = "ok"
    completion: str | list[dict[str, Any]] | None = None
    """What reward functions get as the completion: messages after the prompt, or a string. None: made of `text`."""
    reward: float | None = None
    """The episode's own reward: what the rollout function returned, else the sum of `step_rewards`; None without."""
    step_rewards: tuple[StepReward, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More columns for the reward functions, JSON values."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    turns: int = 1
    attempts: int = 1
    """Times that the episode was begun; above 1 when its environment was lost."""
    exact: bool = True
    """False when a rollout function hides which tokens it sampled, so that what is trained is not all that it did."""
    error: str = ""
    """Why the status is not ok, with the user's traceback where there is one."""
    process: str = ""
    """The process that ran its rollout function; empty where there is none."""
    turn_times: tuple[tuple[float, float], ...] = ()
    """(asked for, answered) of each turn, in unix seconds of that process's clock."""

    @property
    def scorable(self) -> bool:
        return self.status in SCORABLE

    @property
    def truncated(self) -> bool:
        return self.status == "truncated"

    @property
    def num_sampled(self) -> int:
        return sum(row.num_sampled for row in self.rows)

    @property
    def weight_versions(self) -> tuple[int, ...]:
        """The versions that sampled its tokens, ascending."""
        return tuple(sorted({v for row in self.rows for v, _ in row.versions if v != CONTEXT}))
