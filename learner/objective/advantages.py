"""From rewards to advantages: each completion against the others of its prompt, or of the step.

Shapes: B sequences (whole groups, the completions of one prompt side by side), P prompts, G completions of each,
F reward functions.
Not here: calling the rewards, and the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["group", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]
ScaleRewards = Literal["group", "batch", "none"]

_EPS = 1e-4
"""Added to the standard deviation, in units of reward, so that a group of equal rewards divides by no zero."""


@dataclass(frozen=True)
class AdvantageOptions:
    estimator: Estimator = "group"
    scale_rewards: ScaleRewards = "group"
    """What `group` divides by"""
    normalize_then_sum: bool = False
    """GDPO, instead of `estimator` and `scale_rewards`"""


@dataclass(frozen=True)
class Advantages:
    """`rewards` is NaN and `advantages` 0 where no reward function applied. Statistics skip the NaN."""

    advantages: Tensor
    """[B]"""
    rewards: Tensor
    """[B], the weighted sum over the reward functions"""
    reward_mean: float
    reward_std: float
    reward_std_zero_fraction: float
    """Fraction of the B sequences whose group (or batch) has rewards without spread, hence no learning signal."""
    unscorable_fraction: float


def group_advantages(
    rewards: Tensor, reward_weights: Tensor, num_generations: int, options: AdvantageOptions
) -> Advantages:
    """Advantages of `rewards` [B, F] weighted by `reward_weights` [F].

    NaN is a reward function's "not applicable": it counts nothing in the sum, and a completion with only NaN is left
    out of mean and standard deviation, so that it changes nothing for the others.
    """
    rewards_B = weighted_rewards(rewards, reward_weights)
    if options.normalize_then_sum:
        advantages_B, std_B = _each_reward_normalized(rewards, reward_weights, num_generations)
    else:
        advantages_PG, std_PG = _estimate(rewards_B.view(-1, num_generations), options)
        advantages_B, std_B = advantages_PG.flatten(), std_PG.flatten()
    return Advantages(
        advantages=advantages_B.nan_to_num(nan=0.0),
        rewards=rewards_B,
        reward_mean=rewards_B.nanmean().item(),
        reward_std=_nanstd(rewards_B.view(1, -1)).item(),
        reward_std_zero_fraction=torch.isclose(std_B, torch.zeros_like(std_B)).float().mean().item(),
        unscorable_fraction=rewards_B.isnan().float().mean().item(),
    )


def _estimate(rewards_PG: Tensor, options: AdvantageOptions) -> tuple[Tensor, Tensor]:
    """Advantages [P, G], and the standard deviation [P, G] that is 0 where nothing can be learnt.

    - group: r - mean of the group, by the standard deviation of the group (GRPO, arXiv 2402.03300, section 4.1.2), of
      all B rewards (`batch`), or undivided (`none`: Dr. GRPO, arXiv 2503.20783)
    - rloo: r - mean of the others of the group (RLOO, arXiv 2402.14740); alone in its group, 0
    - reinforce_plus_plus: (r - mean of all B) / standard deviation of all B (REINFORCE++, arXiv 2501.03262), here of
      completions, not of tokens
    - reinforce_plus_plus_baseline: the same with r - mean of the group for r
    """
    centred_PG = rewards_PG - rewards_PG.nanmean(dim=1, keepdim=True)
    group_std_PG = _nanstd(rewards_PG).expand_as(rewards_PG)
    if options.estimator == "rloo":
        count_P1 = (~rewards_PG.isnan()).sum(dim=1, keepdim=True)
        return centred_PG * count_P1 / (count_P1 - 1).clamp(min=1), group_std_PG
    if options.estimator == "reinforce_plus_plus":
        return _normalized(rewards_PG)
    if options.estimator == "reinforce_plus_plus_baseline":
        return _normalized(centred_PG)
    if options.scale_rewards == "none":
        return centred_PG, group_std_PG
    std_PG = group_std_PG if options.scale_rewards == "group" else _nanstd(rewards_PG.view(1, -1)).expand_as(rewards_PG)
    return centred_PG / (std_PG + _EPS), std_PG


def _each_reward_normalized(rewards: Tensor, reward_weights: Tensor, num_generations: int) -> tuple[Tensor, Tensor]:
    """GDPO (arXiv 2601.05242), [B] and [B]: every reward function over its group, their weighted sum over the batch."""
    rewards_PFG = rewards.view(-1, num_generations, rewards.shape[1]).transpose(1, 2)
    scaled_PFG = (rewards_PFG - rewards_PFG.nanmean(dim=2, keepdim=True)) / (_nanstd(rewards_PFG) + _EPS)
    sums_B = (scaled_PFG.transpose(1, 2).reshape(rewards.shape) * reward_weights).nansum(dim=1)
    return _normalized(sums_B.masked_fill(rewards.isnan().all(dim=1), torch.nan))


def _normalized(values: Tensor) -> tuple[Tensor, Tensor]:
    """`values` less their mean, by their standard deviation, which is given too, in the shape of `values`."""
    std = _nanstd(values.reshape(1, -1)).squeeze().expand_as(values)
    return (values - values.nanmean()) / (std + _EPS), std


def weighted_rewards(rewards: Tensor, reward_weights: Tensor) -> Tensor:
    """Sum [B] of `rewards` [B, F] by `reward_weights` [F] over the functions that applied; NaN where none did."""
    return (rewards * reward_weights).nansum(dim=1).masked_fill(rewards.isnan().all(dim=1), torch.nan)


def _nanstd(values: Tensor) -> Tensor:
    """Unbiased standard deviation over the last dimension [..., N] → [..., 1] of what is not NaN.

    With one value among several it is undefined (NaN); N = 1 gives 0.
    """
    if values.shape[-1] == 1:
        return torch.zeros_like(values)
    count = (~values.isnan()).sum(dim=-1, keepdim=True)
    squares = (values - values.nanmean(dim=-1, keepdim=True)).square().nansum(dim=-1, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt().masked_fill(count < 2, torch.nan)
