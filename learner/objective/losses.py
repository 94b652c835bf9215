"""The policy loss: Σ_t w_t · loss_t over the trained tokens of a whole optimizer step.

The token weights w depend on nothing but the completion lengths of that step, so they are known before the first
forward (`token_weights`) and the sum can be cut into micro-batches and ranks anywhere (`policy_loss`), as long as a
sequence stays whole.

Shapes: E completions (episodes) of one optimizer step, over all ranks and micro-batches; of a micro-batch, B sequences
and T trained tokens.
Not here: the factors of the loss (`loss_terms.py`), log-probabilities (`microbatches/logprobs.py`), advantages
(`advantages.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlx.learner.objective.loss_metrics import LossMetrics
from rlx.learner.objective.loss_terms import Sequences, gamma_weight, importance_ratio, kl_k3, on_policy_enough

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
Level = Literal["token", "sequence"]
CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(frozen=True)
class LossOptions:
    """Names, meanings and defaults are those of TRL's `GRPOConfig`, except the default mode of the correction."""

    loss_type: LossType = "dapo"
    """The objective of a token; `token_weights` has the normalisation that belongs to it"""
    importance_sampling_level: Level = "token"
    """The ratio to the old policy: of each token, or the geometric mean over the sequence for all its tokens (GSPO)"""
    epsilon: float = 0.2
    """The ratio to the old policy is clipped from below at 1 - epsilon ..."""
    epsilon_high: float | None = None
    """... and from above at 1 + epsilon_high; None means epsilon. With cispo the upper bound itself"""
    delta: float | None = None
    """Bound of the ratio where clipping leaves it free, which is above and with a negative advantage"""
    beta: float = 0.0
    """Coefficient of the KL term"""
    use_bias_correction_kl: bool = True
    """Multiply the KL term by the ratio to the old policy"""
    vllm_importance_sampling_correction: bool = True
    """Multiply the objective, not the KL term, by `loss_terms.importance_ratio`"""
    vllm_importance_sampling_mode: CorrectionMode = "token_truncate"
    vllm_importance_sampling_clip_min: float | None = None
    vllm_importance_sampling_clip_max: float | None = 3.0
    off_policy_mask_threshold: float | None = None
    """Nats per token: see `loss_terms.on_policy_enough`"""
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0


@dataclass(frozen=True)
class LossOutput:
    loss: Tensor
    """Scalar: what these tokens add to the step's loss"""
    metrics: LossMetrics


def token_weights(
    loss_type: LossType, completion_lengths: Tensor, max_completion_length: int, masked: Tensor | None = None
) -> Tensor:
    """Weight, float32 [E], of each token of each completion, from all E completions of an optimizer step.

    - grpo, sapo: 1 / (E · L_i), the mean over completions of the mean over tokens (arXiv 2402.03300, eq. 3)
    - dr_grpo: 1 / (E · max_completion_length), which favours no length (Dr. GRPO, arXiv 2503.20783)
    - dapo, bnpo, cispo, vespo: 1 / Σ L, every token alike (DAPO, arXiv 2503.14476). TRL's bnpo takes Σ L of each
      micro-batch, so that its loss changes with micro_batch_size; here it is the step's, which is dapo.
    - luspo: 1 / E, the mean over completions of the sum over tokens (LUSPO, arXiv 2602.05261)

    `completion_lengths` int [E], in tokens. A completion in `masked` bool [E] weighs 0; E still
    counts it, Σ L does not.
    """
    lengths_E = completion_lengths.double()
    if masked is not None:
        lengths_E = lengths_E.masked_fill(masked, 0.0)
    count = len(lengths_E)
    if loss_type in ("grpo", "sapo"):
        weights_E = 1 / (count * lengths_E.clamp(min=1))
    elif loss_type == "dr_grpo":
        weights_E = torch.full_like(lengths_E, 1 / (count * max_completion_length))
    elif loss_type == "luspo":
        weights_E = torch.full_like(lengths_E, 1 / count)
    else:
        weights_E = torch.ones_like(lengths_E) / lengths_E.sum().clamp(min=1)
    return weights_E.masked_fill(lengths_E == 0, 0.0).float()


