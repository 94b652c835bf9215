"""Loss and gradients against TRL's own GRPOTrainer on the same batch, through its real code: rollout function, rewards,
advantages, old and reference log-probabilities, importance ratios, loss. Only its sampler and rewards are replayed.

Shapes: B sequences, F reward functions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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

from rlx.learner.advantages import Advantages, group_advantages
from rlx.learner.batching import Sample, collate, split
from rlx.learner.logprobs import completion_logprobs
from rlx.learner.losses import MAXIMA, MEANS, LossMetrics, LossOptions, policy_loss, token_weights

GROUP, B, VOCAB, EOS, MAX_LENGTH, TEMPERATURE = 4, 16, 40, 1, 9, 0.7
REWARD_WEIGHTS = [1.0, 0.5]
RTOL = 1e-5


@dataclass(frozen=True)
class Case:
    loss_type: Any = "dapo"
    scale_rewards: Any = "group"
    mask_truncated: bool = False
    options: LossOptions = field(default_factory=LossOptions)
    num_iterations: int = 2
    """1: the old policy is the present one, unless the correction needs it computed"""
    micro_batches: int = 1


@dataclass
class Rollout:
    """B completions with what TRL's rollout and reward functions are to return for them."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[float | None]]
    rewards: list[list[float | None]]
    """[F][B]"""

    @property
    def truncated(self) -> list[bool]:
        return [ids[-1] != EOS for ids in self.completion_ids]

    def rewards_BF(self) -> torch.Tensor:
        return torch.tensor([[float("nan") if r is None else r for r in column] for column in self.rewards]).T


