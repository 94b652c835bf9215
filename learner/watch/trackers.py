"""Experiment trackers (wandb, MLflow, TensorBoard, Trackio) through transformers' callbacks; on rank 0 only.

    Trainer ─► on_train_begin, on_save ─┐
    RunFiles ─► metrics, samples, evals ─┴─► Trackers ─► each tracker's callback of transformers, its table, its end

A tracker that fails when it begins ends the run; later ones are told once, left out, and training goes on. The ids of the
runs are kept in output_dir/trackers.json, so that a resumed run goes on in them. Not here: the keys (`rlx.config.trackers`).
"""

from __future__ import annotations

import copy
import json
import math
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from transformers import TrainerCallback

from rlx.config import Config
from rlx.config.shown import shown_values
from rlx.errors import RlxError

IDS = "trackers.json"
_LONGEST_TEXT = 4000
"""Characters of a prompt or completion in a table."""
_MOST_WAITING = 1000
"""Things to log that wait for a slow tracker; more are left out."""
_BEGIN_S, _SAVE_S, _END_S = 180.0, 600.0, 180.0
"""Seconds that the trackers may take to begin, to take a checkpoint, and to send the rest at the end."""


class Tracker(Protocol):
    """One of them. `begin` is called once, first, with what `Trainer` gives `on_train_begin`."""

    name: str
    callback: TrainerCallback

    def begin(self, args: Any, state: Any, control: Any, kwargs: Mapping[str, Any], values: Mapping[str, Any]) -> str:
        """Start or continue the run, with the configuration `values`. Returns where it is to be seen."""

    def run_id(self) -> str: ...

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Completions of one step."""

    def end(self, failed: bool) -> None:
        """After everything else; also when training failed."""


MakeTrackers = Callable[[Config, Mapping[str, str], "int | None"], list[Tracker]]


class Trackers(TrainerCallback):
    """All trackers of a run. Add `record` to the listeners of `RunFiles`; call `close` at the very end.

    They live in a thread of their own, as the runs of some belong to the thread that began them, and so that a slow one
    does not hold up training.
    """

    def __init__(self, config: Config, resumed_step: int | None, console: Console, make: MakeTrackers | None = None):
        self._config, self._console = config, console
        self._ids = Path(config.output_dir) / IDS
        kept = json.loads(self._ids.read_text()) if resumed_step is not None and self._ids.exists() else {}
        self._trackers = (make or make_trackers)(config, kept, resumed_step)
        self._begun: tuple[Any, Any, Any, dict[str, Any]] | None = None
        self._rows: list[Mapping[str, Any]] = []
        self._thread = ThreadPoolExecutor(1, "trackers")
        self._room, self._is_behind = threading.Semaphore(_MOST_WAITING), False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises RlxError when a tracker cannot begin."""
        if not self._trackers:
            return
        self._begun = (args, state, control, kwargs)
        for line in self._thread.submit(self._begin).result(_BEGIN_S):
            self._print(line)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Waits: a checkpoint that is being uploaded may be the next to be deleted."""
        self._do(lambda tracker: tracker.callback.on_save(args, state, control, **kwargs), wait_s=_SAVE_S)

    def record(self, kind: str, record: Mapping[str, Any]) -> None:
        """What was written to `kind`.jsonl. From any thread."""
        if kind == "metrics":
            self._log(record["step"], {k: v for k, v in record.items() if k not in ("step", "time")})
            if self._config.trl.log_completions and self._rows:
                columns, rows = completions_table(self._rows)
                self._do(lambda tracker: tracker.table(record["step"], columns, rows))
        elif kind == "samples":
            self._rows = [row for row in self._rows if row["step"] == record["step"]] + [record]
        elif kind == "evals":
            self._log(record["step"], evaluation_metrics(record))

    def close(self, failed: bool) -> None:
        """End every run, as failed or finished."""
        self._do(lambda tracker: tracker.end(failed), wait_s=_END_S)
        self._trackers = []
        self._thread.shutdown(wait=False)

    def _begin(self) -> list[str]:
        assert self._begun is not None
        values, lines = shown_values(self._config), []
        for tracker in self._trackers:
            try:
                lines.append(f"{tracker.name}: {tracker.begin(*self._begun, values)}")
            except Exception as error:  # any library's: the user asked for it, and training has not begun
                reason = f"the tracker {tracker.name} could not begin: {_reason(error)}"
                raise RlxError(f"{self._config.path}: {reason}") from error
        self._ids.write_text(json.dumps({tracker.name: tracker.run_id() for tracker in self._trackers}) + "\n")
        return lines

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        def log(tracker: Tracker) -> None:
            assert self._begun is not None
            args, state, control, kwargs = self._begun
            at = copy.copy(state)
            at.global_step = step
            tracker.callback.on_log(args, at, control, logs=finite(values, tracker.name), **kwargs)

        self._do(log)

    def _do(self, act: Callable[[Tracker], None], wait_s: float = 0.0) -> None:
        """Have `act` done to every tracker, in their thread."""
        if self._begun is None or not self._trackers:
            return
        if not self._room.acquire(blocking=wait_s > 0, timeout=wait_s or None):
            if not self._is_behind:
                self._is_behind = True
                self._print(
                    "note: the trackers are slower than the run; they miss records. The files in output_dir do not."
                )
            return
        done = self._thread.submit(self._each, act)
        if wait_s:
            try:
                done.result(wait_s)
            except TimeoutError:
                names = ", ".join(tracker.name for tracker in self._trackers)
                self._print(
                    f"note: the trackers ({names}) did not answer within {wait_s:g} s; some records may be missing there"
                )

    def _each(self, act: Callable[[Tracker], None]) -> None:
        self._room.release()
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except Exception as error:  # any library's; a tracker that fails must not end the training
                self._trackers.remove(tracker)
                self._print(
                    f"note: the tracker {tracker.name} failed and gets nothing more: {_reason(error)}. Training goes on; "
                    "the files in output_dir have everything."
                )

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def finite(values: Mapping[str, Any], tracker: str) -> dict[str, float | str]:
    """The finite numbers among `values`, and its texts where the tracker takes texts."""
    takes_text = tracker != "mlflow"
    return {
        name: value
        for name, value in values.items()
        if (takes_text if isinstance(value, str) else value is not None and math.isfinite(value))
    }


def evaluation_metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of a record of evals.jsonl; transformers' callbacks make `eval/` of `eval_`."""
    rewards = {f"eval_rewards/{name}/mean": value for name, value in record["rewards"].items()}
    passed = {f"eval_pass_at_{k}": value for k, value in record["pass_at_k"].items()}
    return {"eval_reward": record["reward"], "eval_mean_length": record["mean_length"], **rewards, **passed}


