"""What a learner process knows before it loads a model: the configuration, the plan, the prompts, where it goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from rlx.config import Config, Plan, make_plan
from rlx.learner.incoming.data import Prompt, PromptSet, load_prompts
from rlx.learner.policy.checkpoints import ResumePoint, find_resume_point
from rlx.tokenizer import load_tokenizer

PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
"""How a line is printed: as it is, never broken by us."""


@dataclass(frozen=True)
class Job:
    """One run, the same on every rank. `console` is quiet on all but the first."""

    config: Config
    plan: Plan
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    held_out: list[Prompt]
    total_steps: int
    resume: ResumePoint | None
    console: Console

    @property
    def first_step(self) -> int:
        """Optimizer steps that were taken before."""
        return self.resume.step if self.resume else 0

    @property
    def steps_per_epoch(self) -> int:
        return self.plan.steps_per_epoch(len(self.prompts))

    def say(self, line: str) -> None:
        self.console.print(line, **PLAIN)


def make_job(config: Config, num_processes: int, console: Console) -> Job:
    """Reads the data, and says what will be trained. Raises RlxError."""
    plan = make_plan(config, num_processes)
    resume = find_resume_point(config, num_processes)
    tokenizer = load_tokenizer(config)
    train_set, test_set = load_prompts(config, tokenizer)
    prompts = train_set.prompts
    total_steps = plan.total_steps(config, len(prompts))
    job = Job(config, plan, tokenizer, prompts, test_set.prompts if test_set else [], total_steps, resume, console)
    _say_plan(job, train_set)
    return job


def _say_plan(job: Job, train_set: PromptSet) -> None:
    config, plan = job.config, job.plan
    for note in plan.notes:
        job.say(f"note: {note}")
    dropped = (
        f" ({train_set.too_long} longer than {config.max_prompt_length} tokens left out)" if train_set.too_long else ""
    )
    unit = "step" if plan.steps_per_batch == 1 else f"batch for {plan.steps_per_batch} steps"
    job.say(
        f"{len(job.prompts)} prompts{dropped}, {plan.prompts_per_batch} × {plan.num_generations} completions a {unit}, "
        f"{job.total_steps} steps, {plan.num_processes} process{'es' if plan.num_processes > 1 else ''}"
    )
    if job.resume is not None:
        job.say(f"going on after step {job.resume.step}, from {job.resume.folder}")
