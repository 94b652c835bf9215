"""The whole configuration: the top level with Axolotl's names, and the laws that hold between keys."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr, model_validator

from rlx.config.lora import LoraKeys
from rlx.config.output import OutputKeys
from rlx.config.sections import (
    AsyncSection,
    ClusterSection,
    DatasetSection,
    EnvSection,
    EpisodesSection,
    RewardsSection,
    ServiceSection,
    VllmSection,
)
from rlx.config.sharding import ShardingKeys
from rlx.config.trackers import TrackerKeys
from rlx.config.training import TrainingKeys
from rlx.config.trl import TrlSection


class Config(TrainingKeys, OutputKeys, LoraKeys, ShardingKeys, TrackerKeys):
    """Everything that one run needs; both commands read the same file."""

    # model
    base_model: str = Field(
        description="Hub id or local folder (absolute, relative to the YAML, or to the current folder) of the model to train."
    )
    revision_of_model: str | None = Field(None, description="Revision of a hub model.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model.")
    tokenizer_config: str | None = Field(None, description="Another hub id or folder for the tokenizer.")
    chat_template: str | None = Field(
        None,
        description="`tokenizer_default` (or nothing): the tokenizer's own; or a template that TRL ships, such as `qwen3_training`, which keeps earlier turns as they were.",
    )
    chat_template_jinja: str | None = Field(
        None, description="A chat template, as Jinja text or as a file next to the YAML; replaces the tokenizer's own."
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] | None = Field(
        None, description="Attention of the learner; default: transformers' choice."
    )
    flash_attention: bool = Field(False, description="Same as attn_implementation: flash_attention_2.")
    sdp_attention: bool = Field(False, description="Same as attn_implementation: sdpa.")
    # method and data
    rl: Literal["grpo", "gdpo"] = Field(
        description="The method: grpo, or gdpo, which is grpo with trl.multi_objective_aggregation: normalize_then_sum."
    )
    datasets: list[DatasetSection] = Field(min_length=1, description="Prompts to train on; several are joined.")
    test_datasets: list[DatasetSection] = Field(
        default=[],
        description="Held-out prompts: evaluated before the first step, after the last, and every eval_steps.",
    )
    val_set_size: float = Field(
        0.0, ge=0, description="Instead of test_datasets: hold out this share (below 1) or number of training rows."
    )
    shuffle_merged_datasets: bool = Field(
        True, description="Same as trl.shuffle_dataset; both must be true to shuffle."
    )
    dataset_prepared_path: str | None = Field(
        None,
        description="Where `datasets` keeps its caches. Transforms are always run again, so edits of their code take effect.",
    )
    sequence_len: int | None = Field(
        None, ge=2, description="Tokens of prompt and completion together; sets max_prompt_length."
    )
    trl: TrlSection = Field(default_factory=TrlSection, description="Generation, rewards and loss.")
    vllm: VllmSection = Field(default_factory=VllmSection, description="Rollout workers.")
    async_: AsyncSection = Field(
        alias="async", default_factory=AsyncSection, description="Generation beside training, and weight updates."
    )
    service: ServiceSection = Field(default_factory=ServiceSection, description="Deadlines of the service.")
    rewards: RewardsSection = Field(default_factory=RewardsSection, description="How rewards are run.")
    envs: list[EnvSection] = Field(
        default=[],
        description="Environment servers that rollout functions reach with `ctx.env(name)`; without a rollout_func the policy plays the one that the column `environment` names, or the first.",
    )
    episodes: EpisodesSection = Field(default_factory=EpisodesSection, description="How episodes are run.")
    cluster: ClusterSection = Field(default_factory=ClusterSection, description="Ray.")

    _path: Path = PrivateAttr(default=Path("config.yaml"))

    @model_validator(mode="after")
    def gdpo_normalises_each_reward(self) -> Config:
        trl = self.trl
        if self.rl == "gdpo" and trl.multi_objective_aggregation == "sum_then_normalize":
            raise ValueError("rl: gdpo means trl.multi_objective_aggregation: normalize_then_sum; remove that key")
        if self.rl == "gdpo" and trl.advantage_estimator != "group":
            raise ValueError(f"rl: gdpo excludes trl.advantage_estimator: {trl.advantage_estimator}; write `rl: grpo`")
        return self

    @model_validator(mode="after")
    def the_reference_of_an_adapter_stays(self) -> Config:
        if self.adapter is not None and self.trl.sync_ref_model:
            raise ValueError(
                "trl.sync_ref_model excludes `adapter`: the reference is the model without its adapter; remove one of them"
            )
        if self.rl_adapter_ref_model and self.trl.beta == 0:
            raise ValueError("rl_adapter_ref_model has no effect at trl.beta: 0; remove it, or raise trl.beta")
        return self

    @model_validator(mode="after")
    def an_adapter_is_found_in_its_layers(self) -> Config:
        if self.adapter is not None and self.fsdp_config is not None and self.fsdp_config.activation_checkpointing:
            raise ValueError(
                "fsdp_config.activation_checkpointing hides an adapter from PEFT; write `gradient_checkpointing: true` instead"
            )
        if self.adapter == "qlora" and (self.is_sharded or self.deepspeed is not None):
            raise ValueError(
                "adapter: qlora excludes fsdp and deepspeed: matrices in 4 bits are not cut; each process holds them whole, "
                "at half a byte a parameter. Remove fsdp, or write `adapter: lora`"
            )
        if self.adapter is not None and self.deepspeed is not None:
            raise ValueError(
                "deepspeed excludes `adapter`: gathering its weights was never written; write `fsdp: true`"
            )
        return self

    @model_validator(mode="after")
    def a_cut_head_is_gathered_as_the_rest(self) -> Config:
        if self.trl.cast_lm_head_to_fp32 and (self.is_sharded or self.deepspeed is not None):
            raise ValueError(
                "trl.cast_lm_head_to_fp32 excludes fsdp and deepspeed, which gather the head in the type of the other "
                "layers; remove one of them"
            )
        return self

    @model_validator(mode="after")
    def one_chat_template(self) -> Config:
        if self.chat_template not in (None, "tokenizer_default") and self.chat_template_jinja is not None:
            raise ValueError("chat_template and chat_template_jinja are both given; keep one")
        return self

    @model_validator(mode="after")
    def held_out_prompts_come_from_one_place(self) -> Config:
        if self.test_datasets and self.val_set_size:
            raise ValueError("test_datasets and val_set_size are both given; keep one")
        if self.eval_steps is not None and not (self.test_datasets or self.val_set_size):
            raise ValueError("eval_steps needs test_datasets or val_set_size")
        return self

    @model_validator(mode="after")
    def environments_have_names_of_their_own(self) -> Config:
        names = [env.name for env in self.envs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"envs: two entries are called {twice!r}; give each a `name` of its own")
        return self

    @model_validator(mode="after")
    def an_episode_ends_before_its_group(self) -> Config:
        if self.has_episodes and self.episodes.timeout > 0.9 * self.service.group_timeout:
            raise ValueError(
                f"episodes.timeout ({self.episodes.timeout:g} s) must stay below 0.9 × service.group_timeout "
                f"({self.service.group_timeout:g} s); lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def only_plain_replies_travel_directly(self) -> Config:
        if self.service.direct and self.has_episodes:
            raise ValueError(
                "service.direct is for plain replies, and this run has rollout functions, tools or environments; remove it"
            )
        return self

    @model_validator(mode="after")
    def a_service_does_not_grow_to_less_than_it_starts_with(self) -> Config:
        if (most := self.service.max_workers) is not None and most < self.vllm.data_parallel_size:
            raise ValueError(
                f"service.max_workers ({most}) is less than vllm.data_parallel_size ({self.vllm.data_parallel_size}), "
                "the workers that the service starts with; raise the first or lower the second"
            )
        return self

    @model_validator(mode="after")
    def weights_and_limits_are_of_rewards_that_are_there(self) -> Config:
        count, given = len(self.trl.reward_funcs), len(self.trl.reward_weights or ())
        if given > count and not self.has_episodes:
            raise ValueError(f"trl.reward_weights has {given} values for {count} reward_funcs; write one per function")
        unknown = sorted(set(self.rewards.functions) - set(self.trl.reward_funcs))
        if unknown:
            raise ValueError(
                f"rewards.functions: {unknown[0]!r} is not in trl.reward_funcs; write a name as it stands there"
            )
        return self

    @model_validator(mode="after")
    def completion_fits_the_sequence(self) -> Config:
        if self.sequence_len is not None and self.sequence_len <= self.trl.max_completion_length:
            raise ValueError(
                f"sequence_len ({self.sequence_len}) leaves no room for a prompt beside trl.max_completion_length "
                f"({self.trl.max_completion_length}); raise the first or lower the second"
            )
        return self

    @model_validator(mode="after")
    def engine_holds_prompt_and_completion(self) -> Config:
        need = self.max_prompt_length + self.trl.max_completion_length
        if self.vllm.max_model_len is not None and self.vllm.max_model_len < need:
            raise ValueError(
                f"vllm.max_model_len ({self.vllm.max_model_len}) is below max_prompt_length + max_completion_length ({need}); "
                f"raise it, or lower trl.max_prompt_length to {self.vllm.max_model_len - self.trl.max_completion_length}"
            )
        return self

    @property
    def has_episodes(self) -> bool:
        """Whether completions come from more than one plain reply per prompt, and may bring a reward of their own."""
        trl = self.trl
        return bool(trl.rollout_func or trl.environment_factory or trl.tools or self.envs)

    @property
    def group_deadline_s(self) -> float:
        """What a group has from its arrival at the service to its rewards."""
        return self.service.group_timeout * self.async_.steps_in_flight

    @property
    def normalizes_each_reward(self) -> bool:
        """GDPO: rewards are normalised one by one before they are summed."""
        return self.rl == "gdpo" or self.trl.multi_objective_aggregation == "normalize_then_sum"

    @property
    def path(self) -> Path:
        """The YAML file, absolute."""
        return self._path

    @property
    def base_dir(self) -> Path:
        """The folder of the YAML: dotted names and relative files are looked up here first."""
        return self._path.parent

    @property
    def max_prompt_length(self) -> int:
        if self.trl.max_prompt_length is not None:
            return self.trl.max_prompt_length
        return self.sequence_len - self.trl.max_completion_length if self.sequence_len is not None else 512

    @property
    def max_model_len(self) -> int:
        return self.vllm.max_model_len or self.max_prompt_length + self.trl.max_completion_length

    @property
    def base_url(self) -> str:
        """Where the learner reaches the service."""
        if self.trl.vllm_server_base_url:
            return self.trl.vllm_server_base_url.rstrip("/")
        host = self.trl.vllm_server_host or self.vllm.host
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
        return f"http://{host}:{self.trl.vllm_server_port or self.vllm.port}"

    def local(self, name: str) -> str:
        """`name` as an absolute path when it is a file or folder next to the YAML or in the current folder, else
        unchanged."""
        for candidate in (self.base_dir / Path(name).expanduser(), Path(name).expanduser().absolute()):
            if candidate.exists():
                return str(candidate.resolve())
        return name

    @property
    def attention(self) -> str | None:
        return self.attn_implementation or (
            "flash_attention_2" if self.flash_attention else "sdpa" if self.sdp_attention else None
        )
