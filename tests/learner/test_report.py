"""The files of a run: strict JSON, continued after a resume, and the table and curve made of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from fake_service import lines
from PIL import Image
from rich.console import Console

from rlx.episode import Episode, Row
from rlx.learner.data import Prompt
from rlx.learner.progress import summary
from rlx.learner.report import RunFiles, evaluation_table
from rlx.learner.rollouts import Evaluation
from rlx.wire import GroupResult, RewardOutcome

PROMPTS = [Prompt([{"role": "user", "content": "1 + 1 = “?”"}], np.array([1], np.int32), {})]


def group(reward: float) -> GroupResult:
    episode = Episode((Row(np.array([1], np.int32), np.array([-0.5], np.float32), ((1, 1),)),), "zwei → 2")
    return GroupResult("k", (episode,), (RewardOutcome("m.r", np.array([reward], np.float32), 0.1),), "w", 0.1, 0.1)


def evaluation(step: int, reward: float, length: float = 5.0) -> Evaluation:
    return Evaluation(step, step + 1, 1, 1, reward, {"r": reward, "other": math.nan}, length, 0.1)


def write(files: RunFiles, *steps: int) -> None:
    for step in steps:
        files.metrics(step, {"reward": step / 10})
        files.evaluation(evaluation(step, step / 10), PROMPTS, [group(step / 10)])


def test_what_is_no_number_is_null_and_text_stays_readable(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, 0)
    files.metrics(1, {"reward": math.nan, "grad_norm": math.inf, "loss": 0.5})
    files.evaluation(evaluation(0, math.nan), PROMPTS, [group(math.nan)])
    [metrics], [record] = lines(tmp_path / "metrics.jsonl"), lines(tmp_path / "evals.jsonl")
    assert (metrics["reward"], metrics["grad_norm"], metrics["loss"]) == (None, None, 0.5)
    assert (record["reward"], record["rewards"]) == (None, {"r": None, "other": None})
    assert record["samples"] == [
        {"prompt": PROMPTS[0].prompt, "completion": "zwei → 2", "status": "ok", "rewards": {"m.r": None}}
    ]
    assert "“?”" in (tmp_path / "evals.jsonl").read_text(encoding="utf-8")


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
    first.evaluation(evaluation(0, 0.25), PROMPTS, [group(0.25)])
    resumed = RunFiles(tmp_path, 5)
    resumed.evaluation(evaluation(9, 0.75, length=4.0), PROMPTS, [group(0.75)])
    console = Console(width=120, record=True, quiet=False, file=(tmp_path / "table").open("w"))
    console.print(evaluation_table(resumed.evaluations()))
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines() if "│" in line
    ]
    assert rows == [
        ["r", "0.250", "0.750", "+0.500"],
        ["other", "nan", "nan", "+nan"],
        ["reward, weighted", "0.250", "0.750", "+0.500"],
        ["tokens per completion", "5.000", "4.000", "-1.000"],
    ]


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
        "perf/rollout_wait_s": 1.0, "perf/fwd_bwd_s": 1.5, "perf/weight_sync_s": 0.25,
    }  # fmt: skip
    times = "3.00 s = rollouts 1.00 + train 1.50 + publish 0.25"
    assert summary(logs) == f"reward 0.500  len 7.2  kl 0.0100  {times}"
    assert summary(logs | {"frac_reward_none": 0.25}) == f"reward 0.500  (25% without)  len 7.2  kl 0.0100  {times}"
    nothing = summary(logs | {"frac_reward_none": 1.0, "reward": math.nan})
    assert nothing == f"reward none, nothing to learn from  len 7.2  kl 0.0100  {times}"
