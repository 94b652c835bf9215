"""The keys of the loss: every value of TRL loads, what TRL rejects is rejected with the reason, and gdpo is a method."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rlx.config import Config, load_config, make_plan
from rlx.errors import ConfigError


def load(folder: Path, rl: str = "grpo", **trl: object) -> Config:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"base_model": "m", "rl": rl, "datasets": [{"path": "d"}], "trl": trl}))
    return load_config(path)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_every_loss_of_trl_loads_at_both_levels(tmp_path: Path, loss_type: str, level: str) -> None:
    config = load(tmp_path, loss_type=loss_type, importance_sampling_level=level)
    assert (config.trl.loss_type, config.trl.importance_sampling_level) == (loss_type, level)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"vllm_importance_sampling_clip_min": 3.0}, "clip_min (3.0) must be less than vllm_importance_sampling_clip_max (3.0)"),
        ({"vllm_importance_sampling_clip_min": 2.0, "vllm_importance_sampling_cap": 1.5}, "(2.0) must be less than"),
        ({"vllm_importance_sampling_clip_max": "none"}, "token_truncate truncates nothing without a bound"),
        ({"loss_type": "vespo", "vllm_importance_sampling_mode": "sequence_mask"}, "write token_truncate or token_mask"),
        ({"loss_type": "cispo", "delta": 2.0}, "delta has no effect with loss_type: cispo"),
        ({"loss_type": "sapo", "epsilon_high": 0.3}, "epsilon_high has no effect with loss_type: sapo"),
        ({"loss_type": "vespo", "epsilon": 0.3}, "epsilon has no effect with loss_type: vespo"),
        ({"cast_lm_head_to_fp32": "yes please"}, "cast_lm_head_to_fp32: 'yes please' cannot be used"),
        ({"router_aux_loss_coef": 0.001}, "no balancing loss is added for the router of a mixture of experts"),
        ({"model_init_kwargs": {"revision": "a"}}, "Write `revision_of_model`"),
        ({"sapo_temperature_pos": 2.0}, "remove it, or write loss_type: sapo"),
        ({"vespo_k_neg": 1.0}, "vespo_k_neg has no effect with loss_type: dapo"),
        ({"advantage_estimator": "rloo", "scale_rewards": "group"}, "scale_rewards belongs to advantage_estimator: group"),
        ({"advantage_estimator": "rloo", "multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation belongs"),
        ({"entropy_target": 3.0}, "entropy_target has no effect without use_adaptive_entropy: true"),
        ({"use_adaptive_entropy": True, "entropy_coef_min": 2.0}, "entropy_coef_min (2.0) is above entropy_coef_max (1.0)"),
        ({"sync_ref_model": True}, "no reference to follow the policy at beta: 0"),
        ({"ref_model_sync_steps": 8, "beta": 0.1}, "ref_model_sync_steps has no effect without sync_ref_model: true"),
        ({"top_entropy_quantile": 1.5}, "top_entropy_quantile: 1.5 cannot be used"),
        ({"off_policy_mask_threshold": 0}, "off_policy_mask_threshold: 0 cannot be used"),
        ({"loss_type": "ppo"}, "loss_type: 'ppo' cannot be used"),
    ],
)  # fmt: skip
def test_combinations_that_mean_nothing_are_refused_with_the_reason(
    tmp_path: Path, keys: dict[str, object], reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **keys)
    assert reason in str(caught.value)
    assert "run.yaml" in str(caught.value)


def test_a_mask_needs_no_upper_bound_and_vespo_no_correction(tmp_path: Path) -> None:
    masked = load(
        tmp_path, vllm_importance_sampling_mode="sequence_mask", vllm_importance_sampling_clip_max="none",
        vllm_importance_sampling_clip_min=0.1,
    )  # fmt: skip
    assert masked.trl.is_clip_max is None
    assert load(tmp_path, vllm_importance_sampling_clip_max=None).trl.is_clip_max == 3.0
    load(
        tmp_path, loss_type="vespo", vllm_importance_sampling_mode="sequence_mask",
        vllm_importance_sampling_correction=False,
    )  # fmt: skip


def test_what_trl_has_by_default_and_rlx_has_not_changes_nothing(tmp_path: Path) -> None:
    off = {"router_aux_loss_coef": 0.0, "model_init_kwargs": None, "pad_to_multiple_of": "auto", "log_multimodal": True}
    assert load(tmp_path, **off, cache_implementation=None).trl.loss_type == "dapo"


def test_cispo_without_a_bound_of_its_own_deserves_a_second_look(tmp_path: Path) -> None:
    notes = make_plan(load(tmp_path, loss_type="cispo", reward_funcs=["r"])).notes
    assert any("bounds every importance ratio at epsilon (0.2), as in TRL" in note for note in notes)
    bounded = load(tmp_path, loss_type="cispo", epsilon_high=5.0, reward_funcs=["r"])
    assert not any("cispo" in note for note in make_plan(bounded).notes)


def test_gdpo_is_grpo_with_each_reward_normalised(tmp_path: Path) -> None:
    assert load(tmp_path, rl="gdpo", scale_rewards=True).normalizes_each_reward
    assert load(tmp_path, multi_objective_aggregation="normalize_then_sum").normalizes_each_reward
    assert not load(tmp_path).normalizes_each_reward
    with pytest.raises(ConfigError, match=r"rl: gdpo means trl\.multi_objective_aggregation: normalize_then_sum"):
        load(tmp_path, rl="gdpo", multi_objective_aggregation="sum_then_normalize")
    with pytest.raises(ConfigError, match=r"rl: gdpo excludes trl\.advantage_estimator: rloo"):
        load(tmp_path, rl="gdpo", advantage_estimator="rloo")
