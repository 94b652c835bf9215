"""Loss and gradients against TRL's own GRPOTrainer on the same batch, for every combination that it takes; and proof
that the comparison notices what is wrong. The oracle is trl_oracle.py."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import trl_oracle
from trl_oracle import B, Case, Oracle, assert_equal_trl, make_rollout, our_advantages, our_loss_and_gradients

from rlx.learner.microbatches.batching import MicroBatch, Sample
from rlx.learner.objective import losses as losses_module
from rlx.learner.objective.advantages import AdvantageOptions
from rlx.learner.objective.entropy import EntropyBonus
from rlx.learner.objective.losses import LossOptions


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    with pytest.warns(UserWarning, match="rollout_func"):
        oracle = Oracle(tmp_path_factory.mktemp("trl"))
    return oracle


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
LEVELS = ("token", "sequence")
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
SCALES: tuple[Any, ...] = ("group", "batch", "none")
OURS_ALONE = {"off_policy_masked_fraction", "sampling/importance_sampling_ratio/masked_fraction",
              "sampling/importance_sampling_ratio/truncated_fraction", "sampling/importance_sampling_ratio/p95",
              "sampling/sampling_logp_difference/p95"}  # fmt: skip


def sampled_cases(rounds: int) -> list[Case]:
    """Every loss with every level and correction that TRL takes together, `rounds` times; the rest is drawn at random
    with a fixed seed."""
    rng = np.random.default_rng(0)

    def one_of(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    cases = []
    for loss_type, level, mode, _ in product(LOSS_TYPES, LEVELS, (None, *MODES), range(rounds)):
        if loss_type == "vespo" and mode in ("sequence_truncate", "sequence_mask"):
            continue  # refused by TRL, and by rlx: tests/core/test_objective.py
        low, high = one_of((None, 3.0), (0.5, 2.0), (0.6, None), (0.6, 1.6))
        options = LossOptions(
            loss_type, level, one_of(0.2, 0.05), one_of(None, 0.28, 1.2), one_of(None, 1.5), one_of(0.0, 0.04),
            one_of(True, False), mode is not None, mode or "token_truncate", low, high, one_of(None, 0.1, 0.05),
            one_of(1.0, 1.3), one_of(1.05, 2.0), one_of(2.0, 1.0), one_of(3.0, 1.5), one_of(3.0, 0.5), one_of(2.0, 0.5),
        )  # fmt: skip
        advantages = one_of(
            *(AdvantageOptions(scale_rewards=s) for s in SCALES), AdvantageOptions(normalize_then_sum=True)
        )
        share, coef = one_of(1.0, 1.0, 0.6, 0.8), one_of(0.0, 0.0, 0.05)
        in_turns = one_of(True, False)
        cases.append(Case(advantages, one_of(True, False), options, one_of(1, 2), 1, in_turns, share, coef))
    return cases


@pytest.mark.parametrize(
    "case", sampled_cases(rounds=2), ids=lambda c: f"{c.options.loss_type}-{c.options.importance_sampling_level}"
)
def test_loss_and_gradients_equal_trl(oracle: Oracle, case: Case) -> None:
    assert_equal_trl(case, oracle)


@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("scale_rewards", SCALES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_with_every_scaling_equals_trl(
    oracle: Oracle, loss_type: Any, scale_rewards: Any, mask_truncated: bool
) -> None:
    assert_equal_trl(Case(AdvantageOptions("group", scale_rewards), mask_truncated, LossOptions(loss_type)), oracle)


@pytest.mark.parametrize(
    "options",
    [
        LossOptions(epsilon=0.1, epsilon_high=0.28),
        LossOptions(beta=0.04, use_bias_correction_kl=False),
        LossOptions(beta=0.04, importance_sampling_level="sequence"),
        LossOptions(vllm_importance_sampling_clip_min=0.5, vllm_importance_sampling_clip_max=2.0),
        LossOptions(vllm_importance_sampling_clip_min=0.5, vllm_importance_sampling_clip_max=None),
        LossOptions(off_policy_mask_threshold=0.02, vllm_importance_sampling_correction=False),
        LossOptions(vllm_importance_sampling_mode="sequence_mask", vllm_importance_sampling_clip_max=None),
    ],
)
def test_each_other_option_means_what_it_means_in_trl(oracle: Oracle, options: LossOptions) -> None:
    assert_equal_trl(Case(options=options), oracle)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_an_environment_said_is_left_out_as_in_trl(oracle: Oracle, loss_type: Any, level: Any) -> None:
    options = LossOptions(loss_type, level, beta=0.04, off_policy_mask_threshold=0.1)
    assert_equal_trl(Case(options=options, in_turns=True), oracle)


@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize(("share", "coef"), [(0.23, 0.0), (0.0, 0.0), (1.0, 0.05), (0.23, 0.05), (1.0, -0.05)])
@pytest.mark.parametrize("loss_type", ["dapo", "luspo"])
def test_the_terms_of_entropy_equal_trl(
    oracle: Oracle, loss_type: Any, share: float, coef: float, mask_truncated: bool
) -> None:
    options = LossOptions(loss_type, beta=0.04)
    assert_equal_trl(Case(AdvantageOptions(), mask_truncated, options, 2, 1, False, share, coef), oracle)


def test_the_adapted_coefficient_follows_trl_s(oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    trl, found, expected = oracle.trl, [], []
    bonus = EntropyBonus(0.01, adaptive=True, delta=0.004, least=0.004, greatest=0.017)
    monkeypatch.setattr(trl, "use_adaptive_entropy", True)
    trl.args.entropy_coef_delta, trl.args.entropy_coef_min, trl.args.entropy_coef_max = 0.004, 0.004, 0.017
    case = Case(entropy_coef=0.01)
    trl._last_world_entropy, coefficient = math.inf, case.entropy_coef
    for target in (4.0, 4.0, 4.0, 1.0, 1.0, 1.0, 1.0, 4.0):
        trl.args.entropy_target = bonus.target = target
        applied = bonus.applied
        assert_equal_trl(replace(case, entropy_coef=applied), oracle, coefficient)
        coefficient = trl.entropy_coef
        bonus.adapt(trl._last_world_entropy)
        expected.append(coefficient)
        found.append(bonus.coefficient)
    assert found == pytest.approx(expected)
    assert found == pytest.approx([0.014, 0.017, 0.017, 0.013, 0.009, 0.005, 0.004, 0.008])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("correction", [False, True])
def test_the_present_policy_as_old_policy_equals_trl(oracle: Oracle, correction: bool, level: Any) -> None:
    options = LossOptions("dapo", level, beta=0.04, vllm_importance_sampling_correction=correction)
    assert_equal_trl(Case(options=options, num_iterations=1), oracle)


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name != "bnpo"])
def test_the_second_pass_over_a_batch_equals_trl_s(
    oracle: Oracle, loss_type: Any, correction: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy of the first pass is the old one; one step on its gradient makes that of the second."""
    options = LossOptions(loss_type, beta=0.04, epsilon=0.02, vllm_importance_sampling_correction=correction)
    case = Case(options=options, micro_batches=2)
    first, second = copy.deepcopy(oracle.old), copy.deepcopy(oracle.old)
    monkeypatch.setattr(oracle, "new", first)
    assert_equal_trl(case, oracle)
    with torch.no_grad():
        gradients = {name: p.grad for name, p in first.named_parameters()}
        for name, parameter in second.named_parameters():
            parameter -= 0.3 * gradients[name] / flat_norm(gradients.values())
    monkeypatch.setattr(oracle, "new", second)
    assert_equal_trl(case, oracle)
    metrics = our_loss_and_gradients(case, oracle)[2].report()
    clipped = "cispo_clip_ratio" if loss_type == "cispo" else "clip_ratio/region_mean"
    assert loss_type in ("sapo", "vespo", "cispo") or metrics[clipped] > 0


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "luspo"])
def test_a_step_on_half_of_a_generation_batch_equals_trl_s(
    oracle: Oracle, loss_type: Any, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """steps_per_generation: 2, gradient_accumulation_steps: 1. The weights are those of `RolloutStream`."""
    halves, configure = trl_oracle.split_tensor_dict, oracle.configure

    def configured(case: Case) -> None:
        configure(case)
        oracle.trl.args.steps_per_generation = 2

    monkeypatch.setattr(oracle, "configure", configured)
    monkeypatch.setattr(trl_oracle, "split_tensor_dict", lambda batch, count: [halves(batch, 2)[part]])
    monkeypatch.setattr(trl_oracle, "split", lambda samples, *_: [[samples[B // 2 * part :][: B // 2]]])
    weights = trl_oracle.token_weights
    monkeypatch.setattr(trl_oracle, "token_weights", lambda *arguments: 2 * weights(*arguments))
    assert_equal_trl(Case(options=LossOptions(loss_type, beta=0.04)), oracle)


def flat_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).norm()


@pytest.mark.parametrize("mask_truncated", [False, True])
@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name != "bnpo"])
def test_accumulated_micro_batches_equal_trl_s(oracle: Oracle, loss_type: Any, mask_truncated: bool) -> None:
    options = LossOptions(loss_type, beta=0.04)
    assert_equal_trl(Case(AdvantageOptions(), mask_truncated, options, micro_batches=4), oracle)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_batches_equal_trl(oracle: Oracle, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "rollout", make_rollout(seed, oracle.old))
    assert_equal_trl(Case(options=LossOptions(beta=0.04, delta=1.5)), oracle)


@pytest.mark.parametrize(
    ("options", "trained"),
    [*((AdvantageOptions(scale_rewards=s), 11) for s in SCALES), (AdvantageOptions(normalize_then_sum=True), 12)],
)
def test_advantages_and_reward_statistics_equal_trl(oracle: Oracle, options: AdvantageOptions, trained: int) -> None:
    case = Case(options)
    _, _, batch, logged = oracle.loss_and_gradients(case)
    ours = our_advantages(case, oracle.rollout)
    torch.testing.assert_close(ours.advantages, batch["advantages"], rtol=1e-6, atol=1e-6)
    # 16, less the unscorable 6 and 13 to 15, and 12, alone in its group, which GDPO compares with the batch
    assert ours.advantages.count_nonzero() == trained
    assert [ours.reward_mean, ours.reward_std, ours.reward_std_zero_fraction] == pytest.approx(
        [logged[name][0] for name in ("reward", "reward_std", "frac_reward_zero_std")], rel=1e-5
    )


def assert_metrics_equal_trl(case: Case, oracle: Oracle, *also: str) -> dict[str, float]:
    _, _, _, logged = oracle.loss_and_gradients(case)
    report = our_loss_and_gradients(replace(case, micro_batches=4), oracle)[2].report()
    expected = {"entropy", "kl", "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"}
    expected |= {"sampling/importance_sampling_ratio/mean", "sampling/importance_sampling_ratio/max", *also}
    assert set(report) - OURS_ALONE == expected
    assert {name: report[name] for name in expected} == pytest.approx({n: logged[n][0] for n in expected}, rel=1e-4)
    return report


CLIPPING = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_metrics_equal_trl(oracle: Oracle, mask_truncated: bool) -> None:
    case = Case(mask_truncated=mask_truncated, options=LossOptions(epsilon=0.05, beta=0.04, delta=1.5))
    report = assert_metrics_equal_trl(case, oracle, *CLIPPING)
    assert mask_truncated or all(report[name] > 0.005 for name in report.keys() - OURS_ALONE)


def test_metrics_of_sequences_are_means_over_sequences_as_in_trl(oracle: Oracle) -> None:
    options = LossOptions("grpo", "sequence", 0.01, beta=0.04, vllm_importance_sampling_mode="sequence_mask")
    report = assert_metrics_equal_trl(Case(options=options), oracle, *CLIPPING)
    assert report["clip_ratio/region_mean"] > 0
    assert round(report["sampling/importance_sampling_ratio/masked_fraction"] * B, 6).is_integer()


@pytest.mark.parametrize(("loss_type", "name"), [("cispo", "cispo_clip_ratio"), ("vespo", "vespo/phi_seq_mean")])
def test_metrics_of_other_losses_equal_trl(oracle: Oracle, loss_type: Any, name: str) -> None:
    report = assert_metrics_equal_trl(Case(options=LossOptions(loss_type, beta=0.04)), oracle, name)
    assert report[name] > 0


def shifted(batch: MicroBatch) -> MicroBatch:
    return replace(batch, col_T=(batch.col_T - 1).clamp(min=0), first_col=0)


MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "the advantage's sign": (losses_module, "_objective", lambda f: lambda *a: -f(*a)),
    "a mask that ends one token early": (Sample, "trained", lambda f: property(lambda s: f.func(s)[:-1])),
    "a mask that begins one token late": (Sample, "trained", lambda f: property(lambda s: f.func(s)[1:])),
    "log-probabilities of the token before": (trl_oracle, "collate", lambda f: lambda part: shifted(f(part))),
    "the sampler's log-probabilities off by one": (
        losses_module, "importance_ratio", lambda f: lambda old, sampling, *a: f(old, sampling.roll(1), *a),
    ),
    "a wrong normalisation": (trl_oracle, "token_weights", lambda f: lambda *a: f(*a) * 1.001),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_comparison_with_trl_notices(
    oracle: Oracle, name: str, loss_type: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(options=LossOptions(loss_type))
    owner, attribute, mutated = MUTATIONS[name]
    if loss_type == "vespo" and attribute == "_objective":
        attribute, mutated = "gamma_weight", lambda f: lambda *a: -f(*a)
    assert_equal_trl(case, oracle)
    monkeypatch.setattr(owner, attribute, mutated(getattr(owner, attribute)))
    with pytest.raises(AssertionError):
        assert_equal_trl(case, oracle)
