"""Files of records: appended, bounded, whole after any crash, and never in the way of who writes."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from fake_service import lines
from hypothesis import given, settings
from hypothesis import strategies as st

from rlx.learner.watch.records import PARTS, RecordFiles, append_event, encode, event_record, failure_record
from rlx.learner.watch.report import RunFiles
from rlx.view.tail import parts

FLUSH_S = 60.0


def filled(folder: Path, steps: range, max_bytes: int = 2**30, **more: Any) -> RecordFiles:
    files = RecordFiles(folder, max_bytes)
    for step in steps:
        files.put("spans", lambda step=step: [{"step": step, **more}])
    assert files.flush(FLUSH_S)
    return files


def test_a_full_part_becomes_the_next_older_one_and_all_together_stay_within_the_bound(tmp_path: Path) -> None:
    files = filled(tmp_path, range(1, 101), max_bytes=1000)
    assert [path.name for path in parts(tmp_path, "spans")] == [
        "spans.3.jsonl", "spans.2.jsonl", "spans.1.jsonl", "spans.jsonl"
    ]  # fmt: skip
    assert sum(path.stat().st_size for path in parts(tmp_path, "spans")) <= 1000
    kept = [record["step"] for record in files.read("spans")]
    assert kept == list(range(kept[0], 101))
    assert len(kept) > 1000 / len('{"step": 100}\n') * (PARTS - 1) / PARTS - PARTS


def test_a_record_larger_than_the_bound_is_kept_alone(tmp_path: Path) -> None:
    files = filled(tmp_path, range(1, 4), max_bytes=400, text="x" * 1000)
    assert [record["step"] for record in files.read("spans")] == [1, 2, 3]
    assert len(lines(tmp_path / "spans.jsonl")) == 1


def test_a_resumed_run_drops_what_lies_behind_its_checkpoint_in_all_parts(tmp_path: Path) -> None:
    files = filled(tmp_path, range(1, 41), max_bytes=1000)
    files.keep_to("spans", 12)
    kept = [record["step"] for record in files.read("spans")]
    assert kept == list(range(kept[0], 13))
    assert all(path.name == "spans.jsonl" or path.stat().st_size for path in parts(tmp_path, "spans"))


def test_records_out_of_order_are_kept_and_dropped_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "spans.jsonl"
    path.write_text('{"step": 1}\n{"step": 3}\n{"name": "late", "step": 2}\n{"step": 4}\n{"step": 2, "na')
    RecordFiles(tmp_path).keep_to("spans", 2)
    assert path.read_text() == '{"step": 1}\n{"name": "late", "step": 2}\n'


@given(
    st.lists(st.tuples(st.integers(1, 6), st.text(max_size=8)), max_size=12),
    st.integers(0, 400),
    st.integers(1, 6),
)
@settings(max_examples=60, deadline=None)
def test_whatever_a_crash_leaves_of_a_file_it_is_valid_after_a_resume(
    records: list[tuple[int, str]], cut: int, step: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = b"".join(encode({"step": number, "text": text}) + b"\n" for number, text in records)[:cut]
        whole = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].split(b"\n") if line]
        for file in ("metrics", "samples", "spans", "events"):
            (folder / f"{file}.jsonl").write_bytes(data)
        files = RunFiles(folder, step)
        kept = [record for record in whole if record["step"] <= step]
        assert [list(files.records.read(file)) for file in ("metrics", "samples", "spans")] == [kept] * 3
        assert files.events() == whole
        files.event(event_record("resumed", "again", step))
        assert [record["kind"] for record in files.events()[len(whole) :]] == ["resumed"]


def test_the_events_of_a_run_before_stay_when_it_is_resumed_and_go_when_another_begins(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, 0)
    files.event(event_record("run_failed", "boom", 7))
    files.flush()
    assert [event["step"] for event in RunFiles(tmp_path, 5).events()] == [7]
    assert RunFiles(tmp_path, 0).events() == []


FULL_DISK = """
import json, resource, signal, sys
from pathlib import Path
from rlx.learner.watch.records import RecordFiles

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
said = []
files = RecordFiles(Path(sys.argv[1]), say=said.append)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
for step in range(50):
    files.put("samples", lambda step=step: [{"step": step, "text": "x" * 20}])
