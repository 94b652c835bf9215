"""Means, p95 and maxima of a step are those of all its tokens, however they were cut into micro-batches and ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rlx.learner.objective.loss_metrics import LossMetrics
from rlx.learner.objective.losses import CorrectionMode, LossOptions, policy_loss
from rlx.learner.ranks import Ranks

GAP, RATIO = "sampling/sampling_logp_difference", "sampling/importance_sampling_ratio"


class Pair(Ranks):
    """This rank and another, which brings `theirs` in the order of the reductions."""

    def __init__(self, theirs: LossMetrics):
        self.rank, self.size = 0, 2
        self._theirs = [theirs.sums, theirs.maxima, theirs.counts]

    def sum_(self, values: Tensor) -> Tensor:
        return values.add_(self._theirs.pop(0))

    def max_(self, values: Tensor) -> Tensor:
        return torch.maximum(values, self._theirs.pop(0))


def measured(old_T: Tensor, sampling_T: Tensor, mode: CorrectionMode = "token_truncate", **bounds: float | None):  # type: ignore[no-untyped-def]
    options = LossOptions(
        vllm_importance_sampling_mode=mode, **{f"vllm_importance_sampling_{k}": v for k, v in bounds.items()}
    )  # type: ignore[arg-type]
    ones, lengths = torch.ones_like(old_T), torch.tensor([len(old_T)])
    return policy_loss(old_T, None, None, sampling_T, ones, ones, lengths, options).metrics


def p95(values: np.ndarray) -> float:
    return float(np.quantile(values, 0.95, method="inverted_cdf"))


@pytest.mark.parametrize("scale", [1e-4, 0.02, 1.5])
def test_p95_is_that_of_all_tokens_of_all_micro_batches_and_ranks_within_its_bin(scale: float) -> None:
    rng = np.random.default_rng(3)
    sampling = rng.normal(-3, 1, 5000).astype(np.float32)
    old = (sampling + rng.normal(0, scale, 5000)).astype(np.float32)
    parts = zip(torch.from_numpy(old).split(700), torch.from_numpy(sampling).split(700), strict=True)
    here, there = LossMetrics.zero(), LossMetrics.zero()
    for index, (old_T, sampling_T) in enumerate(parts):
        if index % 3:
            here = here + measured(old_T, sampling_T, clip_max=None)
        else:
            there = there + measured(old_T, sampling_T, clip_max=None)
    report = here.cpu().of_all(Pair(there)).report()
    gaps, log_ratios = np.abs(old - sampling), old - sampling
    assert report[f"{GAP}/mean"] == pytest.approx(gaps.mean(), rel=1e-4)
    assert report[f"{GAP}/max"] == pytest.approx(gaps.max())
    assert 1 - 1e-4 <= report[f"{GAP}/p95"] / p95(gaps) <= 1.0201
    assert report[f"{RATIO}/mean"] == pytest.approx(np.exp(log_ratios).mean(), rel=1e-4)
    assert report[f"{RATIO}/max"] == pytest.approx(np.exp(log_ratios).max(), rel=1e-4)
    assert 1 - 1e-3 <= math.log(report[f"{RATIO}/p95"]) / p95(log_ratios) <= 1.0211
    assert report[f"{RATIO}/truncated_fraction"] == 0
    whole = measured(torch.from_numpy(old), torch.from_numpy(sampling), clip_max=None).report()
    assert whole[f"{GAP}/p95"] == report[f"{GAP}/p95"]


def test_p95_of_few_and_of_equal_values_is_never_above_the_greatest() -> None:
    zeros = torch.zeros(7)
    same = measured(zeros, zeros).report()
    assert (same[f"{GAP}/p95"], same[f"{GAP}/max"], same[f"{RATIO}/p95"], same[f"{RATIO}/max"]) == (0, 0, 1, 1)
    one = measured(torch.tensor([-1.0]), torch.tensor([-1.5])).report()
    assert one[f"{GAP}/p95"] == one[f"{GAP}/max"] == 0.5
    assert one[f"{RATIO}/p95"] == one[f"{RATIO}/max"] == pytest.approx(math.exp(0.5))
    nineteen_of_twenty = measured(torch.tensor([0.0] * 19 + [2.0]), torch.zeros(20)).report()
    assert nineteen_of_twenty[f"{GAP}/p95"] == 0
    assert nineteen_of_twenty[f"{GAP}/max"] == 2
    eighteen = measured(torch.tensor([0.0] * 18 + [2.0, 2.0]), torch.zeros(20)).report()
    assert eighteen[f"{GAP}/p95"] == 2


def test_ratios_below_one_have_a_p95_below_one() -> None:
    report = measured(torch.full((10,), -2.0), torch.full((10,), -1.0)).report()
    assert math.log(report[f"{RATIO}/p95"]) == pytest.approx(-1, rel=0.021)
    assert report[f"{RATIO}/p95"] >= math.exp(-1) - 1e-6


def test_no_tokens_no_sampler_and_unknown_log_probabilities_measure_nothing_false() -> None:
    none = measured(torch.zeros(0), torch.zeros(0)).report()
    assert not [name for name in none if name.startswith("sampling")]
    unknown = measured(torch.tensor([-1.0, -2.0]), torch.tensor([math.nan, -1.5])).report()
    assert unknown[f"{GAP}/mean"] == unknown[f"{GAP}/p95"] == 0.5
    extreme = measured(torch.tensor([0.0, -5000.0]), torch.tensor([-5000.0, 0.0]), clip_max=None).report()
    assert extreme[f"{GAP}/max"] == 5000
    assert extreme[f"{RATIO}/p95"] == pytest.approx(math.exp(700))


def test_what_was_masked_or_truncated_is_told_as_a_fraction() -> None:
    old, sampling = torch.tensor([8.0, 2.0, 1.0, 0.5]).log(), torch.zeros(4)
    masked = measured(old, sampling, "token_mask", clip_min=0.6, clip_max=3.0).report()
    assert masked[f"{RATIO}/masked_fraction"] == 0.5
    assert f"{RATIO}/truncated_fraction" not in masked
    for low, fraction in ((None, 0.25), (0.6, 0.5)):
        truncated = measured(old, sampling, clip_min=low, clip_max=3.0).report()
        assert truncated[f"{RATIO}/truncated_fraction"] == fraction
        assert f"{RATIO}/masked_fraction" not in truncated
    by_sequence = measured(old, sampling, "sequence_truncate", clip_max=3.0).report()
    assert by_sequence[f"{RATIO}/truncated_fraction"] == 1
