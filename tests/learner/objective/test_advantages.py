"""Advantages by hand and by their properties; equality with TRL is in test_losses_equal_trl.py."""

import pytest
import torch
from torch import Tensor, nan, tensor

from rlx.learner.objective.advantages import AdvantageOptions, Advantages, ScaleRewards, group_advantages

ONE = tensor([1.0])
SCALES: tuple[ScaleRewards, ...] = ("group", "batch", "none")
RLOO = AdvantageOptions("rloo")
BATCH = AdvantageOptions("reinforce_plus_plus")
BASELINE = AdvantageOptions("reinforce_plus_plus_baseline")
GDPO = AdvantageOptions(normalize_then_sum=True)


def column(*rewards: float) -> Tensor:
    return tensor(rewards, dtype=torch.float32)[:, None]


def scaled(rewards: Tensor, weights: Tensor, num_generations: int, scale: ScaleRewards) -> Advantages:
    return group_advantages(rewards, weights, num_generations, AdvantageOptions(scale_rewards=scale))


def test_each_scaling_by_hand() -> None:
    rewards = column(0, 2, 1, 5)  # groups (0, 2), (1, 5): means 1 and 3, deviations √2 and 2√2, of all four √(14/3)
    by_scale = {s: scaled(rewards, ONE, 2, s).advantages for s in SCALES}
    torch.testing.assert_close(by_scale["none"], tensor([-1.0, 1.0, -2.0, 2.0]))
    root = 2**0.5 / 2
    torch.testing.assert_close(by_scale["group"], tensor([-root, root, -root, root]), atol=1e-4, rtol=0)
    std = (14 / 3) ** 0.5 + 1e-4
    torch.testing.assert_close(by_scale["batch"], tensor([-1.0, 1.0, -2.0, 2.0]) / std)


def test_reward_functions_are_weighted_and_summed_and_nan_counts_nothing() -> None:
    rewards = tensor([[1.0, 10.0], [3.0, nan]])
    result = scaled(rewards, tensor([2.0, 0.5]), 2, "none")
    assert result.rewards.tolist() == [7.0, 6.0]
    assert result.advantages.tolist() == [0.5, -0.5]
    assert (result.reward_mean, result.reward_std) == pytest.approx((6.5, 0.5**0.5))


@pytest.mark.parametrize("scale", ["group", "none"])
def test_a_sample_without_reward_changes_nothing_for_the_rest_of_its_group(scale: ScaleRewards) -> None:
    without = scaled(column(1, 4, 2), ONE, 3, scale).advantages
    beside = scaled(column(1, 4, nan, 2), ONE, 4, scale)
    torch.testing.assert_close(beside.advantages[[0, 1, 3]], without)
    assert beside.advantages[2] == 0
    assert beside.rewards[2].isnan()
    assert beside.unscorable_fraction == 0.25


def test_samples_without_reward_change_no_statistic_of_the_batch() -> None:
    whole = scaled(column(1, 4, 2, 6), ONE, 2, "batch")
    holes = scaled(column(1, nan, 4, nan, 2, 6, nan, nan), ONE, 4, "none")
    assert (whole.reward_mean, whole.reward_std) == pytest.approx((holes.reward_mean, holes.reward_std))


@pytest.mark.parametrize("scale", SCALES)
def test_one_scorable_sample_or_none_gives_advantage_zero(scale: ScaleRewards) -> None:
    result = scaled(column(nan, 7, nan, nan, nan, nan, 1, 2, 3), ONE, 3, scale)
    assert result.advantages[:6].tolist() == [0.0] * 6
    assert result.advantages[6] < 0 < result.advantages[8]


@pytest.mark.parametrize("scale", SCALES)
def test_a_batch_without_any_reward_gives_zeros(scale: ScaleRewards) -> None:
    result = scaled(column(*[nan] * 4), ONE, 2, scale)
    assert result.advantages.tolist() == [0.0] * 4
    assert result.unscorable_fraction == 1.0


