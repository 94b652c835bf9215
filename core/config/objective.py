"""The keys of `trl:` that say how rewards become a loss, and the laws between them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlx.config.section import Section

_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_LOSSES_THAT_READ: dict[str, tuple[str, ...]] = {
    "epsilon": (*_CLIPPED, "cispo"),
    "delta": _CLIPPED,
    "epsilon_high": (*_CLIPPED, "cispo"),
    **dict.fromkeys(("sapo_temperature_pos", "sapo_temperature_neg"), ("sapo",)),
    **dict.fromkeys(("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"), ("vespo",)),
}
"""Keys that the other losses would ignore."""
_KEYS_OF_A_SWITCH: dict[str, tuple[str, ...]] = {
    "use_adaptive_entropy": ("entropy_target", "entropy_coef_delta", "entropy_coef_min", "entropy_coef_max"),
    "sync_ref_model": ("ref_model_mixup_alpha", "ref_model_sync_steps"),
}


class ObjectiveKeys(Section):
    """Part of `trl:`. Names and meanings are TRL's GRPOConfig; so are the defaults, unless the key says otherwise."""

    # from rewards to advantages
    advantage_estimator: Literal["group", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"] = Field(
        "group",
        description="What a reward is compared with. group: its group's mean, divided as scale_rewards says (GRPO). rloo: the mean of the others in its group. reinforce_plus_plus: the batch's mean, divided by the batch's standard deviation. reinforce_plus_plus_baseline: its group's mean first, then the same. Not in TRL.",
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group",
        description="What the centred reward is divided by: the group's or the batch's standard deviation, or nothing. true means group, false none. Unused with normalize_then_sum.",
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] | None = Field(
        None,
        description="How several rewards are combined. sum_then_normalize: their weighted sum is one reward. normalize_then_sum: each is normalised in its group, then the weighted sum over the batch (GDPO). Default: normalize_then_sum with `rl: gdpo`, else sum_then_normalize.",
    )
    # from advantages to the loss
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"] = Field(
        "dapo",
        description="The loss of a token and how token losses are averaged. The clipped objective: grpo (per completion, then over completions), dr_grpo (by max_completion_length), dapo and bnpo (by all tokens of the step; TRL's bnpo: of the micro-batch, so that it changes with micro_batch_size), luspo (summed per completion; meant for importance_sampling_level: sequence). Averaged as dapo: cispo (bounded ratio without gradient), vespo (a smooth weight of each sequence's ratio). Averaged as grpo: sapo (a soft bound instead of clipping). To none of them a balancing loss is added for the router of a mixture of experts; TRL adds it where the model's settings have one.",
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        "token",
        description="Ratio to the old policy: of each token, or one per sequence, its geometric mean (GSPO, with loss_type: grpo). An episode of several rows has one ratio per row.",
    )
    epsilon: float = Field(0.2, ge=0, description="Lower clip range of the ratio (and upper, unless epsilon_high).")
    epsilon_high: float | None = Field(
        None,
        ge=0,
        description="Upper clip range; DAPO recommends 0.28. With cispo the bound of the ratio itself, for which ScaleRL recommends 5.0.",
    )
    delta: float | None = Field(
        None, gt=1, description="Two-sided clipping: upper bound of the ratio when the advantage is negative."
    )
    sapo_temperature_pos: float = Field(1.0, gt=0, description="Of sapo's sigmoid, where the advantage is positive.")
    sapo_temperature_neg: float = Field(1.05, gt=0, description="Of sapo's sigmoid elsewhere.")
    vespo_k_pos: float = Field(
        2.0, ge=0, description="Power of vespo's weight w^k·exp(λ(1-w)), where the advantage is not negative."
    )
    vespo_lambda_pos: float = Field(3.0, ge=0, description="Rate λ of the same.")
    vespo_k_neg: float = Field(3.0, ge=0, description="Power of vespo's weight where the advantage is negative.")
    vespo_lambda_neg: float = Field(2.0, ge=0, description="Rate of the same.")
    beta: float = Field(
        0.0,
        ge=0,
        description="Weight of the KL term (k3 estimator) against the initial model; 0 loads no reference model.",
    )
    use_bias_correction_kl: bool = Field(
        True, description="Multiply the KL estimate by the importance ratio, as TRL does."
    )
    sync_ref_model: bool = Field(
        False, description="Let the reference of the KL term follow the policy (TR-DPO). It is part of each checkpoint."
    )
    ref_model_mixup_alpha: float = Field(
        0.6, ge=0, le=1, description="Share of the policy in the new reference (Axolotl's default is 0.9)."
    )
    ref_model_sync_steps: int = Field(
        512, ge=1, description="Optimizer steps from one mixing to the next (Axolotl's default is 64)."
    )
    mask_truncated_completions: bool = Field(
        False, description="Leave completions that hit max_completion_length out of the loss."
    )
    top_entropy_quantile: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Train only this share of the step's tokens, those of the highest entropy (0.2 is usual); the KL term keeps all. Below 1 it costs one more forward pass. TRL takes the share of each micro-batch, so that it changes with micro_batch_size.",
    )
    entropy_coef: float = Field(
        0.0,
        description="Weight of a bonus on the mean entropy of the step's tokens (of those that top_entropy_quantile keeps), in nats. TRL takes the mean of each micro-batch.",
    )
    use_adaptive_entropy: bool = Field(
        False,
        description="Start with entropy_coef and change it after every step: up where the mean entropy was at or below entropy_target, else down. The bonus is applied only after a step that was at or below it.",
    )
    entropy_target: float = Field(
        0.2, description="Nats per token. Set it near the `entropy` that a run logs at its start; 0.2 is a collapse."
    )
    entropy_coef_delta: float = Field(0.005, gt=0, description="Change of entropy_coef per optimizer step.")
    entropy_coef_min: float = Field(0.0, description="Least value of it.")
    entropy_coef_max: float = Field(1.0, description="Greatest value of it.")
    # corrections of what was sampled by another policy
    vllm_importance_sampling_correction: bool = Field(
        True,
        description="Weigh by p(learner)/p(worker), bounded: corrects the small mismatch between vLLM and the learner.",
    )
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        Field(
            "token_truncate",
            description="The weight of each token, or one per sequence (the product of its tokens'); truncate moves a weight outside the bounds to the bound, mask makes it 0. TRL's default is sequence_mask; the product over a long completion leaves the bounds most easily.",
        )
    )
    vllm_importance_sampling_clip_max: float | None = Field(
        3.0, gt=0, description="Upper bound of that weight; `none` for no bound."
    )
    vllm_importance_sampling_clip_min: float | None = Field(None, ge=0, description="Lower bound of that weight.")
    vllm_importance_sampling_cap: float | None = Field(
        None, gt=0, description="Older name of vllm_importance_sampling_clip_max."
    )
    off_policy_mask_threshold: float | None = Field(
        None,
        gt=0,
        description="Leave out sequences with a negative advantage whose mean of log p(worker) - log p(learner) is above this, in nats per token (DeepSeek-V3.2). Off by default.",
    )

    @field_validator("scale_rewards", mode="before")
    @classmethod
    def booleans_mean_group_or_none(cls, value: Any) -> Any:
        return {True: "group", False: "none"}.get(value, value) if isinstance(value, bool) else value

    @field_validator("vllm_importance_sampling_clip_max", mode="before")
    @classmethod
    def none_means_no_bound(cls, value: Any) -> Any:
        return None if value == "none" else value  # a key without value means the default

    @model_validator(mode="after")
    def every_key_has_an_effect(self) -> ObjectiveKeys:
        for name, losses in _LOSSES_THAT_READ.items():
            if getattr(self, name) != type(self).model_fields[name].default and self.loss_type not in losses:
                raise ValueError(
                    f"{name} has no effect with loss_type: {self.loss_type}; remove it, or write loss_type: {losses[0]}"
                )
        for switch, names in _KEYS_OF_A_SWITCH.items():
            given = [n for n in names if getattr(self, n) != type(self).model_fields[n].default]
            if given and not getattr(self, switch):
                raise ValueError(f"{given[0]} has no effect without {switch}: true; remove it, or write that")
        if self.sync_ref_model and self.beta == 0:
            raise ValueError(
                "sync_ref_model has no reference to follow the policy at beta: 0; remove it, or raise beta"
            )
        return self

    @model_validator(mode="after")
    def the_entropy_controller_has_a_range(self) -> ObjectiveKeys:
        if self.entropy_coef_min > self.entropy_coef_max:
            raise ValueError(
                f"entropy_coef_min ({self.entropy_coef_min}) is above entropy_coef_max ({self.entropy_coef_max})"
            )
        return self

    @model_validator(mode="after")
    def an_estimator_of_its_own_scales_by_itself(self) -> ObjectiveKeys:
        if self.advantage_estimator != "group":
            for name in ("scale_rewards", "multi_objective_aggregation"):
                if name in self.model_fields_set and getattr(self, name) != "sum_then_normalize":
                    raise ValueError(
                        f"{name} belongs to advantage_estimator: group, and {self.advantage_estimator} is given; keep one"
                    )
        return self

    @model_validator(mode="after")
    def the_sampling_correction_is_bounded(self) -> ObjectiveKeys:
        low, high = self.vllm_importance_sampling_clip_min, self.is_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"vllm_importance_sampling_clip_min ({low}) must be less than vllm_importance_sampling_clip_max ({high})"
            )
        mode = self.vllm_importance_sampling_mode
        if self.vllm_importance_sampling_correction and mode.endswith("truncate") and low is None and high is None:
            raise ValueError(
                f"vllm_importance_sampling_mode: {mode} truncates nothing without a bound; give "
                "vllm_importance_sampling_clip_min or vllm_importance_sampling_clip_max"
            )
        return self

    @model_validator(mode="after")
    def vespo_corrects_by_token(self) -> ObjectiveKeys:
        mode = self.vllm_importance_sampling_mode
        if self.loss_type == "vespo" and self.vllm_importance_sampling_correction and mode.startswith("sequence"):
            raise ValueError(
                f"loss_type: vespo multiplies the tokens' weights itself, and vllm_importance_sampling_mode: {mode} has "
                "one per sequence; write token_truncate or token_mask"
            )
        return self

    @property
    def is_clip_max(self) -> float | None:
        return self.vllm_importance_sampling_cap or self.vllm_importance_sampling_clip_max
