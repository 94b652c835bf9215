"""The keys of what a run leaves in `output_dir`, and when, flat at the top level as Axolotl has them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlx.config.section import Section


class OutputKeys(Section):
    """What a run leaves in output_dir: checkpoints, logs, evaluations, samples, recorded rollouts."""

    output_dir: str = Field(
        "./outputs", description="Folder for checkpoints, the final model and the logs, relative to the current folder."
    )
    save_strategy: Literal["steps", "epoch", "no"] | None = Field(
        None,
        description="When to write checkpoints; default: steps when save_steps is given, else at the end of each epoch.",
    )
    save_steps: int | None = Field(None, ge=1, description="Optimizer steps between checkpoints.")
    saves_per_epoch: int | None = Field(None, ge=1, description="Instead of save_steps.")
    save_total_limit: int | None = Field(None, ge=1, description="Keep only the newest checkpoints.")
    resume_from_checkpoint: str | None = Field(None, description="Folder of a checkpoint to go on from.")
    auto_resume_from_checkpoints: bool = Field(
        False, description="Go on from the newest complete checkpoint in output_dir, if there is one."
    )
    logging_steps: int = Field(1, ge=1, description="Optimizer steps between log lines (TRL's default is 10).")
    eval_steps: int | None = Field(None, ge=1, description="Optimizer steps between evaluations.")
    eval_success_reward: float = Field(
        1.0, description="Weighted reward from which on a completion counts as solved, for pass@k in evaluations."
    )
    save_best: bool = Field(
        True,
        description="Keep the weights of the best evaluation in output_dir/best, where there are held-out prompts.",
    )
    samples_per_step: int = Field(8, ge=0, description="Completions per step written to samples.jsonl.")
    files_max_bytes: int = Field(
        2**30,
        ge=2**16,
        description="Bytes that each of metrics.jsonl, samples.jsonl, evals.jsonl, events.jsonl and spans.jsonl may take, with its older parts (samples.1.jsonl to samples.3.jsonl); then the oldest part goes.",
    )
    record_rollouts: bool = Field(
        False,
        description="Keep the groups of every step, in output_dir/rollouts, to train on them again with `replay`.",
    )
    replay: str | None = Field(
        None,
        description="A folder that record_rollouts filled: train on its groups, without a service and without evaluations. `rlx train --replay FOLDER`.",
    )

    @field_validator("save_strategy", mode="before")
    @classmethod
    def no_without_quotes_is_meant(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML 1.1 reads `no` as false

    @model_validator(mode="after")
    def save_either_by_steps_or_per_epoch(self) -> OutputKeys:
        if self.save_steps is not None and self.saves_per_epoch is not None:
            raise ValueError("save_steps and saves_per_epoch are both given; keep one")
        return self
