"""TRL's own GRPOTrainer as an oracle: loss and gradients of its real code on a given batch, beside ours on the same.

Its rollout function, rewards, advantages, old and reference log-probabilities, importance ratios and loss all run; only
its sampler and its reward values are replayed.
Shapes: B sequences, F reward functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from rlx.learner.microbatches.batching import Sample, collate
from rlx.learner.microbatches.logprobs import completion_logprobs
from rlx.learner.microbatches.splitting import split
from rlx.learner.objective.advantages import AdvantageOptions, Advantages, group_advantages
from rlx.learner.objective.entropy import high_entropy
from rlx.learner.objective.loss_metrics import LossMetrics
from rlx.learner.objective.losses import LossOptions, policy_loss, token_weights
from rlx.learner.ranks import Ranks

GROUP, B, VOCAB, EOS, MAX_LENGTH, TEMPERATURE = 4, 16, 40, 1, 9, 0.7
REWARD_WEIGHTS = [1.0, 0.5]
RTOL = 1e-5
SOFT_WEIGHTS = (
    "sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    advantages: AdvantageOptions = field(default_factory=AdvantageOptions)
    mask_truncated: bool = False
    options: LossOptions = field(default_factory=LossOptions)
    num_iterations: int = 2
    """1: the old policy is the present one, unless the correction needs it computed"""
    micro_batches: int = 1
    in_turns: bool = False
    """An environment said what is not in `Rollout.sampled`"""
    entropy_share: float = 1.0
    entropy_coef: float = 0.0


@dataclass
class Rollout:
    """B completions with what TRL's rollout and reward functions are to return for them."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[float | None]]
    rewards: list[list[float | None]]
    """[F][B]"""

    @property
    def sampled(self) -> list[list[int]]:
        """1 for tokens of the policy: all but every third, and the last."""
        return [[int(i % 3 != 1 or i == len(ids) - 1) for i in range(len(ids))] for ids in self.completion_ids]

    @property
    def truncated(self) -> list[bool]:
        return [ids[-1] != EOS for ids in self.completion_ids]

    def rewards_BF(self) -> torch.Tensor:
        return torch.tensor([[float("nan") if r is None else r for r in column] for column in self.rewards]).T


