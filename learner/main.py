"""The training of one learner process, which `process.py` is.

data → service is up → model → Trainer on the stream → final publish, evaluation, model
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import datasets
import numpy as np
import transformers
from rich.console import Console
from torch import nn

from rlx.config import Config
from rlx.learner.arguments import check_optimizer, training_arguments
from rlx.learner.incoming.recording import Codec
from rlx.learner.incoming.rollouts import connect, longest_step_s
from rlx.learner.incoming.stream import Fetched, RolloutStream, StepBatch
from rlx.learner.job import Job, make_job
from rlx.learner.microbatches.batching import Layout
from rlx.learner.microbatches.forward import prepare
from rlx.learner.policy.adapters import base_of, reference_model, with_adapter
from rlx.learner.policy.checkpoints import check_model
from rlx.learner.policy.model import load_model
from rlx.learner.policy.sharding import check_device, device_notes
from rlx.learner.rank_zero import RankZero, jobs_for_rank_zero
from rlx.learner.ranks import Ranks, StoppedByRankZero
from rlx.learner.trainer import GRPOTrainer, StepClock
from rlx.learner.watch.journal import Journal
from rlx.learner.watch.phases import PhaseSpans
from rlx.learner.watch.progress import FailureNotes
from rlx.learner.watch.records import append_event, failure_record
from rlx.rollout.client import RolloutClient


def train(config: Config, num_processes: int) -> None:
    """Train to the end. Raises RlxError; every rank runs this."""
    is_first = int(os.environ.get("RANK", "0")) == 0
    _quiet_libraries(is_first)
    check_device(config)
    check_optimizer(config)
    job = make_job(config, num_processes, Console(quiet=not is_first, stderr=False))
    client = connect(config, job.plan, job.console) if is_first and config.replay is None else None
    try:
        _train(job, client, is_first)
    finally:
        if client is not None:
            client.close()


def _train(job: Job, client: RolloutClient | None, is_first: bool) -> None:
    config = job.config
    model, reference, layout = _models(job)
    arguments = training_arguments(
        config, job.total_steps, job.steps_per_epoch, longest_step_s(config, len(job.held_out))
    )
    _ = arguments.device  # the library sets up the process group here
    ranks = Ranks(arguments.ddp_timeout)
    ranks.jobs = jobs_for_rank_zero(job, model)
    codec = Codec(config, job.plan, job.tokenizer, job.prompts)
    first, failed = RankZero(job, client, codec, ranks) if is_first else None, True
    try:
        trainer = _trainer(job, ranks, arguments, model, reference, layout, codec, first)
        if first is not None:
            first.start()
        trainer.train(resume_from_checkpoint=str(job.resume.folder) if job.resume else None)

        def finish() -> list[bytes]:
            if first is not None:
                first.finish(trainer)
            return []

        ranks.from_first(finish)
        failed = False
    except BaseException as error:  # whatever ended the run is an event of it, and is raised again
        if first is not None:
            first.journal.run_failed(error)
        elif not isinstance(error, StoppedByRankZero):
            append_event(Path(config.output_dir), failure_record(error, f"learner rank {ranks.rank}"))
        raise
    finally:
        if first is not None:
            first.close(failed)


def _models(job: Job) -> tuple[nn.Module, nn.Module | None, Layout]:
    """The model to train, the reference that it is held to, and how its forward takes samples."""
    config = job.config
    model = with_adapter(load_model(config), config)
    if job.resume is not None:
        check_model(job.resume, model, config.base_model)
    forward = prepare(base_of(model), config)
    for note in (*forward.notes, *device_notes(config)):
        job.say(f"note: {note}")
    if config.lora_dropout and config.trl.disable_dropout:
        job.say("note: lora_dropout is off, because of trl.disable_dropout")
    reference = reference_model(config)
    if reference is not None:
        forward.apply_to(base_of(reference))
    return model, reference, forward.layout


def _trainer(
    job: Job,
    ranks: Ranks,
    arguments: transformers.TrainingArguments,
    model: nn.Module,
    reference: nn.Module | None,
    layout: Layout,
    codec: Codec,
    first: RankZero | None,
) -> GRPOTrainer:
    """The trainer on its stream. `first` is rank 0's alone: it brings the groups, and is told of every step."""
    config, plan, notes = job.config, job.plan, FailureNotes(job.console)
    phases = PhaseSpans(first.journal if first else Journal(), ranks)

    def fetch(step: int) -> Fetched:
        assert first is not None, "only rank 0 has rollouts"
        first.journal.begin_step(step + 1)
        return first.rollouts.batch(step, model)

    def reopen(step: int) -> tuple[Fetched, np.ndarray]:
        assert job.resume is not None, "a new run begins with a batch of its own"
        return codec.load_open(job.resume.folder, step)

    def save_open_batch(folder: Path) -> None:
        if (opened := trainer.stream.open_batch()) is not None:
            codec.save_open(folder, *opened)

    def on_trained() -> None:
        logprobs = trainer.stream.shown_logprobs()
        if first is not None:
            first.trained(logprobs)

    def make_stream(trainer: GRPOTrainer) -> RolloutStream:
        def on_step(batch: StepBatch) -> None:
            trainer.begin_step(batch)
            phases.begin()
            if not batch.is_reused:
                notes.look(batch.groups)
            if first is not None and not batch.is_reused:
                first.took(batch)

        return RolloutStream(
            config, plan, ranks, job.prompts, lambda: trainer.state.global_step, job.total_steps, fetch, on_step,
            layout, trainer.old_logprobs, reopen,
        )  # fmt: skip

    clock = StepClock(plan.prompts_per_batch / plan.steps_per_batch / len(job.prompts))
    trainer = GRPOTrainer(
        config, ranks, arguments, model, reference, job.tokenizer, make_stream,
        feed_state=first.state if first else dict, save_open_batch=save_open_batch,
        callbacks=[clock, phases, *(first.callbacks if first else [])], on_trained=on_trained,
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    clock.trainer = trainer
    return trainer


def _quiet_libraries(is_first: bool) -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if not is_first:
        warnings.simplefilter("ignore")
