"""One learner process: `python -m rlx.learner.main NUM_PROCESSES CONFIG [overrides]`, started by `launch.py`.

data → service is up → model → Trainer on the stream → final publish, evaluation, model
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from rich.console import Console

from rlx.config import Config, Plan, load_config, make_plan, parse_overrides
from rlx.errors import RlxError
from rlx.learner.adapters import base_of, reference_model, with_adapter
from rlx.learner.checkpoints import check_model, find_resume_point, save_final
from rlx.learner.data import PromptSet, load_prompts
from rlx.learner.forward import prepare
from rlx.learner.model import load_model, saved_dtype
from rlx.learner.progress import FailureNotes, ProgressReport
from rlx.learner.ranks import Ranks
from rlx.learner.recording import Codec, Recorder, Replay
from rlx.learner.report import RunFiles, evaluation_table, print_samples
from rlx.learner.rollouts import Rollouts, connect, longest_step_s
from rlx.learner.run_record import write_run_record
from rlx.learner.stream import Fetched, RolloutStream, StepBatch
from rlx.learner.trackers import Trackers
from rlx.learner.trainer import GRPOTrainer, StepClock, training_arguments
from rlx.processes import die_with_parent
from rlx.tokenizer import load_tokenizer

PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
"""How a line is printed: as it is, never broken by us."""

_AFTER_RANK_ZERO_S = 30.0
"""How long another rank that failed keeps still. Mostly rank 0 failed with the same, or first: it says so and leaves,
whereupon the launcher stops this process."""


def train(config: Config, num_processes: int) -> None:
    """Train to the end. Raises RlxError; every rank runs this."""
    plan = make_plan(config, num_processes)
    is_first = int(os.environ.get("RANK", "0")) == 0
    console = Console(quiet=not is_first, stderr=False)
    _quiet_libraries(is_first)

    resume = find_resume_point(config)
    tokenizer = load_tokenizer(config)
    train_set, test_set = load_prompts(config, tokenizer)
    total_steps = plan.total_steps(config, len(train_set.prompts))
    steps_per_epoch = plan.steps_per_epoch(len(train_set.prompts))
    _print_plan(config, plan, train_set, total_steps, console)
    if resume is not None:
        console.print(f"going on after step {resume.step}, from {resume.folder}", **PLAIN)

    client = connect(config, plan, console) if is_first and config.replay is None else None
    model = with_adapter(load_model(config), config)
    if resume is not None:
        check_model(resume, model, config.base_model)
    forward = prepare(base_of(model), config)
    for note in forward.notes:
        console.print(f"note: {note}", **PLAIN)
    if config.lora_dropout and config.trl.disable_dropout:
        console.print("note: lora_dropout is off, because of trl.disable_dropout", **PLAIN)
    reference = reference_model(config)
    if reference is not None:
        forward.apply_to(base_of(reference))
    held_out = test_set.prompts if test_set else []
    arguments = training_arguments(config, total_steps, steps_per_epoch, longest_step_s(config, len(held_out)))
    _ = arguments.device  # the library sets up the process group here
    ranks = Ranks(arguments.ddp_timeout)

    codec = Codec(config, plan, tokenizer, train_set.prompts)
    rollouts: Rollouts | Replay | None = None
    files, progress, notes, trackers = None, None, FailureNotes(console), None
    if is_first:
        if client is None:
            rollouts = Replay(config, plan, codec, total_steps, resume)
            console.print(
                f"trains on the rollouts in {config.replay}: no service is asked, nothing is evaluated", **PLAIN
            )
        files = RunFiles(Path(config.output_dir), resume.step if resume else 0)
        write_run_record(files.output_dir, config, total_steps, num_processes, resume.step if resume else None)
        progress = ProgressReport(console, files)
        trackers = Trackers(config, resume.step if resume else None, console)
        files.listeners.append(trackers.record)
        if client is not None:
            recorder = (
                Recorder(files.output_dir, codec, resume.step if resume else 0) if config.record_rollouts else None
            )
            rollouts = Rollouts(
                config,
                plan,
                client,
                tokenizer,
                train_set.prompts,
                held_out,
                total_steps,
                resume,
                files,
                recorder,
                console,
            )

    def fetch(step: int) -> Fetched:
        assert rollouts is not None, "only rank 0 has rollouts"
        return rollouts.batch(step, model)

    def reopen(step: int) -> tuple[Fetched, np.ndarray]:
        assert resume is not None, "a new run begins with a batch of its own"
        return codec.load_open(resume.folder, step)

    def save_open_batch(folder: Path) -> None:
        if (opened := trainer.stream.open_batch()) is not None:
            codec.save_open(folder, *opened)

    def make_stream(trainer: GRPOTrainer) -> RolloutStream:
        def on_step(batch: StepBatch) -> None:
            trainer.begin_step(batch)
            if batch.is_reused:
                return
            notes.look(batch.groups)
            if files is not None:
                files.samples(batch, config.samples_per_step)
                if config.trl.log_completions and batch.step % config.logging_steps == 0:
                    print_samples(console, batch, config.trl.num_completions_to_print)

        return RolloutStream(
            config, plan, ranks, train_set.prompts, lambda: trainer.state.global_step, total_steps, fetch, on_step,
            forward.layout, trainer.old_logprobs, reopen,
        )  # fmt: skip

    clock = StepClock(plan.prompts_per_batch / plan.steps_per_batch / len(train_set.prompts))
    trainer = GRPOTrainer(
        config, ranks, arguments, model, reference, tokenizer, make_stream,
        feed_state=lambda: rollouts.state() if rollouts else {}, save_open_batch=save_open_batch,
        callbacks=[clock, *([trackers] if trackers else []), *([progress] if progress else [])],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    clock.trainer = trainer
    failed = True
    try:
        if rollouts is not None:
            rollouts.start()
        trainer.train(resume_from_checkpoint=str(resume.folder) if resume else None)

        def finish() -> list[bytes]:
            if rollouts is not None and files is not None:
                _finish(config, console, files, trainer, rollouts)
            return []

        ranks.from_first(finish)
        failed = False
    finally:
        if progress is not None:
            progress.stop()
        if trackers is not None:
            trackers.close(failed)
        if rollouts is not None:
            rollouts.close()


def _print_plan(config: Config, plan: Plan, train_set: PromptSet, total_steps: int, console: Console) -> None:
    for note in plan.notes:
        console.print(f"note: {note}", **PLAIN)
    dropped = (
        f" ({train_set.too_long} longer than {config.max_prompt_length} tokens left out)" if train_set.too_long else ""
    )
    unit = "step" if plan.steps_per_batch == 1 else f"batch for {plan.steps_per_batch} steps"
    console.print(
        f"{len(train_set.prompts)} prompts{dropped}, {plan.prompts_per_batch} × {plan.num_generations} completions a {unit}, "
        f"{total_steps} steps, {plan.num_processes} process{'es' if plan.num_processes > 1 else ''}",
        **PLAIN,
    )


def _finish(
    config: Config, console: Console, files: RunFiles, trainer: GRPOTrainer, rollouts: Rollouts | Replay
) -> None:
    """Saves first: the service can fail, and what was trained is kept. What is evaluated is what was saved."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    save_final(model, trainer.processing_class, saved_dtype(config), files.output_dir)
    rollouts.finish(model)
    curve = files.learning_curve()
    if evaluations := files.evaluations():
        console.print(evaluation_table(evaluations))
    console.print(f"model: {files.output_dir}\ncurve: {curve}\nsamples: {files.output_dir / 'samples.jsonl'}", **PLAIN)


def _quiet_libraries(is_first: bool) -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if not is_first:
        warnings.simplefilter("ignore")


def main() -> int:
    die_with_parent()
    num_processes, path, overrides = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        train(load_config(path, parse_overrides(overrides)), num_processes)
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # the end of the process: whatever came is said, once
        if os.environ.get("RANK", "0") != "0":
            time.sleep(_AFTER_RANK_ZERO_S)
        if not isinstance(error, RlxError):
            traceback.print_exc()
            return 1
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # At the interpreter's end, gloo's groups wait for threads that wait for the interpreter's lock: leave without it.
    os._exit(status)