def make_rollout(seed: int, old: torch.nn.Module) -> Rollout:
    """Lengths from 1 to MAX_LENGTH, half ended by EOS (the padding id too), unknown log-probabilities, rewards that do
    not apply: one function for one sample, all functions for one sample, all but one sample of the last group."""
    rng = np.random.default_rng(seed)
    prompts = [p for p in (rng.integers(2, VOCAB, rng.integers(1, 6)).tolist() for _ in range(B // GROUP))]
    completions = [rng.integers(2, VOCAB, n).tolist() for n in [1, MAX_LENGTH, *rng.integers(2, MAX_LENGTH, B - 2)]]
    for ids in completions[::2]:
        ids[-1] = EOS
    rewards: list[list[float | None]] = rng.normal(size=(2, B)).tolist()
    rewards[0][1] = rewards[0][6] = rewards[1][6] = None
    for row in range(B - GROUP + 1, B):
        rewards[0][row] = rewards[1][row] = None
    return Rollout([prompts[i // GROUP] for i in range(B)], completions, near(old, prompts, completions, rng), rewards)


def near(
    old: torch.nn.Module, prompts: list[list[int]], completions: list[list[int]], rng: np.random.Generator
) -> list[list[float | None]]:
    """What a sampler close to `old` may have said of the completions; two tokens unknown."""
    logprobs: list[list[float | None]] = []
    for row, ids in enumerate(completions):
        sequence = torch.tensor([prompts[row // GROUP] + ids])
        with torch.no_grad():
            table = (old(sequence).logits[0, -len(ids) - 1 : -1] / TEMPERATURE).log_softmax(-1)
        exact = table.gather(1, torch.tensor(ids)[:, None])[:, 0]
        logprobs.append(
            [value + noise for value, noise in zip(exact.tolist(), rng.normal(0, 0.3, len(ids)), strict=True)]
        )
    logprobs[1][2] = logprobs[2][0] = None
    return logprobs


class Oracle:
    """One real GRPOTrainer with three sets of weights: old and new policy, reference."""

    def __init__(self, folder: Path):
        torch.manual_seed(0)
        tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
        config = Qwen2Config(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.15,
            bos_token_id=None, eos_token_id=EOS, pad_token_id=EOS,
        )  # fmt: skip
        self.old, self.new, self.ref = (Qwen2ForCausalLM(config) for _ in range(3))
        for model in (self.new, self.ref):
            state = {k: v + 0.02 * torch.randn_like(v) for k, v in self.old.state_dict().items()}
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
            model.load_state_dict(state)
        self.old.save_pretrained(folder / "model")
        self.rollout, self.in_turns = make_rollout(0, self.old), False
        args = GRPOConfig(
            output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
            per_device_train_batch_size=B, num_generations=GROUP, max_completion_length=MAX_LENGTH, beta=0.04,
            temperature=TEMPERATURE, reward_weights=REWARD_WEIGHTS, vllm_importance_sampling_mode="token_truncate",
        )  # fmt: skip
        self.trl = GRPOTrainer(
            model=str(folder / "model"),
            reward_funcs=[lambda **_: self.rollout.rewards[0], lambda **_: self.rollout.rewards[1]],
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["t2"] * B}),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t1", pad_token="t1"),
            rollout_func=lambda prompts, trainer: {
                "prompt_ids": self.rollout.prompt_ids,
                "completion_ids": self.rollout.completion_ids,
                "logprobs": self.rollout.logprobs,
                **({"env_mask": self.rollout.sampled} if self.in_turns else {}),
            },
        )
        self.trl.ref_model.load_state_dict(self.ref.state_dict())
        # The rollout function stands for vLLM; "already loaded" keeps TRL from sending weights to it.
        self.trl.use_vllm, self.trl._last_loaded_step = True, 0

    def configure(self, case: Case) -> None:
        trl, options = self.trl, case.options
        self.in_turns = case.in_turns
        trl.loss_type, trl.beta = options.loss_type, options.beta
        trl.scale_rewards = case.advantages.scale_rewards
        both = "normalize_then_sum", "sum_then_normalize"
        trl.multi_objective_aggregation = both[0] if case.advantages.normalize_then_sum else both[1]
        trl.importance_sampling_level = options.importance_sampling_level
        trl.mask_truncated_completions, trl.num_iterations = case.mask_truncated, case.num_iterations
        trl.epsilon_low = options.epsilon
        trl.epsilon_high = options.epsilon if options.epsilon_high is None else options.epsilon_high
        for name in ("delta", "use_bias_correction_kl", *SOFT_WEIGHTS):
            setattr(trl.args, name, getattr(options, name))
        trl.off_policy_mask_threshold = options.off_policy_mask_threshold
        trl.top_entropy_quantile, trl.entropy_coef = case.entropy_share, case.entropy_coef
        trl._entropy_bonus_enabled = case.entropy_coef != 0
        trl.vllm_importance_sampling_correction = options.vllm_importance_sampling_correction
        trl.vllm_importance_sampling_mode = options.vllm_importance_sampling_mode
        trl.vllm_importance_sampling_clip_min = options.vllm_importance_sampling_clip_min
        trl.vllm_importance_sampling_clip_max = options.vllm_importance_sampling_clip_max
        trl.args.gradient_accumulation_steps = trl.current_gradient_accumulation_steps = case.micro_batches
        trl.args.steps_per_generation = case.micro_batches

    def loss_and_gradients(
        self, case: Case, adapted_coef: float | None = None
    ) -> tuple[float, torch.Tensor, dict[str, Any], dict[str, list[float]]]:
        """`adapted_coef` is the state of TRL's adaptive coefficient, which decides itself whether it applies."""
        self.configure(case)
        if adapted_coef is not None:
            self.trl.entropy_coef, self.trl._entropy_bonus_enabled = adapted_coef, True
        self.trl._metrics["train"].clear()
        model = self.trl.model.train()
        model.load_state_dict(self.old.state_dict())
        batch = self.trl._generate_and_score_completions([{"prompt": "t2"}] * B)
        model.load_state_dict(self.new.state_dict())
        model.zero_grad()
        total = 0.0
        for part in split_tensor_dict(batch, case.micro_batches):
            loss = self.trl._compute_loss(model, part)
            loss.backward()
            total += loss.item()
        return total, flat_gradient(model), batch, dict(self.trl._metrics["train"])


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def our_advantages(case: Case, rollout: Rollout) -> Advantages:
    return group_advantages(rollout.rewards_BF(), torch.tensor(REWARD_WEIGHTS), GROUP, case.advantages)


def our_weights(case: Case, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([sum(mask) if case.in_turns else len(mask) for mask in rollout.sampled])
    masked = torch.tensor(rollout.truncated) & case.mask_truncated
    return token_weights(case.options.loss_type, lengths, MAX_LENGTH, masked), lengths


def our_loss_and_gradients(case: Case, oracle: Oracle) -> tuple[float, torch.Tensor, LossMetrics]:
    rollout, options = oracle.rollout, case.options
    masked = torch.tensor(rollout.truncated) & case.mask_truncated
    weights, _ = our_weights(case, rollout)
    advantages = our_advantages(case, rollout).advantages
    samples = [
        Sample(
            np.array(rollout.prompt_ids[i], np.int32),
            np.array(rollout.completion_ids[i], np.int32),
            np.array(rollout.logprobs[i], np.float32),
            advantages[i].item(),
            weights[i].item(),
            bool(masked[i]),
            np.array(rollout.sampled[i], bool) if case.in_turns else None,
        )
        for i in range(B)
    ]
    oracle.new.zero_grad()
    total, metrics = 0.0, LossMetrics.zero()
    for part in split(samples, 1, case.micro_batches)[0]:
        batch = collate(part)
        logprobs, entropies = completion_logprobs(oracle.new, batch, TEMPERATURE, entropy_gradient=True)
        assert entropies is not None
        high = high_entropy([entropies], case.entropy_share, Ranks(1))[0] if case.entropy_share < 1 else None
        entropy_weight = case.entropy_coef / max(1, len(logprobs) if high is None else int(high.sum()))
        with torch.no_grad():
            on_policy = case.num_iterations == 1 and not options.vllm_importance_sampling_correction
            old = None if on_policy else completion_logprobs(oracle.old, batch, TEMPERATURE, False)[0]
            ref = completion_logprobs(oracle.ref, batch, TEMPERATURE, False)[0] if options.beta else None
        out = policy_loss(
            logprobs, old, ref, batch.sampling_logprobs_T, batch.advantages_T, batch.weights_T, batch.lengths_B,
            options, entropies, high, entropy_weight,
        )  # fmt: skip
        out.loss.backward()
        total, metrics = total + out.loss.item(), metrics + out.metrics
    return total, flat_gradient(oracle.new), metrics


def size_of_terms(case: Case, rollout: Rollout) -> float:
    """Σ w·|A|, what the loss would be if all terms had one sign and ratios were 1; times the typical -log π where the
    terms hold that."""
    weights, lengths = our_weights(case, rollout)
    size = (weights * lengths * our_advantages(case, rollout).advantages.abs()).sum().item()
    return size * math.log(VOCAB) if case.options.loss_type in ("cispo", "vespo") else size


def assert_equal_trl(case: Case, oracle: Oracle, adapted_coef: float | None = None) -> None:
    loss, gradient, _, _ = oracle.loss_and_gradients(case, adapted_coef)
    our_loss, our_gradient, _ = our_loss_and_gradients(case, oracle)
    # A loss is a sum of signed terms: where they cancel, the error is measured against the terms.
    assert our_loss == pytest.approx(loss, rel=RTOL, abs=RTOL / 10 * size_of_terms(case, oracle.rollout))
    assert gradient.norm() > 1e-3
    assert (our_gradient - gradient).norm() < RTOL * gradient.norm()
