"""A run from the files in its output_dir, while they grow and afterwards."""

from __future__ import annotations

import json
import threading
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlx.errors import ConfigError
from rlx.samples import parts
from rlx.view.choose import Samples, Table
from rlx.view.curves import Curves
from rlx.view.sample_files import SampleFiles
from rlx.view.state import History, Seen
from rlx.view.tail import Tail

_MAX_EVENTS = 2_000
_NAMES = ("metrics", "samples", "evals", "events")


class FolderRun(Samples):
    """Read again at every call, as far as it grew. Safe to use from several threads."""

    def __init__(self, folder: Path):
        self.folder = check_folder(folder)
        self._lock = threading.Lock()
        self._samples = SampleFiles(folder)
        self._metrics, self._evals, self._events = (Tail(folder, name) for name in ("metrics", "evals", "events"))
        self._evaluations: list[dict[str, Any]] = []
        self._newest_events: deque[dict[str, Any]] = deque(maxlen=_MAX_EVENTS)
        self._num_events = 0
        self._curves, self._generation = Curves(), ""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def samples(self) -> Samples:
        return self

    def run_record(self) -> dict[str, Any]:
        """run.json, or what checkpoints tell where a run of an older rlx has none."""
        return _json(self.folder / "run.json") or _from_checkpoints(self.folder)

    def history(self) -> History:
        """As the files stand now."""
        self._read()
        notes = [] if self._curves.count else [self._why_empty()]
        run = {**self.run_record(), "name": self.name, "output_dir": str(self.folder)}
        return History(
            self._generation, run, self._curves, self._evaluations, self._newest_events, self._num_events, False,
            notes=notes,
        )  # fmt: skip

    def since(self, seen: Seen) -> dict[str, Any]:
        """What is new, as JSON."""
        with self._lock:
            return self.history().since(seen)

    def workers_now(self) -> None:
        """Files tell of workers by their events only."""

    def table(self, seconds: float) -> Table:
        with self._lock:
            return self._samples.table(seconds)

    def record(self, place: int) -> dict[str, Any] | None:
        with self._lock:
            return self._samples.record(place)

    def tokenizer_places(self) -> Iterator[str]:
        """Folders or hub names that may have the tokenizer."""
        yield str(self.folder)
        yield from (str(path) for path in sorted(self.folder.glob("checkpoint-*"), reverse=True))
        if isinstance(name := self.run_record().get("tokenizer"), str):
            yield name

    def _read(self) -> None:
        if not self._generation:
            self._forget_metrics()
        self._metrics.follow(self._forget_metrics, lambda record: self._curves.add(record))
        self._evals.follow(self._forget_evaluations, lambda record: self._evaluations.append(_without_samples(record)))
        self._events.follow(self._forget_events, self._take_event)

    def _forget_metrics(self) -> None:
        self._curves, self._generation = Curves(), uuid.uuid4().hex

    def _forget_evaluations(self) -> None:
        self._evaluations, self._generation = [], uuid.uuid4().hex

    def _forget_events(self) -> None:
        self._newest_events.clear()
        self._num_events, self._generation = 0, uuid.uuid4().hex

    def _take_event(self, record: dict[str, Any]) -> None:
        self._newest_events.append(record)
        self._num_events += 1

    def _why_empty(self) -> str:
        if not parts(self.folder, "metrics"):
            return "no metrics.jsonl yet: the run has finished no step"
        return "metrics.jsonl has no whole record yet"


def check_folder(folder: Path) -> Path:
    """ConfigError where there is no folder; an empty one is fine, a run may begin in it."""
    if not folder.exists():
        raise ConfigError(f"{folder}: there is no such folder. Give the output_dir of a run.")
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file. Give the output_dir of a run, the folder that has metrics.jsonl.")
    if not any(parts(folder, name) for name in _NAMES) and not (folder / "run.json").exists():
        runs = sorted(child.name for child in folder.iterdir() if parts(child, "metrics"))[:8]
        if runs:
            names = ", ".join(name if name.isprintable() else ascii(name) for name in runs)
            raise ConfigError(f"{folder} is no output_dir, but its folders are: {names}. Give one of them.")
    return folder


def _without_samples(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "samples"}


def _from_checkpoints(folder: Path) -> dict[str, Any]:
    states = [_json(path) for path in folder.glob("checkpoint-*/trainer_state.json")]
    totals = [state["max_steps"] for state in states if isinstance(state.get("max_steps"), int)]
    return {"total_steps": max(totals)} if totals else {}


def _json(path: Path) -> dict[str, Any]:
    """Empty where it is not there, half-written, or no object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
