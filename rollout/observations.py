"""What the gateway knows of the run that it serves: the learner's newest records, and its own events for the learner.

    learner's observer ── POST /v1/observations: records of its files, as it writes them ──► Observations ─► /metrics
                       ◄── what happened to the workers since it last asked ────────────────     └─► the run's page

Everything is bounded and in memory: the files in `output_dir` are the truth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlx.errors import WireError
from rlx.rollout.events import ServiceEvents
from rlx.series import EVAL_REWARD, Reading, learner_readings
from rlx.view.live import LiveRun

MAX_OBSERVATIONS_BYTES = 8 * 2**20
_RECORDS = ("metrics", "samples", "evaluations", "events")


class Observations:
    """`events`: of the service. `store` keeps the records for the page."""

    def __init__(self, events: ServiceEvents, store: LiveRun):
        self.store = store
        self._events = events
        self._output_dir: Any = None
        self._metrics: dict[str, Any] = {}
        self._evaluation: dict[str, Any] = {}
        events.on_event = lambda event: store.add({"events": [event]})

    def add(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Keep what the learner sent; the service's events after number `after`, and `next` to ask from then on.

        WireError where `body` is not `{"run": {...}?, "metrics": [...], "samples": [...], "evaluations": [...],
        "events": [...], "after": int}`; each list may be missing.
        """
        after = _check(body)
        new = self._events.after(after)
        if (run := body.get("run")) and run.get("output_dir") != self._output_dir:
            self._output_dir, self._metrics, self._evaluation = run.get("output_dir"), {}, {}
        for record in body.get("metrics", ()):
            self._metrics = record
        for record in body.get("evaluations", ()):
            self._evaluation = record
        # The store has the service's events already.
        own = [event for event in body.get("events", ()) if event.get("source") != "service"]
        self.store.add({**body, "events": own})
        return {"events": new, "next": self._events.newest}

    def readings(self) -> Iterator[Reading]:
        """Of the learner's newest records."""
        yield from learner_readings(self._metrics)
        if isinstance(value := self._evaluation.get(EVAL_REWARD.key), int | float):
            yield Reading(EVAL_REWARD, (), float(value))


def _check(body: Mapping[str, Any]) -> int:
    """The number that the events are asked after."""
    for name in _RECORDS:
        records = body.get(name, [])
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise WireError(f"{name!r} must be a list of objects")
    if not isinstance(body.get("run", {}), dict):
        raise WireError("'run' must be an object")
    after = body.get("after", 0)
    if not isinstance(after, int) or isinstance(after, bool) or after < 0:
        raise WireError(f"'after' must be a number from 0 on, got {after!r:.100}")
    return after
