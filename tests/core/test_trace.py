"""Timelines by hand: the shape that viewers take, lanes, arrows, and everything that a folder may hold instead."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from rlx.cli import app
from rlx.errors import ConfigError, DatasetError
from rlx.trace import Span, chrome_trace, read_spans

NOW = 1_700_000_000.0
LEARNER = "learner rank 0"


def span(name: str, start: float, end: float, process: str = LEARNER, track: str = "training", **args: Any) -> Span:
    return Span(step=12, name=name, process=process, track=track, start=NOW + start, end=NOW + end, args=args)


def group(key: str, at: float, turns: Any = None) -> list[Span]:
    """Sent at `at`: queued for 1 s, generated in 2, scored in 1, 1 s ready; `turns` of its one episode."""
    episode = [span("episode", at + 1, at + 3, "rlx-episodes-0", "episodes", group=key, turns=turns)] if turns else []
    return [
        span("group in flight", at, at + 4, track="groups in flight", group=key),
        span("queued", at, at + 1, "gateway", "queue", group=key),
        span("generate", at + 1, at + 3, "rlx-rollout-0", "groups", group=key, tokens=64),
        *episode,
        span("rewards.length", at + 3, at + 4, "reward length", "groups", group=key),
        span("group ready", at + 4, at + 5, track="groups ready", group=key),
    ]


STEP = [
    *group("s/0.0", 0.0),
    *group("s/1.0", 0.5),
    span("wait for rollouts", 0.0, 5.0),
    span("forward and backward", 5.0, 8.0),
    span("optimizer", 8.0, 8.5),
    span("publish", 9.0, 10.0, track="publishing"),
    span("publish: transfer", 9.2, 9.6, track="publishing"),
]


def of(events: list[dict[str, Any]], phase: str) -> list[dict[str, Any]]:
    return [event for event in events if event["ph"] == phase]


def check_rules(trace: dict[str, Any]) -> None:
    """Of the Trace Event Format: known phases with their fields; slices of one lane nest or follow each other; each
    arrow begins once, ends once, and touches a slice wherever it is."""
    events = trace["traceEvents"]
    json.dumps(trace, allow_nan=False)
    assert {event["ph"] for event in events} <= {"X", "M", "s", "t", "f"}
    named = {(e["pid"], e["tid"]) for e in of(events, "M") if e["name"] == "thread_name"}
    processes = {e["pid"] for e in of(events, "M") if e["name"] == "process_name"}
    lanes = defaultdict(list)
    for event in of(events, "X"):
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert isinstance(event["name"], str)
        assert event["pid"] in processes
        assert (event["pid"], event["tid"]) in named
        assert isinstance(event["ts"], int)
        assert isinstance(event["dur"], int)
        lanes[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for slices in lanes.values():
        ends: list[int] = []
        for start, end in sorted(slices, key=lambda s: (s[0], -s[1])):
            while ends and ends[-1] <= start:
                ends.pop()
            assert not ends or end <= ends[-1]
            ends.append(end)
    flows = defaultdict(list)
    for event in [*of(events, "s"), *of(events, "t"), *of(events, "f")]:
        flows[event["id"]].append(event)
        touched = lanes[event["pid"], event["tid"]]
        assert any(start <= event["ts"] <= end for start, end in touched)
    for flow in flows.values():
        flow.sort(key=lambda event: (event["ts"], "stf".index(event["ph"])))
        assert Counter(event["ph"] for event in flow)["s"] == Counter(event["ph"] for event in flow)["f"] == 1
        assert (flow[0]["ph"], flow[-1]["ph"]) == ("s", "f")


def names_of(trace: dict[str, Any], kind: str) -> list[str]:
    return [event["args"]["name"] for event in of(trace["traceEvents"], "M") if event["name"] == kind]


def test_a_step_is_drawn_on_its_processes_from_its_first_span_on() -> None:
    trace = chrome_trace(STEP)
    check_rules(trace)
    assert names_of(trace, "process_name") == [LEARNER, "gateway", "rlx-rollout-0", "reward length"]
    [forward] = [e for e in of(trace["traceEvents"], "X") if e["name"] == "forward and backward"]
    assert (forward["ts"], forward["dur"], forward["args"]) == (5_000_000.0, 3_000_000.0, {"step": 12})
    [whole] = [e for e in of(trace["traceEvents"], "X") if e["name"] == "step 12"]
    assert (whole["ts"], whole["dur"]) == (0.0, 8_500_000.0)
    assert trace["otherData"]["begins_at_unix_s"] == NOW


def test_groups_side_by_side_have_lanes_of_their_own_and_phases_nest_in_one() -> None:
    trace = chrome_trace(STEP)
    slices = of(trace["traceEvents"], "X")
    assert len({e["tid"] for e in slices if e["name"] == "generate"}) == 2
    assert len({e["tid"] for e in slices if e["name"].startswith("publish")}) == 1
    assert sorted(name for name in names_of(trace, "thread_name") if name.startswith("groups")) == [
        "groups", "groups", "groups 2", "groups 2", "groups in flight", "groups in flight 2", "groups ready",
        "groups ready 2",
    ]  # fmt: skip


def test_arrows_follow_a_group_from_the_queue_over_its_rewards_to_the_step() -> None:
    trace = chrome_trace(group("s/0.0", 0.0))
    slices = {(e["pid"], e["tid"], e["ts"]): e["name"] for e in of(trace["traceEvents"], "X")}
    arrows = [e for e in trace["traceEvents"] if e["ph"] in "stf"]
    assert [e["ph"] for e in arrows] == ["s", "t", "t", "f"]
    way = [slices[e["pid"], e["tid"], e["ts"]] for e in arrows]
    assert way == ["queued", "generate", "rewards.length", "group ready"]


def test_turns_are_drawn_within_their_episode() -> None:
    turns = [[NOW + 1, NOW + 1.5], [NOW + 2.25, NOW + 3.5]]  # the last one ended after a clock was set
    trace = chrome_trace(group("s/0.0", 0.0, turns))
    check_rules(trace)
    drawn = [e for e in of(trace["traceEvents"], "X") if e["name"].startswith("turn ")]
    assert [(e["name"], e["ts"], e["dur"]) for e in drawn] == [("turn 0", 1e6, 5e5), ("turn 1", 2.25e6, 7.5e5)]
    [episode] = [e for e in of(trace["traceEvents"], "X") if e["name"] == "episode"]
    assert {e["tid"] for e in drawn} == {episode["tid"]}
    assert "turns" not in episode["args"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b"]), st.integers(0, 30), st.integers(0, 20), st.none() | st.sampled_from("xyz")
        ),
        min_size=1,
        max_size=25,
    )
)
@settings(max_examples=100, deadline=None)
def test_however_spans_overlap_the_rules_hold(given: list[tuple[str, int, int, str | None]]) -> None:
    spans = [
        span("s", start / 10, (start + length) / 10, "p", track, **({"group": key} if key else {}))
        for track, start, length, key in given
    ]
    trace = chrome_trace(sorted(spans, key=lambda s: (s.start, -s.end)))
    check_rules(trace)
    drawn = sorted((e["ts"], e["dur"]) for e in of(trace["traceEvents"], "X"))
    begin = min(start for _, start, _, _ in given)
    expected = sorted(((start - begin) * 100_000, length * 100_000) for _, start, length, _ in given)
    assert [pytest.approx(pair, abs=1) for pair in expected] == drawn


def test_spans_that_only_rounding_lets_overlap_share_a_lane() -> None:
    spans = [span("r", i, i + 1.0001, "reward", "groups", group=str(i)) for i in range(3)]
    trace = chrome_trace(spans)
    check_rules(trace)
    assert len(names_of(trace, "thread_name")) == 1


def write(folder: Path, name: str, *steps: int, cut: int = 0) -> None:
    lines = "".join(
        json.dumps({"step": step, "name": f"n{step}", "process": "p", "track": "t", "start": 1.0, "end": 2.0}) + "\n"
        for step in steps
    )
    (folder / name).write_text(lines[: len(lines) - cut])


def test_spans_come_from_all_parts_of_the_file_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, "spans.2.jsonl", 1, 2)
    write(tmp_path, "spans.1.jsonl", 2, 3)
    write(tmp_path, "spans.jsonl", 3, 4, cut=9)
    (tmp_path / "spans.old.jsonl").write_text("nothing of ours")
    assert [s.step for s in read_spans(tmp_path, range(2, 5))] == [2, 2, 3, 3]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (None, ConfigError, "no such folder"),
        ([], DatasetError, r"has no spans\.jsonl"),
        (["empty"], DatasetError, r"no spans of step 12\. It has none yet"),
        (["spans"], DatasetError, r"no spans of step 12\. It has steps 1 to 3"),
    ],
)
def test_a_folder_without_the_step_says_what_it_has(
    tmp_path: Path, names: list[str] | None, error: type[Exception], message: str
) -> None:
    folder = tmp_path / "out"
    if names is not None:
        folder.mkdir()
        if names:
            write(folder, "spans.jsonl", *([1, 3] if names == ["spans"] else []))
    with pytest.raises(error, match=message):
        read_spans(folder, range(12, 13))


def test_the_command_writes_the_file_and_names_it(tmp_path: Path) -> None:
    write(tmp_path, "spans.jsonl", 1, 2, 3)
    run = CliRunner()
    done = run.invoke(app, ["trace", str(tmp_path), "--step", "2:3"])
    assert (done.exit_code, (tmp_path / "trace-2-3.json").is_file()) == (0, True)
    assert "2 spans of step 2-3, 1.00 s" in done.output
    check_rules(json.loads((tmp_path / "trace-2-3.json").read_text()))
    assert run.invoke(app, ["trace", str(tmp_path), "--step", "2", "--out", str(tmp_path / "t.json")]).exit_code == 0
    assert (tmp_path / "t.json").is_file()
    refused = run.invoke(app, ["trace", str(tmp_path), "--step", "2", "--out", str(tmp_path / "no" / "t.json")])
    assert refused.exit_code != 0
    assert "cannot be written" in refused.output
    assert run.invoke(app, ["trace", str(tmp_path), "--step", "x"]).exit_code != 0
