"""What the loss does with the policy's entropy: train the tokens where it is high, and reward it.

Both look at an optimizer step as a whole, over all ranks and micro-batches.
Shapes: T trained tokens of a micro-batch.
Not here: how entropies enter the loss (`losses.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlx.config import Config
from rlx.learner.ranks import Ranks


def high_entropy(entropies: list[Tensor], share: float, ranks: Ranks) -> list[Tensor]:
    """For each micro-batch of this rank, given its entropies [T], a bool [T]: the tokens of the highest `share` of the
    whole step ("Beyond the 80/20 Rule", arXiv 2506.01939). TRL takes the share of one micro-batch of all ranks."""
    local = torch.cat([part.detach().float().cpu() for part in entropies])
    counts = torch.zeros(ranks.size, dtype=torch.int64)
    counts[ranks.rank] = local.numel()
    ranks.sum_(counts)
    start = int(counts[: ranks.rank].sum())
    everyone = torch.zeros(int(counts.sum()))
    everyone[start : start + local.numel()] = local
    ranks.sum_(everyone)
    threshold = float(np.quantile(everyone.numpy(), 1 - share)) if everyone.numel() else 0.0
    return [part >= threshold for part in entropies]


@dataclass
class EntropyBonus:
    """The coefficient c of the term -c · (mean entropy of the step), fixed or adapted after every step: up by `delta`
    where the entropy was at or below `target`, else down; used only in a step after which it was (Skywork-OR1, arXiv
    2505.22312)."""

    coefficient: float
    adaptive: bool = False
    target: float = 0.2
    """Nats per token"""
    delta: float = 0.005
    least: float = 0.0
    greatest: float = 1.0
    last_entropy: float = math.inf
    """Of the step before; infinite before the first, so that nothing is rewarded unmeasured"""

    @staticmethod
    def of(config: Config) -> EntropyBonus:
        trl = config.trl
        return EntropyBonus(
            trl.entropy_coef, trl.use_adaptive_entropy, trl.entropy_target, trl.entropy_coef_delta,
            trl.entropy_coef_min, trl.entropy_coef_max,
        )  # fmt: skip

    @property
    def applied(self) -> float:
        """The coefficient of the present step."""
        return 0.0 if self.adaptive and self.last_entropy > self.target else self.coefficient

    def adapt(self, entropy: float) -> None:
        """Call it after each step with the mean entropy of that step's tokens."""
        if not self.adaptive:
            return
        self.last_entropy = entropy
        if entropy <= self.target:
            self.coefficient = min(self.coefficient + self.delta, self.greatest)
        else:
            self.coefficient = max(self.coefficient - self.delta, self.least)

    def state(self) -> dict[str, float | None]:
        """For a checkpoint, as JSON takes it."""
        known = math.isfinite(self.last_entropy)
        return {"coefficient": self.coefficient, "last_entropy": self.last_entropy if known else None}

    def restore(self, state: dict[str, float | None]) -> None:
        coefficient, last = state["coefficient"], state["last_entropy"]
        assert coefficient is not None
        self.coefficient, self.last_entropy = coefficient, math.inf if last is None else last
