"""The run of a gateway, as its learner tells of it: bounded, in memory."""

from __future__ import annotations

import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from rlx.view.choose import Samples, Table, table_of
from rlx.view.curves import MAX_POINTS, Curves
from rlx.view.state import History, Seen

Workers = Callable[[], Sequence[Mapping[str, Any]]]


class LiveRun(Samples):
    """What arrived last: curves of about `max_metrics` points, samples and events. Token texts come from the tokenizer
    of `base_model`; `workers` gives the records of GET /v1/workers. Safe to use
    from several threads, but for `workers_now`."""

    def __init__(
        self,
        max_metrics: int = MAX_POINTS,
        max_samples: int = 2_000,
        max_events: int = 2_000,
        base_model: str | None = None,
        workers: Workers | None = None,
    ):
        self._max_metrics, self._base_model, self._workers = max_metrics, base_model, workers
        self._lock = threading.Lock()
        self._kept: deque[tuple[int, dict[str, Any]]] = deque(maxlen=max_samples)
        self._events: deque[dict[str, Any]] = deque(maxlen=max_events)
        self._num_samples = 0
        self._begin({})

    @property
    def name(self) -> str:
        return str(self._run.get("name") or "run")

    @property
    def samples(self) -> Samples:
        return self

    def add(self, body: Mapping[str, Any]) -> None:
        """A body of POST /v1/observations; records that are no objects are left out. Another `output_dir` begins anew,
        and a step that is not ahead of the newest drops what lay behind it: the run was resumed."""
        with self._lock:
            run = body.get("run")
            if isinstance(run, Mapping):
                if run.get("output_dir") != self._run.get("output_dir"):
                    self._begin(run)
                self._run |= run
            for record in _records(body, "metrics"):
                if self._curves.last and _step(record) <= _step(self._curves.last):
                    self._go_back(_step(record))
                self._curves.add(record)
            for record in _records(body, "evaluations"):
                self._evaluations.append({name: value for name, value in record.items() if name != "samples"})
            for record in _records(body, "events"):
                self._events.append(record)
                self._num_events += 1
            for record in _records(body, "samples"):
                self._kept.append((self._num_samples, record))
                self._num_samples += 1

    def history(self) -> History:
        notes = [] if self._curves.count else ["no learner has told of a step yet"]
        return History(
            self._generation, self._run, self._curves, self._evaluations, self._events, self._num_events, True, notes,
        )  # fmt: skip

    def since(self, seen: Seen) -> dict[str, Any]:
        """What is new, as JSON."""
        with self._lock:
            return self.history().since(seen)

    def workers_now(self) -> list[Mapping[str, Any]] | None:
        """The workers as they are; None where nobody knows them. For the thread that `workers` belongs to."""
        return None if self._workers is None else list(self._workers())

    def table(self, seconds: float) -> Table:
        with self._lock:
            return table_of(self._kept)

    def record(self, place: int) -> dict[str, Any] | None:
        with self._lock:
            first = self._kept[0][0] if self._kept else 0
            found = islice(self._kept, max(0, place - first), None) if place >= first else iter(())
            return next((record for number, record in found if number == place), None)

    def tokenizer_places(self) -> Iterator[str]:
        """Folders or hub names that may have the tokenizer."""
        yield from (str(place) for place in (self._run.get("output_dir"), self._base_model) if place)

    def _begin(self, run: Mapping[str, Any]) -> None:
        self._run = dict(run)
        self._generation = uuid.uuid4().hex
        self._curves = Curves(self._max_metrics)
        self._evaluations: list[dict[str, Any]] = []
        events = [event for event in self._events if event.get("source") == "service"]  # the service is the same
        self._num_events = len(events)
        self._events.clear()
        self._events.extend(events)
        self._kept.clear()

    def _go_back(self, step: float) -> None:
        self._generation = uuid.uuid4().hex
        kept, self._curves = self._curves.points(), Curves(self._max_metrics)
        for point in kept:
            if point["step"] < step:
                self._curves.add(point)
        self._evaluations = [record for record in self._evaluations if _step(record) < step]
        samples = [item for item in self._kept if _step(item[1]) < step]
        self._kept.clear()
        self._kept.extend(samples)


def _step(record: Mapping[str, Any]) -> float:
    step = record.get("step")
    return step if isinstance(step, int | float) else 0


def _records(body: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found = body.get(name)
    return [record for record in found if isinstance(record, dict)] if isinstance(found, list) else []