@pytest.mark.parametrize("scale", SCALES)
def test_equal_rewards_give_zeros_and_are_counted(scale: ScaleRewards) -> None:
    result = scaled(column(3, 3, 1, 2), ONE, 2, scale)
    assert result.advantages[:2].tolist() == [0.0, 0.0]
    assert result.reward_std_zero_fraction == (0.0 if scale == "batch" else 0.5)


@pytest.mark.parametrize("scale", SCALES)
def test_advantages_sum_to_zero_in_each_group_and_ignore_a_shift_of_the_rewards(scale: ScaleRewards) -> None:
    rewards = torch.randn(24, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = tensor([1.0, 0.3], dtype=torch.float64)
    advantages = scaled(rewards, weights, 8, scale).advantages
    torch.testing.assert_close(advantages.view(3, 8).sum(dim=1), torch.zeros(3, dtype=torch.float64))
    shifted = scaled(rewards + 5, weights, 8, scale).advantages
    torch.testing.assert_close(shifted, advantages)


@pytest.mark.parametrize("scale", SCALES)
def test_a_group_of_one_gives_zero(scale: ScaleRewards) -> None:
    assert scaled(column(1, 2, 3), ONE, 1, scale).advantages.tolist() == [0.0] * 3


def test_rloo_compares_with_the_others_of_the_group() -> None:
    rewards = column(0, 2, 7, 1, nan, 5, nan, 4, nan)
    result = group_advantages(rewards, ONE, 3, RLOO)
    torch.testing.assert_close(result.advantages, tensor([-4.5, -1.5, 6.0, -4.0, 0.0, 4.0, 0.0, 0.0, 0.0]))
    assert group_advantages(column(3, 3, 1, 2), ONE, 2, RLOO).reward_std_zero_fraction == 0.5


def test_reinforce_plus_plus_compares_with_the_whole_batch() -> None:
    rewards = [0.0, 2.0, 1.0, 5.0]
    std = (14 / 3) ** 0.5 + 1e-4
    plain = group_advantages(column(*rewards, nan, nan), ONE, 2, BATCH).advantages
    torch.testing.assert_close(plain, tensor([-2.0, 0.0, -1.0, 3.0, 0.0, 0.0]) / std)
    centred = group_advantages(column(*rewards, nan, nan), ONE, 2, BASELINE).advantages
    torch.testing.assert_close(centred, tensor([-1.0, 1.0, -2.0, 2.0, 0.0, 0.0]) / ((10 / 3) ** 0.5 + 1e-4))


def test_gdpo_normalises_each_reward_so_that_a_large_one_drowns_no_small_one() -> None:
    rewards = tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 1.0], [100.0, 1.0]])
    advantages = group_advantages(rewards, tensor([1.0, 1.0]), 4, GDPO).advantages
    assert advantages[1].item() == pytest.approx(advantages[2].item(), abs=1e-3)
    assert advantages[0] < advantages[1] < advantages[3]
    weighted = group_advantages(rewards, tensor([1.0, 3.0]), 4, GDPO).advantages
    assert weighted[1] < weighted[2]


@pytest.mark.parametrize("options", [RLOO, BATCH, BASELINE, GDPO])
def test_every_estimator_gives_zeros_without_rewards_or_with_equal_ones(options: AdvantageOptions) -> None:
    for rewards in (column(*[nan] * 4), column(1, 1, 1, 1), column(nan, 7, nan, nan)):
        assert group_advantages(rewards, ONE, 2, options).advantages.abs().max() == 0


@pytest.mark.parametrize("options", [RLOO, BATCH, BASELINE, GDPO])
def test_a_sample_without_reward_changes_nothing_for_the_others_with_any_estimator(options: AdvantageOptions) -> None:
    without = group_advantages(column(1, 4, 2, 6, 0, 3), ONE, 3, options).advantages
    beside = group_advantages(column(1, nan, 4, 2, 6, 0, 3, nan), ONE, 4, options).advantages
    torch.testing.assert_close(beside[[0, 2, 3, 4, 5, 6]], without)
    assert beside[[1, 7]].tolist() == [0.0, 0.0]