def policy_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor | None,
    ref_logprobs_T: Tensor | None,
    sampling_logprobs_T: Tensor | None,
    advantages_T: Tensor,
    weights_T: Tensor,
    lengths_B: Tensor,
    options: LossOptions,
    entropies_T: Tensor | None = None,
    high_entropy_T: Tensor | None = None,
    entropy_weight: float = 0.0,
) -> LossOutput:
    """Σ_t w_t · (c · objective_t + beta · KL_t) - entropy_weight · Σ_t H_t; T = 0 gives 0, with a graph.

    `old_logprobs_T` None means that π_old is the present policy; `ref_logprobs_T` is needed when beta is not 0.
    c = π_old/π_sampler, bounded: see `importance_ratio`; `sampling_logprobs_T` is needed for it, and otherwise only
    measured. `lengths_B`, int64, are the trained tokens of each whole sequence. Add up the losses of all micro-batches;
    where gradients are averaged over ranks (DDP), multiply by the number of ranks.

    `entropies_T` is H, needed where `entropy_weight` is not 0, and then with gradient. That weight is the coefficient
    of the mean entropy divided by the step's tokens. Tokens not in `high_entropy_T`, bool, have neither an objective
    nor a part in that mean; the other weights stay.
    """
    metrics = LossMetrics.zero(logprobs_T.device)
    sequences = Sequences.of(lengths_B, len(logprobs_T))
    if old_logprobs_T is None:
        old_logprobs_T = logprobs_T.detach()
    log_ratio_T = logprobs_T - old_logprobs_T
    by_sequence = options.importance_sampling_level == "sequence"
    ratio_T = (sequences.mean(log_ratio_T) if by_sequence else log_ratio_T).exp()

    if sampling_logprobs_T is not None:
        _measure_sampling_gap(metrics, old_logprobs_T, sampling_logprobs_T)
    importance_T = _correction(metrics, old_logprobs_T, sampling_logprobs_T, sequences, options)

    if options.loss_type == "vespo":
        shape, rate = (options.vespo_k_pos, options.vespo_k_neg), (options.vespo_lambda_pos, options.vespo_lambda_neg)
        phi_T = gamma_weight(log_ratio_T, importance_T, advantages_T, sequences, shape, rate)
        metrics.add_mean("vespo/phi_seq_mean", sequences.one_each(phi_T))
        loss_T = -phi_T * advantages_T * logprobs_T
    else:
        loss_T = _objective(metrics, ratio_T, logprobs_T, advantages_T, sequences, options)
        loss_T = loss_T if importance_T is None else loss_T * importance_T

    if options.off_policy_mask_threshold is not None:
        sampler_T = old_logprobs_T if sampling_logprobs_T is None else sampling_logprobs_T
        kept_T = on_policy_enough(logprobs_T, sampler_T, advantages_T, sequences, options.off_policy_mask_threshold)
        loss_T = loss_T * kept_T
        metrics.add_mean("off_policy_masked_fraction", sequences.one_each(~kept_T))

    if high_entropy_T is not None:
        loss_T = loss_T * high_entropy_T

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
    loss = (loss_T * weights_T).sum()
    if entropy_weight != 0.0:
        if entropies_T is None:
            raise ValueError("entropy_weight needs the entropies, with gradient")
        loss = loss - entropy_weight * (entropies_T if high_entropy_T is None else entropies_T * high_entropy_T).sum()
    return LossOutput(loss, metrics)


