"""Where a step's time went, which side the run waits for, and the split of workers and learner that would balance it.

    feed (rank 0): waits, publish, ages, tokens, workers ─► StepTimes ◄─ trainer: step_s, fwd_bwd_s
                                        StepTimes.mean of the steps of a log line ─► metrics(), line()

Pure: no clock, no I/O; any thread may call anything here. Not here: measuring (`feed.py`, `trainer.py`), printing
(`progress.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

Verdict = Literal["generation-bound", "reward-bound", "learner-bound", "publish-bound", "staleness-bound", "balanced"]


@dataclass(frozen=True)
class StepTimes:
    """One optimizer step as rank 0 saw it, or the mean of several. Seconds where the name ends in _s."""

    step_s: float = 0.0
    """From the end of one optimizer step to the end of the next, without `eval_s`"""
    rollout_wait_s: float = 0.0
    """In which training stood still for groups that were not there"""
    fwd_bwd_s: float = 0.0
    """Forward, backward and optimizer"""
    weight_sync_wait_s: float = 0.0
    """In which training stood still for publishing: the snapshot, and waiting for the publish before; at max_staleness
    0 all of `weight_sync_s`"""
    weight_sync_s: float = 0.0
    """From snapshot to commit of the publish that ended in this step; 0 where none did"""
    weight_sync_transfer_s: float = 0.0
    weight_sync_pause_s: float = 0.0
    """The longest that a worker paused to swap"""
    eval_s: float = 0.0
    """In which training stood still for an evaluation"""
    generation_s: float = 0.0
    """Mean `GroupResult.generation_s` of the step's groups"""
    reward_s: float = 0.0
    """Mean `GroupResult.reward_s`"""
    in_flight_s: float = 0.0
    """Mean age of the step's groups: from their submission to their arrival at the learner ..."""
    queue_s: float = 0.0
    """... and from there to the step that trains them"""
    staleness_mean: float = 0.0
    staleness_max: float = 0.0
    generated_tokens: float = 0.0
    """Sampled tokens of the groups that arrived during the step, trained or not"""
    discarded_tokens: float = 0.0
    """Sampled tokens of groups that were too old, left out or cancelled, as far as they are known"""
    worker_busy: float = math.nan
    """Mean over the workers of the share of the step in which each had a sequence; NaN where unknown"""
    workers: float = 1.0
    processes: float = 1.0
    max_staleness: float = 0.0
    shares_cpu: float = 0.0
    """1 where learner and workers compute on the cores of one machine, so that more of either slows the other"""

    @staticmethod
    def mean(steps: Sequence[StepTimes]) -> StepTimes:
        """Field by field, over the values that are known; of `staleness_max` the greatest. `steps` is not empty."""
        columns = {f.name: [v for s in steps if not math.isnan(v := getattr(s, f.name))] for f in fields(StepTimes)}
        means = {name: sum(values) / len(values) if values else math.nan for name, values in columns.items()}
        return StepTimes(**means | {"staleness_max": max(columns["staleness_max"])})

    def metrics(self) -> dict[str, float]:
        """By the names of metrics.jsonl. `perf/eval_s` and `rollout/worker_busy` only where there is something."""
        names = {"perf/eval_s": self.eval_s} if self.eval_s else {}
        if not math.isnan(self.worker_busy):
            names["rollout/worker_busy"] = self.worker_busy
        return names | {
            "perf/step_s": self.step_s,
            "perf/rollout_wait_s": self.rollout_wait_s,
            "perf/fwd_bwd_s": self.fwd_bwd_s,
            "perf/weight_sync_wait_s": self.weight_sync_wait_s,
            "perf/weight_sync_s": self.weight_sync_s,
            "perf/weight_sync_transfer_s": self.weight_sync_transfer_s,
            "perf/weight_sync_pause_s": self.weight_sync_pause_s,
            "rollout/generation_s": self.generation_s,
            "rollout/reward_s": self.reward_s,
            "rollout/generated_tok_s": self.generated_tokens / self.step_s if self.step_s > 0 else 0.0,
            "rollout/discarded_tokens": self.discarded_tokens,
            "rollout/workers": self.workers,
            "sample/staleness_mean": self.staleness_mean,
            "sample/staleness_max": self.staleness_max,
            "sample/age_in_flight_s": self.in_flight_s,
            "sample/age_in_queue_s": self.queue_s,
        }
