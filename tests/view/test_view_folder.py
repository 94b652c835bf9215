"""A run from its files: growing, torn, cut by a resume, rotated, large."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest

from rlx.errors import ConfigError
from rlx.learner.watch.records import failure_record
from rlx.view.choose import Wanted, choose
from rlx.view.folder import FolderRun
from rlx.view.state import Seen


def line(record) -> bytes:
    return json.dumps(record).encode() + b"\n"


def metric(step, **more) -> bytes:
    return line({"step": step, "time": 1000.0 + step, "reward": step / 10, **more})


def sample(step, reward=0.5, key="g", text="hello", **more) -> bytes:
    return line({"step": step, "key": key, "prompt": "q", "completion": text, "rewards": {"r": reward}, **more})


def append(path, *lines: bytes) -> None:
    with path.open("ab") as stream:
        stream.writelines(lines)


def steps(answer) -> list[int]:
    return answer["metrics"]["columns"]["step"]


def chosen(run, **wanted) -> list[str]:
    return [found["text"] for found in choose(run.samples, Wanted(**wanted))["samples"]]


def test_an_empty_folder_waits_for_its_run_and_follows_it(tmp_path):
    run = FolderRun(tmp_path)
    first = run.since(Seen())
    assert (first["run"]["state"], steps(first)) == ("waiting", [])
    assert "no metrics.jsonl yet" in first["run"]["notes"][0]
    assert choose(run.samples, Wanted())["samples"] == []
    append(tmp_path / "metrics.jsonl", metric(1), metric(2))
    second = run.since(Seen(first["generation"]))
    assert (steps(second), second["run"]["notes"]) == ([1, 2], [])
    append(tmp_path / "metrics.jsonl", metric(3))
    third = run.since(Seen(second["generation"], 2))
    assert (third["reset"], steps(third)) == (False, [3])


def test_a_line_is_taken_once_it_is_whole_and_what_is_no_json_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append(path, metric(1), b"\0\0\0\n", b'"text"\n', metric(2)[:10])
    run = FolderRun(tmp_path)
    first = run.since(Seen())
    assert steps(first) == [1]
    append(path, metric(2)[10:])
    assert steps(run.since(Seen(first["generation"], 1))) == [2]


def test_a_crashed_run_counts_as_stopped_and_a_finished_one_as_finished(tmp_path):
    append(tmp_path / "metrics.jsonl", metric(1), metric(2))
    (tmp_path / "run.json").write_text('{"total_steps": 4}')
    assert FolderRun(tmp_path).since(Seen())["run"]["state"] == "stopped"
    append(tmp_path / "events.jsonl", line({"kind": "run_failed", "time": 3, "text": "x"}))
    assert FolderRun(tmp_path).since(Seen())["run"]["state"] == "failed"
    append(tmp_path / "events.jsonl", line(failure_record(KeyboardInterrupt())))
    assert FolderRun(tmp_path).since(Seen())["run"]["state"] == "stopped"
    append(tmp_path / "events.jsonl", line(failure_record(RuntimeError("x"))))
    assert FolderRun(tmp_path).since(Seen())["run"]["state"] == "failed"
    append(tmp_path / "events.jsonl", line({"kind": "resumed", "time": 3, "text": "x"}))
    append(tmp_path / "metrics.jsonl", metric(3), metric(4))
    assert FolderRun(tmp_path).since(Seen())["run"]["state"] == "finished"


def test_a_running_run_says_how_long_it_takes_still(tmp_path):
    now = time.time()
    append(tmp_path / "metrics.jsonl", *[line({"step": s, "time": now + 2 * s - 20}) for s in range(1, 11)])
    (tmp_path / "run.json").write_text('{"total_steps": 15}')
    told = FolderRun(tmp_path).since(Seen())["run"]
    assert (told["state"], told["step"], told["eta_s"]) == ("running", 10, pytest.approx(10))


def test_a_half_written_run_json_is_as_none_and_a_checkpoint_tells_the_steps(tmp_path):
    append(tmp_path / "metrics.jsonl", metric(1))
    (tmp_path / "run.json").write_text('{"total_st')
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text('{"max_steps": 9}')
    assert FolderRun(tmp_path).since(Seen())["run"]["total_steps"] == 9


def test_a_resumed_run_that_cut_its_files_begins_anew(tmp_path):
    metrics, samples = tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl"
    append(metrics, *map(metric, range(1, 6)))
    append(samples, *[sample(step, text=f"old {step}") for step in range(1, 6)])
    run = FolderRun(tmp_path)
    seen = Seen(run.since(Seen())["generation"], 5)
    assert chosen(run, limit=2) == ["old 5", "old 4"]
    metrics.write_bytes(b"".join(map(metric, range(1, 4))))
    samples.write_bytes(b"".join(sample(step, text=f"old {step}") for step in range(1, 4)))
    append(metrics, *[metric(step, fresh=1) for step in range(4, 9)])  # longer than before
    append(samples, *[sample(step, text=f"new and longer {step}") for step in range(4, 9)])
    answer = run.since(seen)
    assert (answer["reset"], steps(answer)) == (True, [1, 2, 3, 4, 5, 6, 7, 8])
    assert chosen(run, limit=6) == [*(f"new and longer {step}" for step in (8, 7, 6, 5, 4)), "old 3"]


def test_rotation_loses_nothing_and_keeps_places(tmp_path):
    for name, make in (("metrics", metric), ("samples", lambda step: sample(step, text=f"s{step}"))):
        append(tmp_path / f"{name}.jsonl", make(1), make(2))
    run = FolderRun(tmp_path)
    seen = Seen(run.since(Seen())["generation"], 2)
    place = choose(run.samples, Wanted(limit=1))["next"]
    for name, make in (("metrics", metric), ("samples", lambda step: sample(step, text=f"s{step}"))):
        (tmp_path / f"{name}.jsonl").rename(tmp_path / f"{name}.1.jsonl")
        append(tmp_path / f"{name}.jsonl", make(3))
    answer = run.since(seen)
    assert (answer["reset"], steps(answer)) == (False, [3])
    assert chosen(run) == ["s3", "s2", "s1"]
    assert chosen(run, after=int(place)) == ["s1"]
    (tmp_path / "metrics.1.jsonl").unlink()  # the oldest part went
    (tmp_path / "samples.1.jsonl").unlink()
    assert run.since(Seen(seen.generation, 3))["reset"] is False
    assert chosen(run) == ["s3"]
    assert steps(FolderRun(tmp_path).since(Seen())) == [3]


def test_older_parts_are_read_before_newer_ones(tmp_path):
    for step, name in enumerate(("metrics.10.jsonl", "metrics.2.jsonl", "metrics.1.jsonl", "metrics.jsonl"), 1):
        append(tmp_path / name, metric(step))
    append(tmp_path / "metrics.x.jsonl", metric(9))
    assert steps(FolderRun(tmp_path).since(Seen())) == [1, 2, 3, 4]


def test_samples_are_chosen_by_every_filter(tmp_path):
    append(
        tmp_path / "samples.jsonl",
        sample(1, 0.1, "a", "one"),
        sample(2, 0.9, "a", "two"),
        sample(3, None, "b", "Drei"),
        sample(3, 0.9, "b", "four", status="truncated"),
        b'{"step": "x"}\n',
        sample(4, 0.5, "c", "torn")[:-5],
    )
    run = FolderRun(tmp_path)
    assert chosen(run) == ["four", "Drei", "two", "one"]
    assert chosen(run, steps=range(2, 4)) == ["four", "Drei", "two"]
    assert chosen(run, status="truncated") == ["four"]
    assert chosen(run, group="a") == ["two", "one"]
    assert chosen(run, low=0.5) == ["four", "two"]
    assert chosen(run, high=0.5) == ["one"]
    assert chosen(run, text="dREI") == ["Drei"]
    assert chosen(run, order="best") == ["four", "two", "one"]
    assert chosen(run, order="worst", limit=1) == ["one"]
    assert chosen(run, order="worst", after=int(choose(run.samples, Wanted(order="worst", limit=1))["next"])) == [
        "four",
        "two",
    ]


def test_a_sample_is_there_once_its_line_is_whole(tmp_path):
    path = tmp_path / "samples.jsonl"
    append(path, sample(1, text="one"), sample(2, text="two")[:-9])
    run = FolderRun(tmp_path)
    assert chosen(run) == ["one"]
    append(path, sample(2, text="two")[-9:], sample(3, text="three")[:9])
    assert chosen(run) == ["two", "one"]
    append(path, sample(3, text="three")[9:])
    assert chosen(run) == ["three", "two", "one"]


def test_a_page_goes_on_where_the_last_one_ended_while_new_samples_arrive(tmp_path):
    path = tmp_path / "samples.jsonl"
    append(path, *[sample(step, text=str(step)) for step in range(10)])
    run = FolderRun(tmp_path)
    page = choose(run.samples, Wanted(limit=4))
    append(path, *[sample(step, text=str(step)) for step in range(10, 15)])
    assert chosen(run, limit=4, after=int(page["next"])) == ["5", "4", "3", "2"]
    last = choose(run.samples, Wanted(limit=9, after=int(page["next"])))
    assert (len(last["samples"]), last["next"], last["total"]) == (6, None, 15)


def test_a_large_file_opens_at_its_end_at_once_and_is_indexed_bit_by_bit(tmp_path):
    path = tmp_path / "samples.jsonl"
    block = b"".join(sample(1, 0.25, text="x" * 1500) for _ in range(1000))
    with path.open("wb") as stream:
        stream.write(sample(0, 1.0, text="the best"))
        for _ in range(40):  # 65 MB
            stream.write(block)
        stream.write(sample(2, 0.0, text="the newest"))
    run = FolderRun(tmp_path)
    tracemalloc.start()
    page = choose(run.samples, Wanted(limit=1), seconds=0.001)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert page["samples"][0]["text"] == "the newest"
    assert page["indexed"] < 1
    assert page["next"] is not None
    assert peak < 10 * 2**20
    while page["indexed"] < 1:
        page = choose(run.samples, Wanted(limit=1, order="best"), seconds=5)
    assert page["samples"][0]["text"] == "the best"
    assert page["total"] == 40_002


def test_a_line_longer_than_a_block_is_one_sample(tmp_path):
    append(tmp_path / "samples.jsonl", sample(1, text="a"), sample(2, text="b" * 3_000_000), sample(3, text="c"))
    run = FolderRun(tmp_path)
    assert [text[:1] for text in chosen(run)] == ["c", "b", "a"]


def test_a_folder_that_is_none_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="there is no such folder"):
        FolderRun(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        FolderRun(tmp_path / "file")
    (tmp_path / "outputs" / "one").mkdir(parents=True)
    append(tmp_path / "outputs" / "one" / "metrics.jsonl", metric(1))
    with pytest.raises(ConfigError, match="its folders are: one"):
        FolderRun(tmp_path / "outputs")


def test_a_newest_part_that_was_written_anew_beside_an_older_one_is_not_counted_twice(tmp_path):
    append(tmp_path / "metrics.1.jsonl", metric(1))
    append(tmp_path / "metrics.jsonl", metric(2), metric(3))
    run = FolderRun(tmp_path)
    seen = Seen(run.since(Seen())["generation"], 3)
    append(tmp_path / "other", metric(2))
    (tmp_path / "other").replace(tmp_path / "metrics.jsonl")
    answer = run.since(seen)
    assert (answer["reset"], steps(answer)) == (True, [1, 2])
