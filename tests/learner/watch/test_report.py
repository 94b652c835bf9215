"""The files of a run: strict JSON, continued after a resume, and the table and curve made of them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

from fake_service import lines
from PIL import Image
from rich.console import Console
from test_bottleneck import AHEAD

from rlx.learner.incoming.evaluation import Evaluation
from rlx.learner.watch.progress import ProgressReport, summary
from rlx.learner.watch.report import RunFiles, evaluation_line, evaluation_table


def evaluation(step: int, reward: float, length: float = 5.0) -> Evaluation:
    return Evaluation(
        step, step + 1, 1, 2, reward, {"r": reward, "other": math.nan}, {"1": reward / 2, "2": reward}, 0, length, 0.1,
        [{"completion": "zwei → “2”", "rewards": {"r": reward}}],
    )  # fmt: skip


def write(files: RunFiles, *steps: int) -> None:
    for step in steps:
        files.metrics(step, {"reward": step / 10})
        files.evaluation(evaluation(step, step / 10))
    files.flush()


def test_what_is_no_number_is_null_and_text_stays_readable(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, 0)
    files.metrics(1, {"reward": math.nan, "grad_norm": math.inf, "loss": 0.5})
    files.evaluation(evaluation(0, math.nan))
    files.flush()
    [metrics], [record] = lines(tmp_path / "metrics.jsonl"), lines(tmp_path / "evals.jsonl")
    assert (metrics["reward"], metrics["grad_norm"], metrics["loss"]) == (None, None, 0.5)
    assert (record["reward"], record["rewards"]) == (None, {"r": None, "other": None})
    assert record["pass_at_k"] == {"1": None, "2": None}
    assert record["samples"] == [{"completion": "zwei → “2”", "rewards": {"r": None}}]
    assert "“2”" in (tmp_path / "evals.jsonl").read_text(encoding="utf-8")


def test_a_new_run_empties_the_files_and_a_resumed_one_keeps_what_lies_before_it(tmp_path: Path) -> None:
    write(RunFiles(tmp_path, 0), 1, 2, 3)
    resumed = RunFiles(tmp_path, 2)
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [r["step"] for r in resumed.evaluations()] == [1]
    write(resumed, 3)
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    RunFiles(tmp_path, 0)
    assert [(tmp_path / f"{name}.jsonl").read_text() for name in ("metrics", "samples", "evals")] == [""] * 3


def test_line_ends_of_other_scripts_and_a_character_cut_in_two_lose_no_record(tmp_path: Path) -> None:
    write(RunFiles(tmp_path, 0), 1)
    path = tmp_path / "samples.jsonl"
    said = '{"step": 1, "completion": "a\u2028b\u0085c"}\n'
    path.write_bytes((said * 2).encode() + '{"step": 2, "completion": "é'.encode()[:-1])
    RunFiles(tmp_path, 5)
    assert path.read_bytes().decode() == said * 2


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path: Path) -> None:
    write(RunFiles(tmp_path, 0), 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 2, "reward": 0.2})[:-5])
    RunFiles(tmp_path, 2)
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_the_table_compares_the_first_evaluation_with_the_last_also_of_a_resumed_run(tmp_path: Path) -> None:
    first = RunFiles(tmp_path, 0)
    first.evaluation(evaluation(0, 0.25))
    first.flush()
    resumed = RunFiles(tmp_path, 5)
    resumed.evaluation(evaluation(9, 0.75, length=4.0))
    console = Console(width=120, record=True, quiet=False, file=(tmp_path / "table").open("w"))
    console.print(evaluation_table(resumed.evaluations()))
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines() if "│" in line
    ]
    assert rows == [
        ["r", "0.250", "0.750", "+0.500"],
        ["other", "nan", "nan", "+nan"],
        ["reward, weighted", "0.250", "0.750", "+0.500"],
        ["pass@1", "0.125", "0.375", "+0.250"],
        ["pass@2", "0.250", "0.750", "+0.500"],
        ["tokens per completion", "5.000", "4.000", "-1.000"],
    ]


def test_the_line_of_an_evaluation_has_pass_at_k_and_tells_what_had_no_reward() -> None:
    line = "evaluation after step 3: r 0.500  other nan  pass@1 0.250  pass@2 0.500  (1 held-out prompts × 2, weight version 4, 0.1 s"
    assert evaluation_line(evaluation(3, 0.5)) == line + ")"
    assert evaluation_line(replace(evaluation(3, 0.5), num_unscored=2)) == line + ", 2 completions without reward)"


def test_the_table_of_a_run_that_an_older_version_began_has_no_pass_at_k_before() -> None:
    first, last = asdict(evaluation(0, 0.5)), asdict(evaluation(1, 0.5))
    del first["pass_at_k"]
    table = evaluation_table([first, last])
    assert list(table.columns[1].cells)[3:5] == ["nan", "nan"]
    assert list(table.columns[2].cells)[3:5] == ["0.250", "0.500"]


def test_the_curve_is_an_image_with_gaps_where_there_was_no_reward(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, 0)
    for step, reward in enumerate([0.1, math.nan, 0.3], start=1):
        files.metrics(step, {"reward": reward})
    path = files.learning_curve()
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (960, 540))


def test_the_line_of_a_step_splits_its_time_and_tells_what_had_no_reward() -> None:
    logs = {
        "reward": 0.5, "frac_reward_none": 0.0, "completions/mean_length": 7.25, "kl": 0.01, "perf/step_s": 3.0,
        "perf/rollout_wait_s": 1.0, "perf/fwd_bwd_s": 1.5, "perf/weight_sync_wait_s": 0.25,
    }  # fmt: skip
    times = "3.00 s = rollouts 1.00 + train 1.50 + publish 0.25"
    assert summary(logs) == f"reward 0.500  len 7.2  kl 0.0100  {times}"
    assert summary(logs | {"frac_reward_none": 0.25}) == f"reward 0.500  (25% without)  len 7.2  kl 0.0100  {times}"
    nothing = summary(logs | {"frac_reward_none": 1.0, "reward": math.nan})
    assert nothing == f"reward none, nothing to learn from  len 7.2  kl 0.0100  {times}"


LOGS = {
    "loss": 0.1, "reward": 0.5, "frac_reward_none": 0.0, "completions/mean_length": 7.25,
    **replace(AHEAD, rollout_wait_s=6, fwd_bwd_s=4).logs(),
}  # fmt: skip
STATE = SimpleNamespace(global_step=0, max_steps=9)


def shown(files: RunFiles, console: Console, logs: dict) -> str:
    report, state = ProgressReport(console, files), SimpleNamespace(global_step=3, max_steps=9)
    report.on_train_begin(None, STATE, None)
    report.on_log(None, state, None, logs)
    report.on_log(None, state, None, {"train_runtime": 1.0})
    report.stop()
    files.flush()
    printed: str = console.file.getvalue()  # type: ignore[attr-defined]
    return printed


def test_a_step_is_two_lines_the_second_of_which_says_what_bounded_it(tmp_path: Path) -> None:
    printed = shown(RunFiles(tmp_path, 0), Console(file=StringIO(), width=80), LOGS)
    step, bottleneck = printed.splitlines()
    assert step.startswith(
        "step 3/9  reward 0.500  len 7.2  10.00 s = rollouts 6.00 + train 4.00 + publish 0.00  left "
    )
    assert bottleneck == f"    {LOGS['bottleneck_line']}"
    assert bottleneck.startswith("    generation-bound: learner waited 60%, workers idle 5%")
    [record] = lines(tmp_path / "metrics.jsonl")
    assert record["bottleneck"] == "generation-bound: 3 more workers would balance it"
    assert "bottleneck_line" not in record
    assert record["perf/rollout_wait_s"] == 6


def test_a_terminal_shows_the_verdict_and_what_it_suggests(tmp_path: Path) -> None:
    console = Console(file=StringIO(), width=250, force_terminal=True, color_system=None, _environ={"TERM": "xterm"})
    printed = shown(RunFiles(tmp_path, 0), console, LOGS)
    assert "bound       generation-bound: 3 more workers would balance it" in printed
    assert "learner waited" not in printed


def test_an_event_that_is_told_while_the_view_is_stopped_is_written_as_any_other(tmp_path: Path) -> None:
    """The thread that writes the files tells the view; the main thread stops it when the run ends."""
    console = Console(file=StringIO(), width=250, force_terminal=True, color_system=None, _environ={"TERM": "xterm"})
    files, told = RunFiles(tmp_path, 0), []
    report = ProgressReport(console, files)
    files.listeners.append(lambda name, record: told.append(record["kind"]))

    class Stopping(dict[str, object]):
        def __getitem__(self, key: str) -> object:
            report.stop()
            return super().__getitem__(key)

    report.on_train_begin(None, STATE, None)
    files.event(Stopping(kind="run_failed", text="the end"))
    files.flush()
    assert told == ["run_failed"]
    assert files.records.lost == 0
