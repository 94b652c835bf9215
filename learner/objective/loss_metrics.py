"""What a loss measures beside its value: sums, maxima and counts that can be added over micro-batches and ranks.

Shapes: T values of a micro-batch, one per token, or one per sequence where a quantity belongs to the sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlx.learner.ranks import Ranks

_RATIO = "sampling/importance_sampling_ratio"
_GAP = "sampling/sampling_logp_difference"

MEANS = (
    "entropy",
    "kl",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "cispo_clip_ratio",
    "vespo/phi_seq_mean",
    "off_policy_masked_fraction",
    f"{_RATIO}/mean",
    f"{_RATIO}/masked_fraction",
    f"{_RATIO}/truncated_fraction",
    f"{_GAP}/mean",
)
MAXIMA = (f"{_RATIO}/max", f"{_GAP}/max")
QUANTILES = (f"{_RATIO}/p95", f"{_GAP}/p95")
"""0.95-quantiles of what the maxima are of. Of a ratio its logarithm is counted."""

_LEAST, _GREATEST, _STEP = 1e-6, 1e3, math.log(1.02)
_LARGEST_LOG = 700.0
_SIDE = math.ceil(math.log(_GREATEST / _LEAST) / _STEP)
_BINS = 2 * _SIDE + 1
"""Bin `_SIDE` counts |x| ≤ 1e-6; those right and left of it, up to 1e3, are each 2 % wider than the one before."""


@dataclass(frozen=True)
class LossMetrics:
    """TRL's names, and some of our own. A row of `MEANS` that was not measured has count 0 and is left out of the
    report. A p95 is the upper bound of its bin, so at most 2 % too far from 0: of a ratio r that is 2 % of log r."""

    sums: Tensor
    """float64 [len(MEANS), 2]: sum and count of tokens or sequences; reduce with SUM"""
    maxima: Tensor
    """float64 [len(MAXIMA)], of values that are never negative; reduce with MAX"""
    counts: Tensor
    """int64 [len(QUANTILES), _BINS]: values in each bin; reduce with SUM"""

    @staticmethod
    def zero(device: torch.device | str = "cpu") -> LossMetrics:
        return LossMetrics(
            torch.zeros(len(MEANS), 2, dtype=torch.float64, device=device),
            torch.zeros(len(MAXIMA), dtype=torch.float64, device=device),
            torch.zeros(len(QUANTILES), _BINS, dtype=torch.int64, device=device),
        )

    def __add__(self, other: LossMetrics) -> LossMetrics:
        return LossMetrics(self.sums + other.sums, torch.maximum(self.maxima, other.maxima), self.counts + other.counts)

    def cpu(self) -> LossMetrics:
        return LossMetrics(self.sums.cpu(), self.maxima.cpu(), self.counts.cpu())

    def of_all(self, ranks: Ranks) -> LossMetrics:
        """Over all ranks, on every rank; for tensors on the CPU, which are changed."""
        return LossMetrics(ranks.sum_(self.sums), ranks.max_(self.maxima), ranks.sum_(self.counts))

    def add_mean(self, name: str, values_T: Tensor) -> None:
        row = self.sums[MEANS.index(name)]
        row[0] += values_T.detach().sum(dtype=torch.float64)
        row[1] += values_T.numel()

    def add_maximum(self, name: str, values_T: Tensor) -> None:
        if values_T.numel():
            cell = self.maxima[MAXIMA.index(name)]
            cell.copy_(torch.maximum(cell, values_T.detach().max()))

    def add_quantile(self, name: str, values_T: Tensor) -> None:
        """Count values in their bins; beyond the last bin they are in it. No value is NaN."""
        x_T = values_T.detach()
        bins_T = ((x_T.abs().clamp(_LEAST, _GREATEST) / _LEAST).log() / _STEP).ceil().clamp(max=_SIDE)
        bins_T = (_SIDE + torch.sign(x_T) * bins_T).long()
        self.counts[QUANTILES.index(name)].index_add_(0, bins_T, torch.ones_like(bins_T))

    def report(self) -> dict[str, float]:
        """Means, p95 and maxima by name."""
        means = {n: total / count for n, (total, count) in zip(MEANS, self.sums.tolist(), strict=True) if count}
        maxima = dict(zip(MAXIMA, self.maxima.tolist(), strict=True))
        for name, counts in zip(QUANTILES, self.counts, strict=True):
            value = _quantile(counts)
            value = math.exp(min(value, _LARGEST_LOG)) if name.startswith(_RATIO) else value
            maxima[name] = min(value, maxima[name.replace("/p95", "/max")])
        return means | {n: v for n, v in maxima.items() if f"{n.rpartition('/')[0]}/mean" in means}


def _quantile(counts: Tensor) -> float:
    """The 0.95-quantile of what was counted: the least bound of a bin that 95 % do not exceed; 0 of nothing."""
    below = counts.cumsum(0)
    place = int(torch.searchsorted(below, math.ceil(0.95 * int(below[-1])))) - _SIDE
    if not below[-1] or place == 0:
        return 0.0
    # Of the bins left of the middle the bound nearer to 0 is the upper one.
    return math.copysign(_LEAST * math.exp((abs(place) - (place < 0)) * _STEP), place)
