"""What only rank 0 has: the run's files, its journal, the terminal, and the rollouts.

Rollouts or Replay ─► Journal ─► RunFiles ─► Observer ─► the gateway
"""

from __future__ import annotations

from pathlib import Path

from rlx.learner.checkpoints import save_final
from rlx.learner.job import Job
from rlx.learner.journal import Journal
from rlx.learner.model import saved_dtype
from rlx.learner.progress import ProgressReport
from rlx.learner.recording import Codec, Recorder, Replay
from rlx.learner.report import RunFiles, evaluation_table, print_samples
from rlx.learner.rollouts import Rollouts
from rlx.learner.run_record import write_run_record
from rlx.learner.stream import StepBatch
from rlx.learner.trackers import Trackers
from rlx.learner.trainer import GRPOTrainer
from rlx.rollout.client import RolloutClient


class RankZero:
    """`client` is None where the rollouts are replayed. `close` ends everything, whatever happened before."""

    def __init__(self, job: Job, client: RolloutClient | None, codec: Codec):
        config, first = job.config, job.first_step
        self._job = job
        self.rollouts: Rollouts | Replay
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
        self.journal = Journal(self.files, first, job.total_steps)
        self.progress = ProgressReport(job.console, self.files)
        self.trackers = Trackers(config, job.resume.step if job.resume else None, job.console)
        self.files.listeners.append(self.trackers.record)
        self.callbacks = [self.trackers, self.progress]
        if client is not None:
            recorder = Recorder(self.files.output_dir, codec, first) if config.record_rollouts else None
            self.rollouts = Rollouts(job, client, self.files, self.journal, recorder)

    def start(self) -> None:
        self.journal.run_started(self._job)
        self.rollouts.start()

    def took(self, batch: StepBatch) -> None:
        """A step begins to train on groups of its own."""
        config = self._job.config
        self.files.samples(batch, config.samples_per_step)
        if config.trl.log_completions and batch.step % config.logging_steps == 0:
            print_samples(self._job.console, batch, config.trl.num_completions_to_print)

    def state(self) -> dict[str, object]:
        """What a checkpoint keeps; its records are on the disk when it counts."""
        self.files.flush()
        return dict(self.rollouts.state())

    def finish(self, trainer: GRPOTrainer) -> None:
        """Saves first: the service can fail, and what was trained is kept. What is evaluated is what was saved."""
        model, job, out = trainer.accelerator.unwrap_model(trainer.model), self._job, self.files.output_dir
        save_final(model, trainer.processing_class, saved_dtype(job.config), out)
        self.rollouts.finish(model)
        curve = self.files.learning_curve()
        if evaluations := self.files.evaluations():
            job.console.print(evaluation_table(evaluations))
        job.say(f"model: {out}\ncurve: {curve}\nsamples: {out / 'samples.jsonl'}")
        self.journal.event("run_finished", f"the run finished after {job.total_steps} steps", job.total_steps)

    def close(self, failed: bool) -> None:
        self.progress.stop()
        self.journal.flush()
        self.files.flush()
        self.trackers.close(failed)
        self.rollouts.close()
