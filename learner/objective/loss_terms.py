"""The factors of the policy loss, each a pure function on ragged tokens.

Shapes: B sequences of a micro-batch, T trained tokens of all of them laid end to end. What belongs to a sequence is
given to each of its tokens, [T].
Not here: how the factors make a loss (`losses.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LOG_LEAST_WEIGHT = math.log(1e-8)
_LOG_GREATEST_WEIGHT = 20.0
"""VESPO's bounds of a sequence's log weight, and of each token's share in it."""


@dataclass(frozen=True)
class Sequences:
    """Which of T tokens belong together."""

    lengths_B: Tensor
    """int64, sums to T"""
    row_T: Tensor
    """int64, the sequence of each token"""

    @staticmethod
    def of(lengths_B: Tensor, num_tokens: int) -> Sequences:
        rows = torch.arange(len(lengths_B), device=lengths_B.device)
        return Sequences(lengths_B, rows.repeat_interleave(lengths_B, output_size=num_tokens))

    def sum(self, values_T: Tensor) -> Tensor:
        """For each token the sum [T] over its sequence."""
        return values_T.new_zeros(len(self.lengths_B)).index_add(0, self.row_T, values_T)[self.row_T]

    def mean(self, values_T: Tensor) -> Tensor:
        """For each token the mean [T] over its sequence."""
        return self.sum(values_T) / self.lengths_B[self.row_T]

    def one_each(self, values_T: Tensor) -> Tensor:
        """The first token's value of each sequence that has a token."""
        starts_B = self.lengths_B.cumsum(0) - self.lengths_B
        return values_T[starts_B[self.lengths_B > 0]]


def kl_k3(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """Estimate [T] of KL(π ‖ π_ref) from one sample of π per token: q - log q - 1 with q = π_ref/π.

    Unbiased and never negative: "k3" in J. Schulman's note "Approximating KL Divergence" (2020); eq. 4 of GRPO.
    """
    log_q_T = ref_logprobs_T - logprobs_T
    return log_q_T.exp() - log_q_T - 1


def importance_ratio(
    old_logprobs_T: Tensor,
    sampling_logprobs_T: Tensor,
    sequences: Sequences,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> Tensor:
    """c = π_old/π_sampler [T], without gradient; a token where the sampler gave NaN counts as equal in both.

    It corrects for a sampler whose numerics (or weights) differ from the trainer's: truncated importance sampling, in
    the note "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (Yao et al., 2025). `mode` is of
    two parts: `token` is the ratio of each token, `sequence` the product over the sequence, for all its tokens;
    `truncate` moves what is outside [clip_min, clip_max] to the bound, `mask` sets it to 0.
    """
    unit, _, bound = mode.partition("_")
    log_ratio_T = (old_logprobs_T - sampling_logprobs_T).detach().nan_to_num(nan=0.0)
    ratio_T = (sequences.sum(log_ratio_T) if unit == "sequence" else log_ratio_T).exp()
    if bound == "mask":
        low, high = -math.inf if clip_min is None else clip_min, math.inf if clip_max is None else clip_max
        return ratio_T.masked_fill((ratio_T < low) | (ratio_T > high), 0.0)
    return ratio_T if clip_min is None and clip_max is None else ratio_T.clamp(clip_min, clip_max)


def on_policy_enough(
    logprobs_T: Tensor, sampling_logprobs_T: Tensor, advantages_T: Tensor, sequences: Sequences, threshold: float
) -> Tensor:
    """bool [T], false in the sequences that did worse than their group and have drifted: advantage below 0, and mean of
    log π_sampler - log π, in nats per token, above `threshold` (DeepSeek-V3.2, arXiv 2512.02556, eq. 9). A token where
    the sampler gave NaN counts as 0 in the mean."""
    drift_T = sequences.mean((sampling_logprobs_T - logprobs_T.detach()).nan_to_num(nan=0.0))
    return (advantages_T >= 0) | (drift_T <= threshold)


def gamma_weight(
    log_ratio_T: Tensor,
    importance_T: Tensor | None,
    advantages_T: Tensor,
    sequences: Sequences,
    shape: tuple[float, float],
    rate: tuple[float, float],
) -> Tensor:
    """φ(w) = e^λ · w^k · e^(-λw) [T] with φ(1) = 1, without gradient: VESPO (arXiv 2602.10693).

    w is the sequence's whole weight: the product of its tokens' π/π_old and, where given, π_old/π_sampler. k of `shape`
    and λ of `rate` are the first where the advantage is not negative, else the second.
    """
    log_w_T = sequences.sum(log_ratio_T.detach().clamp(-_LOG_GREATEST_WEIGHT, _LOG_GREATEST_WEIGHT))
    if importance_T is not None:
        log_w_T = log_w_T + sequences.sum(importance_T.log().clamp(_LOG_LEAST_WEIGHT, _LOG_GREATEST_WEIGHT))
    log_w_T = log_w_T.clamp(_LOG_LEAST_WEIGHT, _LOG_GREATEST_WEIGHT)
    k_T = torch.where(advantages_T >= 0, *shape)
    rate_T = torch.where(advantages_T >= 0, *rate).clamp(min=1e-4)
    return (rate_T + k_T * log_w_T - rate_T * log_w_T.exp()).exp()
