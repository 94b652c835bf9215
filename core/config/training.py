"""The keys of the optimizer, its schedule and the size of its batches, flat at the top level as Axolotl has them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rlx.config.section import Section


class TrainingKeys(Section):
    """How the model is trained: the size of a step, optimizer, schedule, precision, seed."""

    micro_batch_size: int = Field(1, ge=1, description="Completions per process in one forward and backward.")
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        description="Micro-batches per optimizer step and process; raised when the step would not hold whole groups.",
    )
    token_budget: int | None = Field(
        None,
        ge=1,
        description="Tokens per process in one forward and backward, in place of micro_batch_size completions: as many micro-batches as that takes, whose number may differ from step to step. A longer completion is alone in its own. The step keeps its completions.",
    )
    sample_packing: bool | None = Field(
        None,
        description="Lay the sequences of a micro-batch side by side without padding. Default: where the model allows it, with flash attention, and on a CPU.",
    )
    share_prompt_prefix: bool = Field(
        True,
        description="In packed sequences, forward the prompt of a group once for all its completions, where that is cheaper.",
    )
    num_epochs: float = Field(1.0, gt=0, description="Passes over the prompts.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps; overrides num_epochs.")
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate (TRL's GRPO default).")
    optimizer: str = Field("adamw_torch", description="An optimizer of transformers' TrainingArguments.optim.")
    lr_scheduler: str = Field(
        "cosine",
        description="A schedule of transformers' TrainingArguments.lr_scheduler_type; cosine is Axolotl's default, linear TRL's.",
    )
    lr_scheduler_kwargs: dict[str, Any] = Field(default={}, description="Its arguments.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    warmup_ratio: float | None = Field(None, ge=0, lt=1, description="Instead of warmup_steps: share of all steps.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Adam's β1.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Adam's β2.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Adam's ε.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping; 0 is off.")
    seed: int = Field(42, ge=0, description="Seed of the data order, the sampling engine and the learner.")
    bf16: bool | Literal["auto"] = Field(
        "auto", description="Compute in bfloat16 over float32 master weights. auto: on a GPU that has it."
    )
    tf32: bool | Literal["auto"] = Field("auto", description="TensorFloat-32 matrix products on GPUs that have them.")

    @model_validator(mode="after")
    def one_length_of_warm_up(self) -> TrainingKeys:
        if self.warmup_steps and self.warmup_ratio is not None:
            raise ValueError("warmup_steps and warmup_ratio are both given; keep one")
        return self