assert files.flush(60)
between = (Path(sys.argv[1]) / "samples.jsonl").read_text()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
files.put("samples", lambda: [{"step": 50}])
assert files.flush(60)
print(json.dumps([files.lost, said, between]))
"""


def test_a_disk_without_space_ends_nothing_is_said_once_and_leaves_whole_lines(tmp_path: Path) -> None:
    """In a process of its own, whose files may have 100 bytes: the third line is cut within, and taken back."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=240, check=True
    )
    lost, said, between = json.loads(done.stdout)
    assert [json.loads(line)["step"] for line in between.splitlines()] == [0, 1]
    assert [record["step"] for record in lines(tmp_path / "samples.jsonl")] == [0, 1, 50]
    assert (lost, len(said)) == (48, 1)
    assert str(tmp_path) in said[0]
    assert "Training goes on" in said[0]


def test_a_record_that_is_no_json_and_one_that_cannot_be_made_are_lost_alone(tmp_path: Path) -> None:
    said: list[str] = []
    files = RecordFiles(tmp_path, say=said.append)
    files.put("samples", lambda: [{"step": 1, "what": object()}])
    files.put("samples", lambda: [{"step": 1 // 0}])
    files.put("samples", lambda: [{"step": 2, "half": "\ud800", "nan": float("nan")}])
    assert files.flush(FLUSH_S)
    assert lines(tmp_path / "samples.jsonl") == [{"step": 2, "half": "\ud800", "nan": None}]
    assert (files.lost, len(said)) == (2, 1)


def test_a_disk_that_hangs_holds_up_nobody_and_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    said: list[str] = []
    files, hangs = RecordFiles(tmp_path, say=said.append), threading.Event()

    def wait() -> list[dict[str, Any]]:
        hangs.wait(FLUSH_S)
        return [{"step": 0}]

    files.put("metrics", wait)
    for step in range(2000):
        files.put("metrics", lambda step=step: [{"step": step}])
    assert not files.flush(0.01)
    assert files.lost >= 2000 - 512
    assert "slow" in said[0]
    assert len(said) == 1
    hangs.set()
    assert files.flush(FLUSH_S)
    assert len(lines(tmp_path / "metrics.jsonl")) == 2001 - files.lost


def test_closing_writes_what_waits_and_ends_the_thread(tmp_path: Path) -> None:
    files = RecordFiles(tmp_path)
    for step in range(100):
        files.put("metrics", lambda step=step: [{"step": step}])
    files.close(FLUSH_S)
    assert len(lines(tmp_path / "metrics.jsonl")) == 100
    assert files._thread is not None
    assert not files._thread.is_alive()


def test_who_listens_hears_every_record_also_those_that_the_disk_did_not_take(tmp_path: Path) -> None:
    files = RecordFiles(tmp_path / "not there")
    heard: list[tuple[str, dict[str, Any]]] = []
    read: list[tuple[str, list[bytes]]] = []
    files.listeners.append(lambda name, record: heard.append((name, record)))
    files.on_lines = lambda name, lines: read.append((name, lines))
    files.put("metrics", lambda: [{"step": 1}, {"step": 2}])
    assert files.flush(FLUSH_S)
    assert heard == [("metrics", {"step": 1}), ("metrics", {"step": 2})]
    assert read == [("metrics", [b'{"step": 1}', b'{"step": 2}'])]
    assert files.lost == 1


def test_a_process_without_files_of_its_own_adds_the_first_cause(tmp_path: Path) -> None:
    try:
        raise ZeroDivisionError("division by zero")
    except ZeroDivisionError as error:
        record = failure_record(error, "learner rank 1")
    append_event(tmp_path / "not there", record)
    append_event(tmp_path, record)
    [event] = lines(tmp_path / "events.jsonl")
    assert (event["kind"], event["source"], event["process"]) == ("run_failed", "learner", "learner rank 1")
    assert event["text"] == "learner rank 1 ended with ZeroDivisionError: division by zero"
    assert "test_records.py" in event["traceback"]
    assert not (tmp_path / "not there").exists()