def _objective(
    metrics: LossMetrics,
    ratio_T: Tensor,
    logprobs_T: Tensor,
    advantages_T: Tensor,
    sequences: Sequences,
    options: LossOptions,
) -> Tensor:
    """The negative objective [T] of each token, and how often it was clipped.

    - grpo, bnpo, dr_grpo, dapo, luspo: min(r·A, clip(r)·A) (arXiv 2402.03300, eq. 3), DAPO's upper bound of its own
    - cispo: min(r, epsilon_high)·A·log π, the bounded ratio without gradient (MiniMax-M1, arXiv 2506.13585)
    - sapo: sigmoid(τ·(r - 1))·A·4/τ, τ by the sign of A, a soft bound of the ratio (SAPO, arXiv 2511.20347)
    """
    low, high = 1 - options.epsilon, options.epsilon if options.epsilon_high is None else options.epsilon_high
    if options.loss_type == "sapo":
        tau_T = torch.where(advantages_T > 0, options.sapo_temperature_pos, options.sapo_temperature_neg)
        return -torch.sigmoid(tau_T * (ratio_T - 1)) * 4 / tau_T * advantages_T

    def measure(name: str, is_clipped_T: Tensor) -> None:
        by_sequence = options.importance_sampling_level == "sequence"
        metrics.add_mean(name, sequences.one_each(is_clipped_T) if by_sequence else is_clipped_T)

    if options.loss_type == "cispo":
        measure("cispo_clip_ratio", (ratio_T > high) & (advantages_T > 0))
        return -ratio_T.detach().clamp(max=high) * advantages_T * logprobs_T

    high += 1
    bounded_T = ratio_T if options.delta is None else ratio_T.clamp(max=options.delta)
    is_low_T, is_high_T = (bounded_T < low) & (advantages_T < 0), (bounded_T > high) & (advantages_T > 0)
    measure("clip_ratio/low_mean", is_low_T)
    measure("clip_ratio/high_mean", is_high_T)
    measure("clip_ratio/region_mean", is_low_T | is_high_T)
    return -torch.min(bounded_T * advantages_T, ratio_T.clamp(low, high) * advantages_T)


def _correction(
    metrics: LossMetrics,
    old_logprobs_T: Tensor,
    sampling_logprobs_T: Tensor | None,
    sequences: Sequences,
    options: LossOptions,
) -> Tensor | None:
    """`importance_ratio`, measured; None where it is switched off."""
    if not options.vllm_importance_sampling_correction:
        return None
    if sampling_logprobs_T is None:
        raise ValueError("vllm_importance_sampling_correction needs the sampling log-probabilities; set it to false")
    mode = options.vllm_importance_sampling_mode
    importance_T = importance_ratio(
        old_logprobs_T, sampling_logprobs_T, sequences, mode,
        options.vllm_importance_sampling_clip_min, options.vllm_importance_sampling_clip_max,
    )  # fmt: skip
    measured = sequences.one_each(importance_T) if mode.startswith("sequence") else importance_T
    metrics.add_mean("sampling/importance_sampling_ratio/mean", measured)
    metrics.add_quantile("sampling/importance_sampling_ratio/p95", measured.log())
    metrics.add_maximum("sampling/importance_sampling_ratio/max", measured)
    if mode.endswith("mask"):
        metrics.add_mean("sampling/importance_sampling_ratio/masked_fraction", measured == 0)
    else:
        low, high = options.vllm_importance_sampling_clip_min, options.vllm_importance_sampling_clip_max
        at_a_bound = (measured <= (0 if low is None else low)) | (measured >= (math.inf if high is None else high))
        metrics.add_mean("sampling/importance_sampling_ratio/truncated_fraction", at_a_bound)
    return importance_T


def _measure_sampling_gap(metrics: LossMetrics, old_logprobs_T: Tensor, sampling_logprobs_T: Tensor) -> None:
    gap_T = (old_logprobs_T - sampling_logprobs_T).detach().abs()
    gap_T = gap_T[~gap_T.isnan()]
    metrics.add_mean("sampling/sampling_logp_difference/mean", gap_T)
    metrics.add_quantile("sampling/sampling_logp_difference/p95", gap_T)
    metrics.add_maximum("sampling/sampling_logp_difference/max", gap_T)
