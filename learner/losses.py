"""The policy loss: Σ_t w_t · loss_t over the trained tokens of a whole optimizer step.

The token weights w depend on nothing but the completion lengths of that step, so they are known before the first
forward (`token_weights`) and the sum can be cut into micro-batches and ranks anywhere (`policy_loss`).

Shapes: B sequences of one optimizer step, over all ranks and micro-batches; T trained tokens of a micro-batch.
Not here: log-probabilities (`logprobs.py`), advantages (`advantages.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LossType = Literal["grpo", "dr_grpo", "dapo"]

MEANS = (
    "entropy",
    "kl",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "sampling/importance_sampling_ratio/mean",
    "sampling/sampling_logp_difference/mean",
)
MAXIMA = ("sampling/importance_sampling_ratio/max", "sampling/sampling_logp_difference/max")


@dataclass(frozen=True)
class LossOptions:
    """Names, meanings and defaults are those of TRL's `GRPOConfig`; its mode of correction is `token_truncate`."""

    epsilon: float = 0.2
    """The ratio to the old policy is clipped from below at 1 - epsilon ..."""
    epsilon_high: float | None = None
    """... and from above at 1 + epsilon_high; None means epsilon"""
    delta: float | None = None
    """Bound of the ratio where clipping leaves it free, which is above and with a negative advantage"""
    beta: float = 0.0
    """Coefficient of the KL term"""
    use_bias_correction_kl: bool = True
    """Multiply the KL term by the ratio to the old policy"""
    vllm_importance_sampling_correction: bool = True
    """Multiply the clipped objective, not the KL term, by `importance_ratio`"""
    vllm_importance_sampling_clip_min: float | None = None
    vllm_importance_sampling_clip_max: float | None = 3.0


@dataclass(frozen=True)
class LossMetrics:
    """Sums that can be added over micro-batches and ranks; TRL's names. A row of `MEANS` that was not measured has
    count 0 and is left out of the report."""

    sums: Tensor
    """float64 [len(MEANS), 2]: sum and count of tokens; reduce with SUM"""
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


@dataclass(frozen=True)
class LossOutput:
    loss: Tensor
    """Scalar: what these tokens add to the step's loss"""
    metrics: LossMetrics


def token_weights(
    loss_type: LossType, completion_lengths: Tensor, max_completion_length: int, masked: Tensor | None = None
) -> Tensor:
    """Weight, float32 [B], of each token of each sequence, from all B completions of an optimizer step.

    - grpo: 1 / (B · L_i), the mean over sequences of the mean over tokens (arXiv 2402.03300, eq. 3)
    - dr_grpo: 1 / (B · max_completion_length), which favours no length (Dr. GRPO, arXiv 2503.20783)
    - dapo: 1 / Σ L, every token alike (DAPO, arXiv 2503.14476)

    `completion_lengths` int [B], in tokens. A sequence in `masked` bool [B] weighs 0; B still
    counts it, Σ L does not.
    """
    lengths_B = completion_lengths.double()
    if masked is not None:
        lengths_B = lengths_B.masked_fill(masked, 0.0)
    num_sequences = len(lengths_B)
    if loss_type == "grpo":
        weights_B = 1 / (num_sequences * lengths_B.clamp(min=1))
    elif loss_type == "dr_grpo":
        weights_B = torch.full_like(lengths_B, 1 / (num_sequences * max_completion_length))
    elif loss_type == "dapo":
        weights_B = torch.ones_like(lengths_B) / lengths_B.sum().clamp(min=1)
    else:
        raise ValueError(f"unknown loss_type {loss_type!r}: write grpo, dr_grpo or dapo")
    return weights_B.masked_fill(lengths_B == 0, 0.0).float()


