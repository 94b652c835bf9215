"""Where a step's time went, which side the run waits for, and the split of workers and learner that would balance it.

    feed (rank 0): waits, publish, ages, tokens, workers ─► StepTimes ◄─ trainer: step_s, fwd_bwd_s
                                        StepTimes.mean of the steps of a log line ─► metrics(), line()

Pure: no clock, no I/O; any thread may call anything here. Not here: measuring (`incoming/feed.py`, `trainer.py`), printing
(`progress.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

Verdict = Literal["generation-bound", "reward-bound", "learner-bound", "publish-bound", "staleness-bound", "balanced"]

_NEGLIGIBLE = 0.1
"""Share of a step; what is below says nothing of what bounds it."""
_BUSY = 0.85
"""Share of the time from which on a worker has no more to give."""
_EVEN = 0.55
_SLACK = 0.1
"""Workers less than needed that make no difference."""
_FARTHEST = 8
_TINY_S = 1e-9


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
    """From the announcement to the commit of the publish that ended in this step; 0 where none did"""
    weight_sync_snapshot_s: float = 0.0
    """Before that: the copy of the parameters, and the probe's log-probs"""
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
            "perf/weight_sync_snapshot_s": self.weight_sync_snapshot_s,
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

    def logs(self) -> dict[str, float | str]:
        """`metrics`, with the verdict for metrics.jsonl as `bottleneck` and for the terminal as `bottleneck_line`."""
        return {**self.metrics(), "bottleneck": self.headline(), "bottleneck_line": self.line()}

    @property
    def learner_s(self) -> float:
        """What a step would take if no group were missing."""
        return max(self.fwd_bwd_s, self.step_s - self.rollout_wait_s, _TINY_S)

    @property
    def publish_wait_s(self) -> float:
        """In which training stood still for a publish. Where that runs beside it, the snapshot is the learner's own work."""
        own_s = self.weight_sync_snapshot_s if self.max_staleness >= 1 else 0.0
        return max(0.0, self.weight_sync_wait_s - own_s)

    def share(self, seconds: float) -> float:
        return min(1.0, seconds / self.step_s) if self.step_s > 0 else 0.0

    def verdict(self) -> Verdict:
        """What would have to be faster for the step to be.

        At max_staleness 0 the phases follow each other: the longest; balanced when neither the rollouts nor the rest
        take over 55 % of the step. Above, they overlap, and what training waited for over 10 % of the step is it:
        publish-bound for the publish before, otherwise rollouts that were missing, of which reward-bound and
        staleness-bound are those that left the workers idle. Where training did not wait, it is learner-bound unless
        the workers were hardly idle either.
        """
        waited, published = self.share(self.rollout_wait_s), self.share(self.publish_wait_s)
        if self.max_staleness < 1:
            if published > max(waited, self.share(self.fwd_bwd_s)):
                return "publish-bound"
            if max(waited, 1 - waited) <= _EVEN:
                return "balanced"
            return "learner-bound" if waited < 1 - waited else self._slow_rollouts()
        if max(waited, published) <= _NEGLIGIBLE:
            return "balanced" if self.worker_busy > _BUSY else "learner-bound"
        return "publish-bound" if published > waited else self._slow_rollouts()

    def _slow_rollouts(self) -> Verdict:
        if self.reward_s > self.generation_s and not self.worker_busy > _BUSY:
            return "reward-bound"
        idle = self.worker_busy <= _BUSY  # not where it is unknown
        return "staleness-bound" if idle and self.max_staleness >= 1 else "generation-bound"

    def suggestion(self) -> str:
        """What would balance it, from the measured rates; empty where nothing is known to help.

        Workers and learner processes are taken to scale linearly, which is why nothing above 8 times is named.
        """
        verdict = self.verdict()
        if self.step_s <= 0:
            return ""
        if self.max_staleness < 1:
            return self._overlapped()
        if verdict == "generation-bound":
            return self._more_workers()
        if verdict == "learner-bound":
            return self._fewer_workers_or_more_processes()
        if verdict == "staleness-bound":
            return f"async.max_staleness: {self.max_staleness + 1:.0f} would let the workers go further ahead"
        if verdict == "reward-bound":
            return "more rewards.workers, or faster rewards, would balance it"
        rolls = verdict == "publish-bound" and self.weight_sync_pause_s > self.weight_sync_s / 2 and self.workers > 1
        return "async.publish: rolling would let the other workers go on" if rolls else ""

    def _overlapped(self) -> str:
        """How much faster a step is that is as long as its longest phase."""
        phases = (self.rollout_wait_s, self.fwd_bwd_s, self.weight_sync_wait_s)
        gain = sum(phases) / max(*phases, _TINY_S)
        return f"async.max_staleness: 1 would overlap them, at most {gain:.1f} times as fast" if gain >= 1.1 else ""

    def _more_workers(self) -> str:
        if self.shares_cpu:
            return ""
        busy = 1.0 if math.isnan(self.worker_busy) else self.worker_busy
        needed = self.workers * busy * self.step_s / self.learner_s
        if needed > _FARTHEST * self.workers:
            return f"{_FARTHEST} times the workers would not be too many"
        more = math.ceil(needed - self.workers - _SLACK)
        return f"{_count(more, 'more worker')} would balance it" if more > 0 else ""

    def _fewer_workers_or_more_processes(self) -> str:
        if self.shares_cpu or math.isnan(self.worker_busy):
            return ""
        enough = max(1, math.ceil(self.workers * self.worker_busy - _SLACK))
        fewer = f"{enough} of the {self.workers:.0f} workers would do" if enough < round(self.workers) else ""
        faster = round(self.processes / max(self.worker_busy, _TINY_S))
        known = round(self.processes) < faster <= _FARTHEST * self.processes
        more = f"{faster} learner processes would keep them busy" if known else ""
        return ", or ".join(text for text in (fewer, more) if text)

    def headline(self) -> str:
        """The verdict and what it suggests."""
        suggestion = self.suggestion()
        return f"{self.verdict()}: {suggestion}" if suggestion else self.verdict()

    def line(self) -> str:
        """The verdict, what it comes from, and what it suggests."""
        published = self.share(self.publish_wait_s)
        waited = f" for rollouts and {published:.0%} for publishing" if published > _NEGLIGIBLE else ""
        idle = "" if math.isnan(self.worker_busy) else f", workers idle {max(0.0, 1 - self.worker_busy):.0%}"
        parts = [
            f"{self.verdict()}: learner waited {self.share(self.rollout_wait_s):.0%}{waited}{idle}, publish "
            f"{self.weight_sync_s:.2f} s (paused {self.weight_sync_pause_s:.2f}), rewards {self.reward_s:.2f} s, age "
            f"{self.in_flight_s:.1f} + {self.queue_s:.1f} s, {self.discarded_tokens:.0f} tokens discarded",
            self.suggestion(),
        ]
        return "; ".join(part for part in parts if part)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
