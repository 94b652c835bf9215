"""What the journal makes of a run: one event for each thing that happens, and spans that a timeline can be drawn from."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlx.episode import Episode, Row
from rlx.errors import ServiceUnavailable
from rlx.learner.incoming.courier import Served
from rlx.learner.incoming.tally import Arrived, Tally
from rlx.learner.watch.group_spans import ClockOffset, group_spans
from rlx.learner.watch.journal import Journal, unix
from rlx.learner.watch.phases import PhaseSpans
from rlx.learner.watch.records import Make, Record
from rlx.learner.weights.publish import PublishTimes
from rlx.wire import GroupResult, GroupTimes, RewardOutcome

ROW = Row(np.array([1, 2], np.int32), np.array([-0.5, -0.5], np.float32), ((3, 2),))
NOW = 1_700_000_000.0


class Sink:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.events: list[Record] = []
        self.spanned: list[Record] = []

    def event(self, record: Record) -> None:
        self.events.append(record)

    def spans(self, make: Make) -> None:
        self.spanned += make()

    def brief(self) -> list[tuple[Any, ...]]:
        return [(s["step"], s["name"], s["process"], s["track"]) for s in self.spanned]


def group(times: GroupTimes | None, *episodes: Episode, **reward: Any) -> GroupResult:
    values = np.zeros(len(episodes), np.float32)
    outcome = RewardOutcome("m.r", values, 0.25, **reward)
    return GroupResult("s/7.0", episodes, (outcome,), "rlx-rollout-1", 2.0, 0.25, times=times)


def arrived(result: GroupResult, sent_at: float = 10.0, arrived_at: float = 14.0) -> Arrived:
    return Arrived(result, 0, sent_at, arrived_at)


def told(events: list[Record]) -> list[tuple[str, int | None, str]]:
    return [(event["kind"], event["step"], event["text"]) for event in events]


def test_waits_that_follow_each_other_are_one_span_and_go_with_their_step() -> None:
    sink = Sink()
    journal = Journal(sink)
    journal.begin_step(4)
    journal.span("wait for rollouts", 1.0, 2.0)
    journal.span("wait for rollouts", 2.0005, 3.0)
    journal.span("wait for the publish", 3.0, 3.5)
    journal.span("wait for rollouts", 4.0, 5.0)
    assert sink.spanned == []
    journal.begin_step(5)
    journal.span("wait for rollouts", 5.0, 6.0)
    journal.flush()
    spans = [(s["step"], s["name"], s["start"] - unix(0), s["end"] - unix(0)) for s in sink.spanned]
    expected = [
        (4, "wait for rollouts", 1.0, 3.0),
        (4, "wait for the publish", 3.0, 3.5),
        (4, "wait for rollouts", 4.0, 5.0),
        (5, "wait for rollouts", 5.0, 6.0),
    ]
    assert [s[:2] for s in spans] == [s[:2] for s in expected]
    assert [s[2:] for s in spans] == [pytest.approx(s[2:], abs=1e-4) for s in expected]


def test_a_publish_is_drawn_in_its_phases_for_the_step_that_needs_it() -> None:
    sink = Sink()
    journal = Journal(sink, total_steps=4)
    ended = time.monotonic()
    times = PublishTimes(2.0, 0.75, 0.1, 5_000_000, 0.5, (), announce_s=0.25, commit_s=0.5, ended_at=ended)
    journal.published(Served(4, 9, times, 2, 0.5))
    journal.flush()
    assert [s["name"] for s in sink.spanned] == [
        "publish", "publish: encode", "publish: announce", "publish: transfer", "publish: commit"
    ]  # fmt: skip
    assert {s["step"] for s in sink.spanned} == {4}  # of the policy after the last step
    lengths = [s["end"] - s["start"] for s in sink.spanned]
    assert lengths == pytest.approx([2.0, 0.5, 0.25, 0.75, 0.5], abs=1e-4)
    assert sink.spanned[-1]["end"] == sink.spanned[0]["end"] == pytest.approx(unix(ended), abs=1e-4)
    [event] = sink.events
    assert (event["kind"], event["step"], event["version"], event["nbytes"]) == ("publish", 4, 9, 5_000_000)
    assert event["text"].startswith("weights version 9, the policy after step 4, are served: 5.0 MB in 2.00 s")


def test_a_groups_way_is_drawn_on_the_processes_that_it_took() -> None:
    times = GroupTimes(NOW, NOW + 1, NOW + 3, NOW + 3.5)
    turns = ((NOW + 1, NOW + 1.5), (NOW + 2, NOW + 3))
    episode = Episode((ROW,), "a", turns=2, process="rlx-episodes-0", turn_times=turns)
    result = group(times, episode, process="reward r.1", began_at=NOW + 3)
    spans = list(group_spans(12, result, NOW - 0.1, NOW + 3.6, NOW + 5, ClockOffset()))
    found = [(s["name"], s["process"], s["track"], s["start"] - NOW, s["end"] - NOW) for s in spans]
    expected = [
        ("group in flight", "learner rank 0", "groups in flight", -0.1, 3.6),
        ("group ready", "learner rank 0", "groups ready", 3.6, 5.0),
        ("queued", "gateway", "queue", 0.0, 1.0),
        ("generate", "rlx-rollout-1", "groups", 1.0, 3.0),
        ("episode", "rlx-episodes-0", "episodes", 1.0, 3.0),
        ("m.r", "reward r.1", "groups", 3.0, 3.25),
    ]
    assert [s[:3] for s in found] == [s[:3] for s in expected]
    assert [s[3:] for s in found] == [pytest.approx(s[3:], abs=1e-5) for s in expected]
    assert {s["args"]["group"] for s in spans} == {"s/7.0"}
    assert spans[3]["args"] == {"group": "s/7.0", "tokens": 2, "episodes": 1, "versions": [3]}
    assert spans[4]["args"]["turns"] == [[NOW + 1, NOW + 1.5], [NOW + 2, NOW + 3]]


def test_a_service_without_times_leaves_the_learners_part() -> None:
    spans = group_spans(1, group(None, Episode((ROW,), "a")), NOW, NOW + 1, NOW + 2, ClockOffset())
    assert [s["name"] for s in spans] == ["group in flight", "group ready"]


def test_a_clock_that_is_ahead_is_found_by_the_shortest_exchange_and_taken_off() -> None:
    offset = ClockOffset()
    for way in (4.0, 0.2, 3.0):  # there and back; of the long ones most on the way there
        there = way / 2 if way < 1 else way - 0.1
        received = NOW + there + 60.0
        offset.learn(NOW, GroupTimes(received, received, received + 5, received + 5), NOW + way + 5)
    assert offset.seconds == pytest.approx(60.0, abs=1e-6)
    assert offset.uncertainty_s == pytest.approx(0.1, rel=0.1)
    times = GroupTimes(NOW + 60.1, NOW + 60.1, NOW + 65.1, NOW + 65.1)
    spans = list(group_spans(1, group(times, Episode((ROW,), "a")), NOW, NOW + 5.2, NOW + 6, offset))
    assert [round(s["start"] - NOW, 3) for s in spans[2:]] == [0.1, 0.1]
    assert spans[2]["args"]["clock_offset_s"] == pytest.approx(60.0, abs=1e-5)


def test_what_may_be_the_way_is_no_offset_and_an_older_result_teaches_nothing() -> None:
    offset = ClockOffset()
    offset.learn(NOW, GroupTimes(NOW + 0.9, NOW + 1, NOW + 2, NOW + 2), NOW + 2.1)
    assert offset.seconds == 0.0
    offset.learn(NOW, GroupTimes(NOW - 100, NOW - 100, NOW - 50, NOW - 50), NOW + 0.1)
    offset.learn(NOW, None, NOW + 0.1)
    assert offset.seconds == 0.0


def test_clocks_that_drift_apart_are_followed() -> None:
    offset = ClockOffset()
    for second in range(400):
        drift, way = 0.01 * second, 0.2 if second == 0 else 0.21
        received = NOW + way / 2 + drift
        offset.learn(NOW, GroupTimes(received, received, received, received), NOW + way)
    assert offset.seconds == pytest.approx(3.99, abs=0.1)


def test_the_clocks_of_workers_are_told_apart() -> None:
    """With service.direct each node measures its groups."""
    sink = Sink()
    journal = Journal(sink)
    groups = []
    for worker, ahead in (("here", 0.0), ("there", 60.0)):
        received = unix(10.0) + ahead + 0.5
        times = GroupTimes(received, received, received + 3, received + 3)
        groups.append(arrived(replace(group(times, Episode((ROW,), "a")), worker=worker)))
    journal.took(1, groups, Tally())
    generated = {s["process"]: s for s in sink.spanned if s["name"] == "generate"}
    assert [round(generated[name]["start"] - unix(10.0), 3) for name in ("here", "there")] == [0.5, 0.5]
    assert "clock_offset_s" not in generated["here"]["args"]


def test_failures_are_counted_by_step_and_only_the_first_of_a_kind_brings_its_traceback() -> None:
    sink = Sink()
    journal = Journal(sink)
    lost = Episode((), "", "env_lost", error="env 'e' died")
    bad = group(None, Episode((ROW,), "a"), lost, outcome="exception", failed=2, error="Traceback: 1/0")
    journal.took(3, [arrived(bad), arrived(bad)], Tally())
    journal.took(4, [arrived(bad)], Tally())
    assert told(sink.events) == [
        ("reward_failure", 3, "step 3: m.r: exception; 4 completions have no reward"),
        ("episode_failure", 3, "step 3: env_lost; 2 completions have no reward"),
        ("reward_failure", 4, "step 4: m.r: exception; 2 completions have no reward"),
        ("episode_failure", 4, "step 4: env_lost; 1 completion has no reward"),
    ]
    assert [event.get("traceback") for event in sink.events] == ["Traceback: 1/0", "env 'e' died", None, None]


def test_what_came_to_nothing_is_one_event_of_its_step() -> None:
    sink = Sink()
    journal = Journal(sink)
    journal.took(2, [], Tally())
    assert sink.events == []
    journal.took(3, [], Tally(discarded_tokens=120, put_back=2, filtered=1))
    [event] = sink.events
    assert (event["kind"], event["step"]) == ("discard", 3)
    assert (event["requeued"], event["filtered"], event["tokens"]) == (2, 1, 120)
    assert event["text"] == (
        "step 3: groups sampled again: 2, groups without spread in their rewards: 1, tokens not trained: 120"
    )


def test_the_end_of_a_run_names_its_first_cause() -> None:
    sink = Sink()
    journal = Journal(sink, step=5)
    journal.service_lost("the connection was refused")
    journal.service_back(2.5, is_new=True)
    journal.run_failed(ServiceUnavailable("nobody answers"))
    journal.run_failed(KeyboardInterrupt())
    assert told(sink.events) == [
        ("service_lost", 5, "the rollout service is lost: the connection was refused"),
        (
            "service_back",
            5,
            "the rollout service answers again after 2.5 s: another process, which gets the weights again",
        ),
        ("run_failed", 5, "learner rank 0 ended with ServiceUnavailable: nobody answers"),
        ("run_failed", 5, "the run was interrupted"),
    ]
    assert "traceback" not in sink.events[2]


class Ranks:
    """Two ranks, of which the other one's numbers are `other`."""

    def __init__(self, rank: int, other: list[float]):
        self.rank, self.size, self._other = rank, 2, other

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        assert not values[1 - self.rank].any()
        values[1 - self.rank] = torch.tensor(self._other, dtype=torch.float64)
        return values


