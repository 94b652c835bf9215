"""What a step's rollouts were, in numbers. Not here: what the loss measures (`objective/loss_metrics.py`)."""

from __future__ import annotations

import math
from typing import get_args

import torch

from rlx.config import Config
from rlx.episode import Episode, Status
from rlx.learner.incoming.scored_groups import known_logprobs, reward_names
from rlx.learner.incoming.stream import StepBatch


def step_metrics(config: Config, batch: StepBatch) -> dict[str, float]:
    """What one step's rollouts looked like, by TRL's names. Lengths in tokens, times in seconds."""
    episodes, scored = batch.episodes, batch.advantages
    lengths = [e.num_sampled for e in episodes]
    metrics = {
        "reward": scored.reward_mean,
        "reward_std": scored.reward_std,
        "frac_reward_zero_std": scored.reward_std_zero_fraction,
        "frac_reward_none": scored.unscorable_fraction,
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": sum(e.truncated for e in episodes) / len(episodes),
    }
    for index, name in enumerate(reward_names(batch.groups[0])):
        column = torch.from_numpy(batch.rewards_BF[:, index].copy())
        metrics[f"rewards/{name}/mean"] = column.nanmean().item()
        metrics[f"rewards/{name}/failed"] = float(sum(group.rewards[index].failed for group in batch.groups))
    if config.has_episodes:
        metrics |= _episode_metrics(episodes)
    for name in dict.fromkeys(name for group in batch.groups for name in group.metrics):
        metrics[name] = mean([group.metrics[name] for group in batch.groups if name in group.metrics])
    if bad := sum(not known_logprobs(e) for e in episodes):
        metrics["frac_logprobs_not_finite"] = bad / len(episodes)
    return metrics | batch.metrics


def _episode_metrics(episodes: list[Episode]) -> dict[str, float]:
    """Fractions of the episodes by how they ended, means of turns and training rows, and what `ctx.metric` gave."""
    count = len(episodes)
    metrics = {f"episodes/{status}": sum(e.status == status for e in episodes) / count for status in get_args(Status)}
    metrics |= {
        "episodes/turns": sum(e.turns for e in episodes) / count,
        "episodes/rows": sum(len(e.rows) for e in episodes) / count,
        "episodes/exact": sum(e.exact for e in episodes) / count,
        "episodes/retried": sum(e.attempts > 1 for e in episodes) / count,
    }
    for name in dict.fromkeys(name for e in episodes for name in e.metrics):
        metrics[name] = mean([e.metrics[name] for e in episodes if name in e.metrics])
    return metrics


def mean(values: list[float]) -> float:
    """Of what is not NaN; NaN when nothing is left."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
