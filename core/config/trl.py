"""The `trl:` section: generation, rewards, episodes and the service's address; the keys of the loss are `ObjectiveKeys`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rlx.config.objective import ObjectiveKeys


class TrlSection(ObjectiveKeys):
    """`trl:` names and meanings are TRL's GRPOConfig, as Axolotl's users write them."""

    # rewards
    reward_funcs: list[str] = Field(
        default=[],
        description="Rewards: functions by dotted name, `{file}.{fn}` next to the YAML or installed (`rlx.rewards.math`); reward models by hub id or folder; remote scorers by http(s) URL. May be empty where the episodes bring a reward of their own.",
    )
    reward_weights: list[float] | None = Field(
        None,
        description="One weight per entry of reward_funcs, and one more for the episodes' own reward where there is one; default 1.0 each.",
    )
    # episodes
    rollout_func: str | None = Field(
        None,
        description="Dotted name of a rollout function; docs/guides/rollouts.md shows the four shapes it may have. Default: one reply per prompt.",
    )
    environment_factory: str | dict[str, str] | None = Field(
        None,
        description="Dotted name of a class with `reset`, tool methods and perhaps `get_reward`, as in TRL; or several by the value of the column `environment`.",
    )
    tools: list[str] = Field(default=[], description="Dotted names of functions that the model may call.")
    max_tool_calling_iterations: int | None = Field(
        None, ge=1, description="Turns with tool calls per episode; default: until max_completion_length is used up."
    )
    # generation
    num_generations: int = Field(8, ge=2, description="Completions per prompt, the size G of a group.")
    num_generations_eval: int = Field(
        1, ge=1, description="Completions per prompt in an evaluation (TRL's default: as many as num_generations)."
    )
    generation_batch_size: int | None = Field(
        None,
        ge=2,
        description="Completions per optimizer step over all processes. Default: micro_batch_size × gradient_accumulation_steps × processes, raised to whole groups.",
    )
    max_prompt_length: int | None = Field(
        None,
        ge=1,
        description="Tokens. Longer prompts are left out at load and counted. Default: sequence_len − max_completion_length when sequence_len is given, else 512.",
    )
    max_completion_length: int = Field(512, ge=1, description="Tokens a completion may have.")
    temperature: float = Field(
        1.0, gt=0, description="Sampling temperature; log-probabilities are of the tempered distribution on both sides."
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Nucleus sampling. Below 1 the sampled distribution is not the trained one: `rlx check` warns.",
    )
    top_k: int = Field(0, ge=-1, description="Keep the k likeliest tokens; 0 or -1 is off. `rlx check` warns when on.")
    min_p: float | None = Field(
        None, ge=0, le=1, description="Minimum token probability relative to the likeliest; off by default."
    )
    repetition_penalty: float = Field(1.0, gt=0, description="1.0 is off.")
    generation_kwargs: dict[str, Any] = Field(
        default={}, description="More fields of vLLM's SamplingParams, for example `stop`."
    )
    chat_template_kwargs: dict[str, Any] = Field(default={}, description="Given to the tokenizer's chat template.")
    vllm_structured_outputs_regex: str | None = Field(
        None, description="Completions must match this regular expression."
    )
    vllm_guided_decoding_regex: str | None = Field(None, description="Older name of vllm_structured_outputs_regex.")
    # training
    num_iterations: int = Field(
        1,
        ge=1,
        description="Passes over each generation batch, each of as many optimizer steps. The ratio to the policy before the first of them is clipped. async.max_staleness counts up to the first use.",
    )
    steps_per_generation: int | None = Field(
        None,
        ge=1,
        description="Micro-batches of a generation batch per process, a multiple of gradient_accumulation_steps: so many optimizer steps share the batch. Default: one step. Excludes generation_batch_size.",
    )
    disable_dropout: bool = Field(
        True,
        description="Set every dropout to 0, so that the learner's log-probabilities are the policy's (TRL's default is false).",
    )
    cast_lm_head_to_fp32: bool = Field(
        False,
        description="With bf16 multiply in the learner's language-model head in float32; its weights are float32 anyway.",
    )
    # data and logging
    shuffle_dataset: bool = Field(True, description="Draw the prompts of each epoch in a seeded random order.")
    log_completions: bool = Field(
        False,
        description="Print some completions in the terminal at every logging step, and give those of samples.jsonl to the trackers as a table.",
    )
    num_completions_to_print: int = Field(2, ge=0, description="How many of them.")
    # the service, as the learner sees it
    use_vllm: Literal[True] = Field(True, description="Always true: rlx generates with vLLM.")
    vllm_mode: Literal["server"] = Field("server", description="Always server.")
    vllm_server_host: str | None = Field(
        None, description="Where the learner finds the service; default vllm.host. 0.0.0.0 means this machine."
    )
    vllm_server_port: int | None = Field(None, ge=1, le=65535, description="Default vllm.port.")
    vllm_server_base_url: str | None = Field(
        None, description="Instead of host and port, for example http://10.0.0.5:8000."
    )
    vllm_server_timeout: float = Field(240.0, gt=0, description="Seconds to wait for the service to be up.")

    @model_validator(mode="after")
    def one_weight_per_reward(self) -> TrlSection:
        count = len(self.reward_funcs)
        if self.reward_weights is not None and len(self.reward_weights) not in (count, count + 1):
            raise ValueError(
                f"reward_weights has {len(self.reward_weights)} values for {count} reward_funcs; write one per function"
            )
        return self

    @model_validator(mode="after")
    def one_way_to_make_episodes(self) -> TrlSection:
        if self.rollout_func and (self.environment_factory or self.tools):
            other = "environment_factory" if self.environment_factory else "tools"
            raise ValueError(f"rollout_func and {other} are both given; a rollout function makes the whole episode")
        return self

    @model_validator(mode="after")
    def old_and_new_names_do_not_disagree(self) -> TrlSection:
        regex = self.vllm_structured_outputs_regex, self.vllm_guided_decoding_regex
        if None not in regex and regex[0] != regex[1]:
            raise ValueError(
                "vllm_guided_decoding_regex is the old name of vllm_structured_outputs_regex; keep the new one"
            )
        return self

    @property
    def regex(self) -> str | None:
        return self.vllm_structured_outputs_regex or self.vllm_guided_decoding_regex