def make_rollout(seed: int) -> Rollout:
    """Lengths from 1 to MAX_LENGTH, half ended by EOS (the padding id too), unknown log-probabilities, rewards that do
    not apply: one function for one sample, all functions for one sample, all but one sample of the last group."""
    rng = np.random.default_rng(seed)
    prompts = [p for p in (rng.integers(2, VOCAB, rng.integers(1, 6)).tolist() for _ in range(B // GROUP))]
    completions = [rng.integers(2, VOCAB, n).tolist() for n in [1, MAX_LENGTH, *rng.integers(2, MAX_LENGTH, B - 2)]]
    for ids in completions[::2]:
        ids[-1] = EOS
    logprobs = [(rng.normal(-4, 1.5, len(ids))).tolist() for ids in completions]
    logprobs[1][2] = logprobs[2][0] = None
    rewards: list[list[float | None]] = rng.normal(size=(2, B)).tolist()
    rewards[0][1] = rewards[0][6] = rewards[1][6] = None
    for row in range(B - GROUP + 1, B):
        rewards[0][row] = rewards[1][row] = None
    return Rollout([prompts[i // GROUP] for i in range(B)], completions, logprobs, rewards)


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
        self.rollout = make_rollout(0)
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
            },
        )
        self.trl.ref_model.load_state_dict(self.ref.state_dict())
        # The rollout function stands for vLLM; "already loaded" keeps TRL from sending weights to it.
        self.trl.use_vllm, self.trl._last_loaded_step = True, 0

    def configure(self, case: Case) -> None:
        trl, options = self.trl, case.options
        trl.loss_type, trl.scale_rewards, trl.beta = case.loss_type, case.scale_rewards, options.beta
        trl.mask_truncated_completions, trl.num_iterations = case.mask_truncated, case.num_iterations
        trl.epsilon_low = options.epsilon
        trl.epsilon_high = options.epsilon if options.epsilon_high is None else options.epsilon_high
        trl.args.delta, trl.args.use_bias_correction_kl = options.delta, options.use_bias_correction_kl
        trl.vllm_importance_sampling_correction = options.vllm_importance_sampling_correction
        trl.vllm_importance_sampling_clip_min = options.vllm_importance_sampling_clip_min
        trl.vllm_importance_sampling_clip_max = options.vllm_importance_sampling_clip_max
        trl.args.gradient_accumulation_steps = trl.current_gradient_accumulation_steps = case.micro_batches
        trl.args.steps_per_generation = case.micro_batches

    def loss_and_gradients(self, case: Case) -> tuple[float, torch.Tensor, dict[str, Any], dict[str, list[float]]]:
        self.configure(case)
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
    return group_advantages(rollout.rewards_BF(), torch.tensor(REWARD_WEIGHTS), GROUP, case.scale_rewards)


def our_loss_and_gradients(case: Case, oracle: Oracle) -> tuple[float, torch.Tensor, LossMetrics]:
    rollout, options = oracle.rollout, case.options
    masked = torch.tensor(rollout.truncated) & case.mask_truncated
    lengths = torch.tensor([len(ids) for ids in rollout.completion_ids])
    weights = token_weights(case.loss_type, lengths, MAX_LENGTH, masked)
    advantages = our_advantages(case, rollout).advantages
    samples = [
        Sample(
            np.array(rollout.prompt_ids[i], np.int32),
            np.array(rollout.completion_ids[i], np.int32),
            np.array(rollout.logprobs[i], np.float32),
            advantages[i].item(),
            weights[i].item(),
            bool(masked[i]),
        )
        for i in range(B)
    ]
    oracle.new.zero_grad()
    total, metrics = 0.0, LossMetrics.zero()
    for part in split(samples, 1, case.micro_batches)[0]:
        batch = collate(part)
        logprobs, entropies = completion_logprobs(oracle.new, batch, TEMPERATURE)
        with torch.no_grad():
            on_policy = case.num_iterations == 1 and not options.vllm_importance_sampling_correction
            old = None if on_policy else completion_logprobs(oracle.old, batch, TEMPERATURE, False)[0]
            ref = completion_logprobs(oracle.ref, batch, TEMPERATURE, False)[0] if options.beta else None
        out = policy_loss(
            logprobs, old, ref, batch.sampling_logprobs_T, batch.advantages_T, batch.weights_T, options, entropies
        )
        out.loss.backward()
        total, metrics = total + out.loss.item(), metrics + out.metrics
    return total, flat_gradient(oracle.new), metrics


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    with pytest.warns(UserWarning, match="rollout_func"):
        oracle = Oracle(tmp_path_factory.mktemp("trl"))
    return oracle


def assert_equal_trl(case: Case, oracle: Oracle) -> None:
    loss, gradient, _, _ = oracle.loss_and_gradients(case)
    our_loss, our_gradient, _ = our_loss_and_gradients(case, oracle)
    assert our_loss == pytest.approx(loss, rel=RTOL)
    assert gradient.norm() > 1e-3
    assert (our_gradient - gradient).norm() < RTOL * gradient.norm()


@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_loss_and_gradients_equal_trl(
    oracle: Oracle,
    loss_type: str,
    beta: float,
    correction: bool,
    delta: float | None,
    scale_rewards: str,
    mask_truncated: bool,
) -> None:
    options = LossOptions(beta=beta, delta=delta, vllm_importance_sampling_correction=correction)
    assert_equal_trl(Case(loss_type, scale_rewards, mask_truncated, options), oracle)


@pytest.mark.parametrize(
    "options",
    [
        LossOptions(epsilon=0.1, epsilon_high=0.28),
        LossOptions(beta=0.04, use_bias_correction_kl=False),
        LossOptions(vllm_importance_sampling_clip_min=0.5, vllm_importance_sampling_clip_max=2.0),
        LossOptions(vllm_importance_sampling_clip_min=0.5, vllm_importance_sampling_clip_max=None),
    ],
)
def test_each_other_option_means_what_it_means_in_trl(oracle: Oracle, options: LossOptions) -> None:
    assert_equal_trl(Case(options=options), oracle)


@pytest.mark.parametrize("correction", [False, True])
def test_the_present_policy_as_old_policy_equals_trl(oracle: Oracle, correction: bool) -> None:
    options = LossOptions(beta=0.04, vllm_importance_sampling_correction=correction)
    assert_equal_trl(Case(options=options, num_iterations=1), oracle)


@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_accumulated_micro_batches_equal_trl_s(oracle: Oracle, loss_type: str, mask_truncated: bool) -> None:
    assert_equal_trl(Case(loss_type, "group", mask_truncated, LossOptions(beta=0.04), micro_batches=4), oracle)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_batches_equal_trl(oracle: Oracle, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "rollout", make_rollout(seed))
    assert_equal_trl(Case(options=LossOptions(beta=0.04, delta=1.5)), oracle)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_advantages_and_reward_statistics_equal_trl(oracle: Oracle, scale_rewards: str) -> None:
    case = Case(scale_rewards=scale_rewards)
    _, _, batch, logged = oracle.loss_and_gradients(case)
    ours = our_advantages(case, oracle.rollout)
    torch.testing.assert_close(ours.advantages, batch["advantages"], rtol=1e-6, atol=1e-6)
    assert ours.advantages.count_nonzero() == 11  # 16, less the unscorable 6 and 13 to 15, and 12, alone in its group
    assert [ours.reward_mean, ours.reward_std, ours.reward_std_zero_fraction] == pytest.approx(
        [logged[name][0] for name in ("reward", "reward_std", "frac_reward_zero_std")], rel=1e-5
    )


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_metrics_equal_trl(oracle: Oracle, mask_truncated: bool) -> None:
    case = Case(mask_truncated=mask_truncated, options=LossOptions(beta=0.04, delta=1.5), micro_batches=1)
    _, _, _, logged = oracle.loss_and_gradients(case)
    report = our_loss_and_gradients(replace(case, micro_batches=4), oracle)[2].report()
    assert set(report) == {*MEANS, *MAXIMA}
    assert report == pytest.approx({name: logged[name][0] for name in report}, rel=1e-4)
    assert mask_truncated or all(report[name] > 0.01 for name in report)
