"""The arithmetic of a run: how many prompts, completions and tokens a step holds, and what that needs in memory.

Batch sizes are solved, not rejected: an optimizer step always holds whole groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rlx.config.schema import Config
from rlx.config.sharding import check_sharding
from rlx.errors import ConfigError
from rlx.safetensors_layout import read_specs

_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """One optimizer step in numbers. `notes` say what was changed or deserves a second look."""

    num_processes: int
    num_generations: int
    completions_per_step: int
    gradient_accumulation_steps: int
    notes: tuple[str, ...]
    steps_per_pass: int = 1
    """Optimizer steps that one pass over a generation batch makes"""
    num_iterations: int = 1
    """Passes over it"""

    @property
    def prompts_per_batch(self) -> int:
        """Of a generation batch, which holds whole groups."""
        return self.completions_per_step * self.steps_per_pass // self.num_generations

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps from one generation batch to the next."""
        return self.steps_per_pass * self.num_iterations

    def first_of(self, step: int) -> int:
        """The first step on the generation batch that `step` trains on."""
        return step - step % self.steps_per_batch

    def next_batch(self, step: int) -> int:
        """The first step from `step` on that begins a generation batch."""
        return math.ceil(step / self.steps_per_batch) * self.steps_per_batch

    def steps_per_epoch(self, num_prompts: int) -> int:
        """Steps that touch one epoch; prompts of the next may fill up the last of them."""
        return math.ceil(num_prompts / self.prompts_per_batch) * self.steps_per_batch

    def total_steps(self, config: Config, num_prompts: int) -> int:
        """As many as the prompts of all epochs, one after the other without a gap, fill; at least each once."""
        batches = math.ceil(config.num_epochs * num_prompts / self.prompts_per_batch)
        return config.max_steps or batches * self.steps_per_batch


def make_plan(config: Config, num_processes: int = 1) -> Plan:
    """Solve the batch sizes for `num_processes` learner processes. Raises ConfigError when they cannot be, or when
    there is no reward to train with."""
    if not (config.trl.reward_funcs or config.has_episodes):
        raise ConfigError(
            f"{config.path}: trl.reward_funcs is empty: there is nothing to learn from. Name at least one function, for "
            "example `reward_funcs: [rlx.rewards.math]`."
        )
    group, asked = config.trl.num_generations, config.gradient_accumulation_steps
    per_pass = config.micro_batch_size * num_processes
    notes = check_sharding(config, config.path, num_processes)
    iterations = config.trl.num_iterations
    if config.trl.steps_per_generation is not None:
        shared = _steps_per_pass(config, per_pass)
        notes += _second_looks(config)
        return Plan(num_processes, group, per_pass * asked, asked, tuple(notes), shared, iterations)
    if config.trl.generation_batch_size is not None:
        completions = config.trl.generation_batch_size
        if completions % group:
            low = completions // group * group
            choices = " or ".join(str(n) for n in (low, low + group) if n)
            raise ConfigError(
                f"{config.path}: trl.generation_batch_size ({completions}) does not hold whole groups of "
                f"trl.num_generations ({group}) completions. Write {choices}."
            )
        accumulation = math.ceil(completions / per_pass)
    else:
        whole = group // math.gcd(group, per_pass)
        accumulation = math.ceil(asked / whole) * whole
        completions = per_pass * accumulation
    if accumulation != asked:
        notes.append(
            f"gradient_accumulation_steps is {accumulation} instead of {asked}, so that a step holds "
            f"{_count(completions // group, 'whole group')} of {group} ({config.micro_batch_size} × {accumulation} × {_count(num_processes, 'process', 'es')} ≥ {completions} completions)"
        )
    notes += _second_looks(config)
    return Plan(num_processes, group, completions, accumulation, tuple(notes), num_iterations=iterations)


def _count(number: int, noun: str, ending: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else ending}"


def _steps_per_pass(config: Config, per_micro_batch: int) -> int:
    """Optimizer steps of `trl.steps_per_generation` micro-batches. Raises ConfigError."""
    trl, accumulation = config.trl, config.gradient_accumulation_steps
    micro_batches, group = trl.steps_per_generation, trl.num_generations
    assert micro_batches is not None
    if trl.generation_batch_size is not None:
        raise ConfigError(
            f"{config.path}: trl.steps_per_generation and trl.generation_batch_size are both given; keep one."
        )
    unit = math.lcm(accumulation, group // math.gcd(group, per_micro_batch))
    if micro_batches % unit:
        low = micro_batches // unit * unit
        raise ConfigError(
            f"{config.path}: trl.steps_per_generation ({micro_batches} micro-batches of {per_micro_batch} completions) must hold "
            f"whole optimizer steps of gradient_accumulation_steps ({accumulation}) and whole groups of trl.num_generations "
            f"({group}). Write {' or '.join(str(n) for n in (low, low + unit) if n)}."
        )
    return micro_batches // accumulation


def _second_looks(config: Config) -> list[str]:
    trl, notes = config.trl, []
    narrowed = [
        f"{name} {value}"
        for name, value, off in (
            ("top_p", trl.top_p, trl.top_p == 1),
            ("top_k", trl.top_k, trl.top_k <= 0),
            ("min_p", trl.min_p, not trl.min_p),
            ("repetition_penalty", trl.repetition_penalty, trl.repetition_penalty == 1),
        )
        if not off
    ]
    if narrowed:
        notes.append(
            f"{', '.join(narrowed)}: the workers sample from another distribution than the learner trains; importance "
            "ratios will be far from 1. Leave it out unless you mean it"
        )
    if trl.loss_type == "cispo" and trl.epsilon_high is None:
        notes.append(
            f"loss_type: cispo without epsilon_high bounds every importance ratio at epsilon ({trl.epsilon:g}), as in TRL; "
            "ScaleRL recommends epsilon_high: 5.0"
        )
    return notes


@dataclass(frozen=True)
class MemoryEstimate:
    """GiB per learner process and per engine, from the parameter count; activations are not included."""

    parameters: int
    learner_gib: float
    engine_gib: float


def estimate_memory(config: Config, parameters: int, num_processes: int = 1) -> MemoryEstimate:
    """fp32 master weights, gradients and Adam's two moments (16 bytes each parameter), a reference model when
    beta > 0 (4 more); the engine holds 2-byte weights. Logits of one micro-batch are counted in by the caller.

    With an adapter the weights alone, 4 bytes each, or about 1 with 4-bit matrices: the adapter's own are few. Its
    reference is the same model. With fsdp each of `num_processes` has its part of that.
    """
    held = 1 if config.adapter == "qlora" else 4
    reference = config.trl.beta > 0 and (config.adapter is None or config.rl_adapter_ref_model)
    learner = parameters * ((16 if config.adapter is None else held) + (held if reference else 0)) / _GIB
    if config.is_sharded:
        learner /= num_processes
    engine = parameters * (4 if config.vllm.dtype in ("float32", "float") else 2) / _GIB + config.vllm.cpu_kv_cache_gib
    return MemoryEstimate(parameters, learner, engine)


def count_parameters(folder: Path) -> int | None:
    """Parameters of a local model, read from the headers of its safetensors files; None when there are none."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        total += sum(math.prod(tensor.shape) for tensor in read_specs(file))
    return total or None
