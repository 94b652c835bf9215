"""What trackers get: through a fake one, and TensorBoard's files for real."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlx.config import Config, load_config
from rlx.errors import RlxError
from rlx.learner.watch.trackers import Trackers, completions_table


class Fake:
    """Keeps what it is given. `fails_in` names the method that raises."""

    def __init__(self, name: str, fails_in: str = ""):
        self.name, self._fails_in = name, fails_in
        self.logs: list[tuple[int, dict[str, Any]]] = []
        self.tables: list[tuple[int, list[str], list[list[Any]]]] = []
        self.values: dict[str, Any] = {}
        self.ended: bool | None = None
        self.callback = TrainerCallback()
        self.callback.on_log = self._log

    def _log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._maybe_fail("log")
        self.logs.append((state.global_step, logs))

    def begin(self, args: Any, state: Any, control: Any, kwargs: Any, values: Any) -> str:
        self._maybe_fail("begin")
        self.values = dict(values)
        return "here"

    def run_id(self) -> str:
        return f"{self.name}-1"

    def table(self, step: int, columns: Any, rows: Any) -> None:
        self.tables.append((step, columns, rows))

    def end(self, failed: bool) -> None:
        self.ended = failed

    def _maybe_fail(self, method: str) -> None:
        if method == self._fails_in:
            raise ConnectionError("no route\nto host")


def configured(folder: Path, more: str = "") -> Config:
    path = folder / "cfg.yaml"
    path.write_text(f"base_model: x\nrl: grpo\ndatasets:\n  - path: a\noutput_dir: {folder}\n{more}")
    return load_config(path)


def begin(trackers: Trackers, folder: Path) -> None:
    arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True)
    state = TrainerState()
    state.global_step = 7
    trackers.on_train_begin(arguments, state, TrainerControl(), model=None)


def with_fakes(folder: Path, *fakes: Fake, more: str = "") -> tuple[Trackers, io.StringIO]:
    out = io.StringIO()
    trackers = Trackers(configured(folder, more), None, Console(file=out, width=200), lambda *_: list(fakes))
    begin(trackers, folder)
    return trackers, out


def sample(step: int, completion: str, reward: float = 1.0) -> dict[str, Any]:
    return {"step": step, "prompt": "1+1", "completion": completion, "rewards": {"r": reward}, "advantage": 0.5}


def test_metrics_keep_their_names_and_what_a_tracker_cannot_take_is_left_out(tmp_path: Path) -> None:
    wandb, mlflow = Fake("wandb"), Fake("mlflow")
    trackers, _ = with_fakes(tmp_path, wandb, mlflow)
    record = {"step": 3, "time": 1.0, "reward": 0.5, "kl": math.nan, "loss": None, "bottleneck": "balanced"}
    trackers.record("metrics", record)
    trackers.close(failed=False)
    assert wandb.logs == [(3, {"reward": 0.5, "bottleneck": "balanced"})]
    assert mlflow.logs == [(3, {"reward": 0.5})]
    assert (wandb.ended, mlflow.ended) == (False, False)
    assert wandb.values["trl.num_generations"] == 8


def test_an_evaluation_is_logged_at_its_own_step(tmp_path: Path) -> None:
    fake = Fake("wandb")
    trackers, _ = with_fakes(tmp_path, fake)
    evaluation = {"step": 4, "reward": 0.25, "mean_length": 9.0, "rewards": {"r": 0.25}, "pass_at_k": {"1": 0.5}}
    trackers.record("evals", evaluation)
    trackers.close(failed=True)
    expected = {"eval_reward": 0.25, "eval_mean_length": 9.0, "eval_rewards/r/mean": 0.25, "eval_pass_at_1": 0.5}
    assert fake.logs == [(4, expected)]
    assert fake.ended is True


@pytest.mark.parametrize("asked", [True, False])
def test_completions_of_a_logged_step_become_a_table_where_they_are_asked_for(tmp_path: Path, asked: bool) -> None:
    fake = Fake("wandb")
    trackers, _ = with_fakes(tmp_path, fake, more=f"trl:\n  log_completions: {str(asked).lower()}\n")
    for record in (sample(1, "old"), sample(2, "a", 0.0), sample(2, "b", math.nan)):
        trackers.record("samples", record)
    trackers.record("metrics", {"step": 2, "time": 0.0, "reward": 1.0})
    trackers.close(failed=False)
    columns = ["step", "prompt", "completion", "r", "advantage"]
    rows = [[2, "1+1", "a", 0.0, 0.5], [2, "1+1", "b", None, 0.5]]
    assert fake.tables == ([(2, columns, rows)] if asked else [])


def test_a_long_completion_is_cut_in_a_table() -> None:
    _, rows = completions_table([sample(1, "x" * 100_000)])
    assert len(rows[0][2]) < 5000
    assert rows[0][2].endswith("(100,000 characters)")


def test_a_tracker_that_fails_later_is_told_once_and_the_others_go_on(tmp_path: Path) -> None:
    broken, sound = Fake("wandb", fails_in="log"), Fake("mlflow")
    trackers, out = with_fakes(tmp_path, broken, sound)
    for step in (1, 2):
        trackers.record("metrics", {"step": step, "time": 0.0, "reward": 1.0})
    trackers.close(failed=False)
    assert [step for step, _ in sound.logs] == [1, 2]
    notes = [line for line in out.getvalue().splitlines() if line.startswith("note:")]
    assert len(notes) == 1
    assert notes[0].startswith(
        "note: the tracker wandb failed and gets nothing more: ConnectionError: no route. Training"
    )


def test_a_tracker_that_cannot_begin_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RlxError, match=r"cfg\.yaml: the tracker wandb could not begin: ConnectionError: no route"):
        with_fakes(tmp_path, Fake("wandb", fails_in="begin"))


def test_a_resumed_run_goes_on_in_the_same_runs_and_a_new_one_does_not(tmp_path: Path) -> None:
    with_fakes(tmp_path, Fake("wandb"))[0].close(failed=False)
    seen: list[Any] = []
    for resumed_step in (2, None):
        Trackers(
            configured(tmp_path),
            resumed_step,
            Console(quiet=True),
            lambda _, kept, step: seen.append((kept, step)) or [],
        )
    assert seen == [({"wandb": "wandb-1"}, 2), ({}, None)]


def test_tensorboard_has_every_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = configured(tmp_path, "use_tensorboard: true\ntrl:\n  log_completions: true\n")
    for resumed_step, steps in ((None, (1, 2, 3)), (2, (3, 4))):
        trackers = Trackers(config, resumed_step, Console(quiet=True))
        begin(trackers, tmp_path)
        for step in steps:
            trackers.record("samples", sample(step, f"said in {step}"))
            trackers.record("metrics", {"step": step, "time": 0.0, "reward": step / 10, "bottleneck": "balanced"})
        trackers.record("evals", {"step": 4, "reward": 0.5, "mean_length": 1.0, "rewards": {}, "pass_at_k": {}})
        trackers.close(failed=False)
    (folder,) = (tmp_path / "tensorboard").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("train/reward")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("train/reward")] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert events.Scalars("eval/reward")[-1].value == 0.5
    text = events.Tensors("completions/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "    completion: said in 4\n" in text
