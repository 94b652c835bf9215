"""What a loss measures beside its value: sums and maxima that can be added over micro-batches and ranks.

Shapes: T values of a micro-batch, one per token, or one per sequence where a quantity belongs to the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MEANS = (
    "entropy",
    "kl",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "cispo_clip_ratio",
    "vespo/phi_seq_mean",
    "off_policy_masked_fraction",
    "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/masked_fraction",
    "sampling/sampling_logp_difference/mean",
)
MAXIMA = ("sampling/importance_sampling_ratio/max", "sampling/sampling_logp_difference/max")


@dataclass(frozen=True)
class LossMetrics:
    """TRL's names, and two fractions of our own. A row of `MEANS` that was not measured has count 0 and is left out
    of the report."""

    sums: Tensor
    """float64 [len(MEANS), 2]: sum and count of tokens or sequences; reduce with SUM"""
    maxima: Tensor
    """float64 [len(MAXIMA)], of values that are never negative; reduce with MAX"""

    @staticmethod
    def zero(device: torch.device | str = "cpu") -> LossMetrics:
        sums = torch.zeros(len(MEANS), 2, dtype=torch.float64, device=device)
        return LossMetrics(sums, torch.zeros(len(MAXIMA), dtype=torch.float64, device=device))

    def __add__(self, other: LossMetrics) -> LossMetrics:
        return LossMetrics(self.sums + other.sums, torch.maximum(self.maxima, other.maxima))

    def add_mean(self, name: str, values_T: Tensor) -> None:
        row = self.sums[MEANS.index(name)]
        row[0] += values_T.detach().sum(dtype=torch.float64)
        row[1] += values_T.numel()

    def add_maximum(self, name: str, values_T: Tensor) -> None:
        if values_T.numel():
            cell = self.maxima[MAXIMA.index(name)]
            cell.copy_(torch.maximum(cell, values_T.detach().max()))

    def report(self) -> dict[str, float]:
        """Means and maxima by name."""
        means = {n: total / count for n, (total, count) in zip(MEANS, self.sums.tolist(), strict=True) if count}
        maxima = dict(zip(MAXIMA, self.maxima.tolist(), strict=True))
        return means | {n: v for n, v in maxima.items() if n.replace("/max", "/mean") in means}
