"""From rewards to advantages: each completion against the others of its prompt.

Shapes: B sequences (whole groups, the completions of one prompt side by side), F reward functions.
Not here: calling the rewards, and the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ScaleRewards = Literal["group", "batch", "none"]

_EPS = 1e-4
"""Added to the standard deviation, in units of reward, so that a group of equal rewards divides by no zero."""


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
    rewards: Tensor, reward_weights: Tensor, num_generations: int, scale_rewards: ScaleRewards
) -> Advantages:
    """Advantages of `rewards` [B, F] weighted by `reward_weights` [F].

    GRPO (arXiv 2402.03300, section 4.1.2): A = (r - mean of the group) / std of the group. `batch` divides by the
    standard deviation of all B rewards instead; `none` does not divide (Dr. GRPO, arXiv 2503.20783). NaN is a reward
    function's "not applicable": it counts nothing in the sum, and a completion with only NaN is left out of mean and
    standard deviation, so that it changes nothing for the others.
    """
    rewards_B = weighted_rewards(rewards, reward_weights)
    rewards_PG = rewards_B.view(-1, num_generations)
    std_PG = _nanstd(rewards_PG if scale_rewards != "batch" else rewards_PG.reshape(1, -1)).expand_as(rewards_PG)

    advantages_PG = rewards_PG - rewards_PG.nanmean(dim=1, keepdim=True)
    if scale_rewards != "none":
        advantages_PG = advantages_PG / (std_PG + _EPS)
    return Advantages(
        advantages=advantages_PG.nan_to_num(nan=0.0).flatten(),
        rewards=rewards_B,
        reward_mean=rewards_B.nanmean().item(),
        reward_std=_nanstd(rewards_B.view(1, -1)).item(),
        reward_std_zero_fraction=torch.isclose(std_PG, torch.zeros_like(std_PG)).float().mean().item(),
        unscorable_fraction=rewards_B.isnan().float().mean().item(),
    )


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
