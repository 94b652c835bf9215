"""What happens in a run, told by whoever sees it, as the events and spans that its files keep.

    feed, courier, rollouts, trainer's callbacks (any thread) ─► Journal ─► events.jsonl
                                                                       └──► spans.jsonl, a step's at a time

Steps are numbered as in metrics.jsonl, the first is 1; the publish and the evaluation of the policy after step n are
part of step n + 1, which waits for them. Times are unix seconds of this process's clock, which never goes back.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from rlx.learner.incoming.courier import Served
from rlx.learner.incoming.tally import Arrived, Tally
from rlx.learner.job import Job
from rlx.learner.watch.group_spans import LEARNER, ClockOffset, group_spans, span
from rlx.learner.watch.records import Make, Record, event_record, failure_record
from rlx.wire import GroupResult

_UNIX_AT_ZERO = time.time() - time.monotonic()
_GAP_S = 0.002
"""Spans of one name that are no farther apart are one."""


def unix(monotonic_s: float) -> float:
    """Unix seconds of a time on time.monotonic()."""
    return monotonic_s + _UNIX_AT_ZERO


class Sink(Protocol):
    """What this needs of `rlx.learner.watch.report.RunFiles`."""

    def event(self, record: Record) -> None: ...
    def spans(self, make: Make) -> None: ...


class Journal:
    """Without a `sink` it forgets everything. `step` is the one that is being worked on."""

    def __init__(self, sink: Sink | None = None, step: int = 0, total_steps: int = 2**62):
        self._sink, self.step, self._total_steps = sink, step, total_steps
        self._lock = threading.Lock()
        self._spans: list[Record] = []
        self._failures: set[str] = set()
        self._offsets: defaultdict[str, ClockOffset] = defaultdict(ClockOffset)
        """By worker: with service.direct each node measures its groups"""

    def event(self, kind: str, text: str, step: int | None = None, **details: Any) -> None:
        """`text` is one readable sentence."""
        if self._sink is not None:
            self._sink.event(event_record(kind, text, step, **details))

    def span(self, name: str, start: float, end: float) -> None:
        """Of the training's thread, in the present step; `start` and `end` on time.monotonic()."""
        self.add(span(self.step, name, LEARNER, "training", unix(start), unix(end), {}))

    def add(self, record: Record) -> None:
        """A span. One that follows another of its name goes on with that."""
        if self._sink is None:
            return
        with self._lock:
            for last in reversed(self._spans[-4:]):
                if _goes_on(last, record):
                    last["end"] = record["end"]
                    return
            self._spans.append(record)

    def begin_step(self, step: int) -> None:
        """From here on it is `step` that is worked on."""
        self.step = step
        self.flush()

    def flush(self) -> None:
        with self._lock:
            spans, self._spans = self._spans, []
        if spans and self._sink is not None:
            self._sink.spans(lambda: spans)

    def run_started(self, job: Job) -> None:
        config, plan = job.config, job.plan
        if job.resume is not None:
            self.event("resumed", f"the run goes on after step {job.resume.step}, from {job.resume.folder}",
                       job.resume.step, folder=str(job.resume.folder), total_steps=job.total_steps)  # fmt: skip
            return
        self.event(
            "run_started",
            f"{config.path.name}: {job.total_steps} steps of {plan.prompts_per_batch} × {plan.num_generations} completions, "
            f"{config.base_model}",
            0, total_steps=job.total_steps, processes=plan.num_processes,
        )  # fmt: skip

    def run_failed(self, error: BaseException) -> None:
        """The first cause; a traceback where it is no error of a user."""
        record = failure_record(error)
        if self._sink is not None:
            self._sink.event(record | {"step": self.step})

    # --- the feed's and the courier's -----------------------------------------------------------------------------

    def published(self, served: Served) -> None:
        """Weights are served."""
        times, end = served.times, served.times.ended_at or time.monotonic()
        step, start = min(served.step + 1, self._total_steps), end - served.times.total_s
        marks = [end - times.commit_s - times.transfer_s - times.announce_s, end - times.commit_s - times.transfer_s]
        marks = [start, *marks, end - times.commit_s, end]
        args = {"version": served.version, "bytes": times.nbytes, "pause_s": times.pause_s}
        self.add(span(step, "publish", LEARNER, "publishing", unix(start), unix(end), args))
        for name, a, b in zip(("encode", "announce", "transfer", "commit"), marks, marks[1:], strict=False):
            if b > a:
                self.add(span(step, f"publish: {name}", LEARNER, "publishing", unix(a), unix(b), {}))
        behind = f"; behind: {', '.join(times.behind)}" if times.behind else ""
        self.event(
            "publish",
            f"weights version {served.version}, the policy after step {served.step}, are served: {times.nbytes / 1e6:.1f} MB "
            f"in {times.total_s:.2f} s, workers paused for {times.pause_s:.2f} s{behind}",
            served.step, version=served.version, seconds=times.total_s, transfer_s=times.transfer_s,
            pause_s=times.pause_s, nbytes=times.nbytes, workers=served.workers, behind=list(times.behind),
        )  # fmt: skip

    def evaluated(self, step: int, text: str, seconds: float, **details: Any) -> None:
        """The policy after `step` was evaluated; it just ended."""
        end, number = time.monotonic(), min(step + 1, self._total_steps)
        self.add(span(number, "evaluation", LEARNER, "publishing", unix(end - seconds), unix(end), {}))
        self.event("evaluation", text, step, seconds=seconds, **details)

    def took(self, step: int, groups: Sequence[Arrived], tally: Tally) -> None:
        """`step` begins to train on `groups`; `tally` is what came to nothing on the way."""
        if self._sink is None:
            return
        now = time.monotonic()
        self._sink.spans(lambda: self._group_spans(step, groups, now))
        self._look_for_failures(step, [arrived.group for arrived in groups])
        counts = {"groups sampled again": tally.put_back, "groups without spread in their rewards": tally.filtered,
                  "tokens not trained": tally.discarded_tokens}  # fmt: skip
        if said := [f"{what}: {count}" for what, count in counts.items() if count]:
            self.event("discard", f"step {step}: {', '.join(said)}", step, requeued=tally.put_back,
                       filtered=tally.filtered, tokens=tally.discarded_tokens)  # fmt: skip

    def saved(self, step: int, start: float, end: float) -> None:
        """The checkpoint after `step` counts; `start` and `end` on time.monotonic()."""
        self.span("checkpoint", start, end)
        folder = f"checkpoint-{step}"
        self.event("checkpoint", f"{folder} is complete, after {end - start:.2f} s", step, seconds=end - start,
                   folder=folder)  # fmt: skip

    def service_lost(self, cause: str) -> None:
        self.event("service_lost", f"the rollout service is lost: {cause}", self.step)

    def service_back(self, seconds: float, is_new: bool) -> None:
        what = "another process, which gets the weights again" if is_new else "the same process"
        self.event("service_back", f"the rollout service answers again after {seconds:.1f} s: {what}", self.step,
                   seconds=seconds, is_new=is_new)  # fmt: skip

    # ----------------------------------------------------------------------------------------------------------------

    def _group_spans(self, step: int, groups: Sequence[Arrived], taken_at: float) -> Iterator[Record]:
        sent_arrived = [(unix(arrived.sent_at), unix(arrived.arrived_at)) for arrived in groups]
        for arrived, (sent, there) in zip(groups, sent_arrived, strict=True):
            self._offsets[arrived.group.worker].learn(sent, arrived.group.times, there)
        for arrived, (sent, there) in zip(groups, sent_arrived, strict=True):
            yield from group_spans(
                step, arrived.group, sent, there, unix(taken_at), self._offsets[arrived.group.worker]
            )

    def _look_for_failures(self, step: int, groups: Iterable[GroupResult]) -> None:
        """An event for each way in which something failed in this step; the first of its kind has the traceback."""
        found: Counter[tuple[str, str]] = Counter()
        first: dict[tuple[str, str], str] = {}
        for group in groups:
            for reward in group.rewards:
                if reward.outcome != "ok":
                    what = ("reward_failure", f"{reward.name}: {reward.outcome}")
                    found[what] += reward.failed
                    first.setdefault(what, reward.error)
            for episode in group.episodes:
                if not episode.scorable:
                    found["episode_failure", episode.status] += 1
                    first.setdefault(("episode_failure", episode.status), episode.error)
        for (kind, name), count in found.items():
            is_new = name not in self._failures
            self._failures.add(name)
            cause = {"traceback": first[kind, name]} if is_new else {}
            plural = "completion has no reward" if count == 1 else "completions have no reward"
            self.event(kind, f"step {step}: {name}; {count} {plural}", step, name=name, count=count, **cause)


def _goes_on(last: Record, record: Record) -> bool:
    same = all(last[key] == record[key] for key in ("step", "name", "process", "track", "args"))
    return same and 0 <= record["start"] - last["end"] < _GAP_S