def completions_table(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of records of samples.jsonl, as TRL has them: step, prompt, completion, each reward, advantage."""
    rewards = list(dict.fromkeys(name for record in records for name in record["rewards"]))
    rows = [
        [
            record["step"], _text(record["prompt"]), _text(record["completion"]),
            *(_known(record["rewards"].get(name)) for name in rewards), _known(record["advantage"]),
        ]
        for record in records
    ]  # fmt: skip
    return ["step", "prompt", "completion", *rewards, "advantage"], rows


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} ... ({len(text):,} characters)"


def _known(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _reason(error: Exception) -> str:
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"


def make_trackers(config: Config, kept: Mapping[str, str], resumed_step: int | None) -> list[Tracker]:
    from rlx.learner.watch import tracker_kinds as kinds

    made: list[Tracker] = []
    for name in config.trackers:
        run_id = kept.get(name)
        if name == "tensorboard":
            made.append(kinds.TensorBoard(config, run_id or new_id(), resumed_step or 0))
        elif name == "wandb":
            made.append(kinds.Wandb(config, config.wandb_run_id or run_id or new_id()))
        elif name == "mlflow":
            made.append(kinds.MLflow(config, run_id))
        else:
            made.append(kinds.Trackio(config, run_id or config.trackio_run_name or f"rlx-{new_id()}"))
    return made


def new_id() -> str:
    return uuid.uuid4().hex[:8]