def test_the_phases_of_every_rank_are_on_rank_zeros_timeline() -> None:
    sink = Sink()
    journal = Journal(sink, step=3)
    phases = PhaseSpans(journal, Ranks(0, [NOW, NOW + 2, NOW + 2.5]))  # type: ignore[arg-type]
    state = SimpleNamespace(global_step=3)
    before = time.monotonic()
    phases.begin()
    phases.on_pre_optimizer_step(None, state, None)
    phases.on_optimizer_step(None, state, None)
    phases.on_step_end(None, state, None)
    phases.on_save(None, state, None)
    after = time.monotonic()
    journal.flush()
    assert sink.brief() == [
        (3, "forward and backward", "learner rank 0", "training"),
        (3, "optimizer", "learner rank 0", "training"),
        (3, "forward and backward", "learner rank 1", "training"),
        (3, "optimizer", "learner rank 1", "training"),
        (3, "checkpoint", "learner rank 0", "training"),
    ]
    mine = [time for s in sink.spanned if s["process"] == "learner rank 0" for time in (s["start"], s["end"])]
    assert mine == sorted(mine)
    assert unix(before) - 1e-3 < mine[0] <= mine[-1] < unix(after) + 1e-3
    other = [(s["start"], s["end"]) for s in sink.spanned if s["process"] == "learner rank 1"]
    assert other == [(NOW, NOW + 2), (NOW + 2, NOW + 2.5)]
    assert told(sink.events)[0][:2] == ("checkpoint", 3)
    assert sink.events[0]["folder"] == "checkpoint-3"


def test_a_journal_without_files_forgets_everything() -> None:
    journal = Journal()
    journal.span("wait", 1.0, 2.0)
    journal.event("publish", "x")
    journal.took(1, [arrived(group(None, Episode((), "", "aborted")))], Tally(put_back=1))
    journal.run_failed(ValueError("x"))
    journal.flush()
    assert journal._spans == []