def policy_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor | None,
    ref_logprobs_T: Tensor | None,
    sampling_logprobs_T: Tensor | None,
    advantages_T: Tensor,
    weights_T: Tensor,
    options: LossOptions,
    entropies_T: Tensor | None = None,
) -> LossOutput:
    """Σ_t w_t · (c · -min(r·A, clip(r)·A) + beta · KL) over the tokens given; T = 0 gives 0, with a graph.

    r = π/π_old, clipped, and KL to the reference: GRPO (arXiv 2402.03300, eq. 3), with DAPO's upper bound of its own.
    `old_logprobs_T` None means that π_old is the present policy; `ref_logprobs_T` is needed when beta is not 0.
    c = π_old/π_sampler, truncated: see `importance_ratio`; `sampling_logprobs_T` is needed for it, and otherwise only
    measured. Add up the losses of all micro-batches; where gradients are averaged over ranks (DDP), multiply by the
    number of ranks. `entropies_T` is for the metrics only.
    """
    metrics = LossMetrics.zero(logprobs_T.device)
    if old_logprobs_T is None:
        old_logprobs_T = logprobs_T.detach()
    low, high = 1 - options.epsilon, 1 + (options.epsilon if options.epsilon_high is None else options.epsilon_high)

    ratio_T = (logprobs_T - old_logprobs_T).exp()
    bounded_T = ratio_T if options.delta is None else ratio_T.clamp(max=options.delta)
    loss_T = -torch.min(bounded_T * advantages_T, ratio_T.clamp(low, high) * advantages_T)
    is_low_T = (bounded_T < low) & (advantages_T < 0)
    is_high_T = (bounded_T > high) & (advantages_T > 0)
    metrics.add_mean("clip_ratio/low_mean", is_low_T)
    metrics.add_mean("clip_ratio/high_mean", is_high_T)
    metrics.add_mean("clip_ratio/region_mean", is_low_T | is_high_T)

    if sampling_logprobs_T is not None:
        _measure_sampling_gap(metrics, old_logprobs_T, sampling_logprobs_T)
    if options.vllm_importance_sampling_correction:
        if sampling_logprobs_T is None:
            raise ValueError(
                "vllm_importance_sampling_correction needs the sampling log-probabilities; set it to false"
            )
        importance_T = importance_ratio(old_logprobs_T, sampling_logprobs_T, options)
        loss_T = loss_T * importance_T
        metrics.add_mean("sampling/importance_sampling_ratio/mean", importance_T)
        metrics.add_maximum("sampling/importance_sampling_ratio/max", importance_T)

    if options.beta != 0.0:
        if ref_logprobs_T is None:
            raise ValueError(f"beta = {options.beta} needs the log-probabilities of a reference model")
        kl_T = kl_k3(logprobs_T, ref_logprobs_T)
        if options.use_bias_correction_kl:
            kl_T = kl_T * ratio_T
        loss_T = loss_T + options.beta * kl_T
        metrics.add_mean("kl", kl_T)
    if entropies_T is not None:
        metrics.add_mean("entropy", entropies_T)
    return LossOutput((loss_T * weights_T).sum(), metrics)


def kl_k3(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """Estimate [T] of KL(π ‖ π_ref) from one sample of π per token: q - log q - 1 with q = π_ref/π.

    Unbiased and never negative: "k3" in J. Schulman's note "Approximating KL Divergence" (2020); eq. 4 of GRPO.
    """
    log_q_T = ref_logprobs_T - logprobs_T
    return log_q_T.exp() - log_q_T - 1


def importance_ratio(old_logprobs_T: Tensor, sampling_logprobs_T: Tensor, options: LossOptions) -> Tensor:
    """c = min(π_old/π_sampler, clip_max) [T] for each token, without gradient; 1 where the sampler gave NaN.

    It corrects for a sampler whose numerics (or weights) differ from the trainer's: truncated importance sampling, in
    the note "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (Yao et al., 2025).
    """
    ratio_T = (old_logprobs_T - sampling_logprobs_T).detach().nan_to_num(nan=0.0).exp()
    low, high = options.vllm_importance_sampling_clip_min, options.vllm_importance_sampling_clip_max
    return ratio_T if low is None and high is None else ratio_T.clamp(low, high)


def _measure_sampling_gap(metrics: LossMetrics, old_logprobs_T: Tensor, sampling_logprobs_T: Tensor) -> None:
    gap_T = (old_logprobs_T - sampling_logprobs_T).detach().abs()
    gap_T = gap_T[~gap_T.isnan()]
    metrics.add_mean("sampling/sampling_logp_difference/mean", gap_T)
    metrics.add_maximum("sampling/sampling_logp_difference/max", gap_T)
