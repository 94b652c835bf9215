"""What only rank 0 has: the run's files, its journal, the terminal, and the rollouts.

Rollouts or Replay ─► Journal ─► RunFiles ─┬─► Observer ─► the gateway
                                           ├─► Trackers
                                           └─► SpanExport ─► a collector
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from rlx.config import Config
from rlx.errors import UserCodeError
from rlx.learner.incoming.recording import Codec, Recorder, Replay
from rlx.learner.incoming.rollouts import Rollouts
from rlx.learner.incoming.stream import StepBatch
from rlx.learner.job import Job
from rlx.learner.policy.checkpoints import save_final
from rlx.learner.policy.model import saved_dtype
from rlx.learner.policy.sharding import is_sharded, whole_state
from rlx.learner.ranks import SNAPSHOT, WHOLE_STATE, Ranks
from rlx.learner.trainer import GRPOTrainer
from rlx.learner.watch.journal import Journal
from rlx.learner.watch.observer import Observer
from rlx.learner.watch.progress import ProgressReport
from rlx.learner.watch.report import RunFiles, evaluation_table, print_samples
from rlx.learner.watch.run_record import write_run_record
from rlx.learner.watch.trackers import Trackers
from rlx.learner.weights.parity import make_probe
from rlx.learner.weights.publish import join_snapshot
from rlx.rollout.auth import service_token
from rlx.rollout.client import RolloutClient

if TYPE_CHECKING:
    from rlx.learner.watch.otel import SpanExport


def jobs_for_rank_zero(job: Job, model: nn.Module) -> list[Callable[[], object]]:
    """What the other ranks do when it calls `SNAPSHOT` or `WHOLE_STATE`, where `model` is cut over all of them."""
    config, probe_ids = job.config, make_probe([prompt.ids for prompt in job.prompts])
    return [
        lambda: join_snapshot(model, probe_ids, config.lora_sync),
        lambda: whole_state(model, rounded_to(config), keep=False),
    ]


def rounded_to(config: Config) -> torch.dtype | None:
    """What the final weights are rounded to; None: an adapter's, which stay as they are."""
    return None if config.adapter else saved_dtype(config)


class RankZero:
    """`client` is None where the rollouts are replayed. `close` ends everything, whatever happened before."""

    def __init__(self, job: Job, client: RolloutClient | None, codec: Codec, ranks: Ranks):
        config, first = job.config, job.first_step
        self._job, self._ranks = job, ranks
        self.rollouts: Rollouts | Replay
        self.observer: Observer | None = None
        if client is None:
            self.rollouts = Replay(config, job.plan, codec, job.total_steps, job.resume)
            job.say(f"trains on the rollouts in {config.replay}: no service is asked, nothing is evaluated")
        self.files = RunFiles(Path(config.output_dir), first, config.files_max_bytes, job.say)
        write_run_record(
            self.files.output_dir,
            config,
            job.total_steps,
            job.plan.num_processes,
            job.resume.step if job.resume else None,
        )
        self._in_training: StepBatch | None = None
        self._has_reward: bool | None = None
        """Whether any completion of this run has one; None before the first"""
        self.journal = Journal(self.files, first, job.total_steps)
        self.progress = ProgressReport(job.console, self.files, None if client is None else client.list_workers)
        self.trackers = Trackers(config, job.resume.step if job.resume else None, job.console)
        self.files.listeners.append(self.trackers.record)
        self.export = _span_export(job)
        if self.export is not None:
            self.files.listeners.append(self.export.record)
        self.callbacks = [self.trackers, self.progress]
        if client is not None:
            recorder = Recorder(self.files.output_dir, codec, first) if config.record_rollouts else None
            self.rollouts = Rollouts(
                job, client, self.files, self.journal, recorder, call_ranks=lambda: ranks.call(SNAPSHOT)
            )
            self.observer = self._observer(self.rollouts.session)

    def _observer(self, session: str) -> Observer:
        """Hears every record from here on. The service's events go on after those that the files have."""
        job, config, out = self._job, self._job.config, self.files.output_dir
        since = [event["time"] for event in self.files.events() if event.get("source") == "service"]
        run = {"name": config.path.stem, "output_dir": str(out), "total_steps": job.total_steps}
        observer = Observer(
            config.base_url, service_token(), session, run, self.files.service_events, job.say, max(since, default=0.0)
        )
        self.files.records.on_lines = observer.take
        return observer

    def start(self) -> None:
        self.journal.run_started(self._job)
        self.rollouts.start()
        if self.observer is not None:
            self.observer.start()

    def took(self, batch: StepBatch) -> None:
        """A step begins to train on groups of its own."""
        config, self._in_training = self._job.config, batch
        self._has_reward = bool(self._has_reward) or bool(np.isfinite(batch.rewards_BF).any())
        if config.trl.log_completions and batch.step % config.logging_steps == 0:
            print_samples(self._job.console, batch, config.trl.num_completions_to_print)

    def trained(self, logprobs: Mapping[int, list[np.ndarray]]) -> None:
        """A step ended, or a run in the midst of one; `logprobs` are the learner's of the samples to show."""
        if self._in_training is not None:
            self.files.samples(self._in_training, self._job.config.samples_per_step, logprobs)
            self._in_training = None

    def state(self) -> dict[str, object]:
        """What a checkpoint keeps; its records are on the disk when it counts."""
        self.files.flush()
        return dict(self.rollouts.state())

    def finish(self, trainer: GRPOTrainer) -> None:
        """Saves first: the service can fail, and what was trained is kept. What is evaluated is what was saved."""
        model, job, out = trainer.accelerator.unwrap_model(trainer.model), self._job, self.files.output_dir
        state = None
        if is_sharded(model):
            self._ranks.call(WHOLE_STATE)
            state = whole_state(model, rounded_to(job.config), keep=True)
        save_final(model, trainer.processing_class, saved_dtype(job.config), out, state)
        if self._has_reward is False:
            raise UserCodeError(
                f"no completion of this run has a reward, so nothing was learned: {out} holds the model as it was. Either "
                "something failed each time, and a note above says what, or the reward functions returned None for all"
            )
        self.rollouts.finish(model)
        curve = self.files.learning_curve()
        if evaluations := self.files.evaluations():
            job.console.print(evaluation_table(evaluations))
        job.say(f"model: {out}\ncurve: {curve}\nsamples: {out / 'samples.jsonl'}")
        self.journal.event("run_finished", f"the run finished after {job.total_steps} steps", job.total_steps)

    def close(self, failed: bool) -> None:
        self.progress.stop()
        self.trained({})
        self.journal.flush()
        self.files.flush()
        if self.observer is not None:
            self.observer.close()
        if self.export is not None:
            self.export.close()
        self.trackers.close(failed)
        self.rollouts.close()
        self.files.close()


def _span_export(job: Job) -> SpanExport | None:
    """Nothing is imported where the environment asks for no traces."""
    if not wants_traces(os.environ):
        return None
    try:
        from rlx.learner.watch.otel import SpanExport, otlp_exporter
    except ImportError as error:
        job.say(f"note: the environment asks for OpenTelemetry traces, but {error}: pip install 'rlx[otel]'")
        return None
    return SpanExport(f"{job.config.path.stem}/{time.time()}", otlp_exporter(job.say))


def wants_traces(environ: Mapping[str, str]) -> bool:
    """By OpenTelemetry's variables."""
    exporters = environ.get("OTEL_TRACES_EXPORTER", "")
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or exporters == "none":
        return False
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return "otlp" in exporters.split(",") or any(environ.get(name) for name in endpoints)
