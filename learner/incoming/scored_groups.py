"""What the service says of scored groups, as the learner reads it: rewards by function, and what cannot be trained.

Shapes: G completions of a group, B of all groups, F reward functions.
"""

from __future__ import annotations

import numpy as np
import torch

from rlx.config import Config
from rlx.episode import Episode
from rlx.learner.objective.advantages import weighted_rewards
from rlx.wire import GroupResult

_SAME = 1e-8
"""Rewards that differ by no more are the same."""


def reward_names(group: GroupResult) -> list[str]:
    """The reward functions by the last part of their dotted names, or by the whole where those are not distinct."""
    whole = [outcome.name for outcome in group.rewards]
    short = [name.rpartition(".")[2].rpartition(":")[2] for name in whole]
    return short if len(set(short)) == len(short) else whole


def rewards_of(groups: list[GroupResult]) -> np.ndarray:
    """Rewards [B, F] of all episodes, group after group; NaN for None."""
    return np.concatenate([np.stack([r.values for r in group.rewards], axis=1) for group in groups])


def reward_weights_of(config: Config, rewards_BF: np.ndarray) -> torch.Tensor:
    """One weight [F] per column of rewards: `trl.reward_weights`, and 1 for the episodes' own reward without one."""
    given = config.trl.reward_weights or []
    return torch.tensor([*given, *[1.0] * (rewards_BF.shape[1] - len(given))])


def known_logprobs(episode: Episode) -> bool:
    """Whether all sampled tokens have a log-probability. Where one is NaN or infinite, the worker was broken, and the
    episode is not trained; its reward stays in the group's baseline."""
    return all(bool(np.isfinite(row.logprobs[row.mask]).all()) for row in episode.rows)


def has_spread(config: Config, group: GroupResult) -> bool:
    """Whether the completions of `group` differ in their reward; without that there is nothing to learn from it."""
    rewards_GF = torch.from_numpy(rewards_of([group]))
    if not config.normalizes_each_reward:
        rewards_GF = weighted_rewards(rewards_GF, reward_weights_of(config, rewards_GF.numpy()))[:, None]
    columns = [column[~column.isnan()] for column in rewards_GF.T]
    return any(column.numel() and bool(column.max() - column.min() > _SAME) for column in columns)
