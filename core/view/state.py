"""What the page asks for again and again: how the run stands, and what is new since the last answer."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlx.view.curves import Curves, Point, columns

_SILENT_S = 60.0
"""After this long without a record, or ten steps if these are longer, a run counts as stopped."""
_MANY_STEPS = 10
_NEWEST_EVENTS = 200


@dataclass(frozen=True)
class Seen:
    """What the asker has: `generation` names the history that its counts of metrics, evaluations and events are of."""

    generation: str = ""
    metrics: int = 0
    evaluations: int = 0
    events: int = 0


@dataclass(frozen=True)
class History:
    """A run as far as it is known. `events` are the newest of `num_events`; times are unix seconds."""

    generation: str
    run: Mapping[str, Any]
    curves: Curves
    evaluations: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    num_events: int
    live: bool
    notes: Sequence[str] = ()

    def since(self, seen: Seen) -> dict[str, Any]:
        """As JSON: what `seen` lacks; all of it, marked `reset`, where the history is another one or too far ahead."""
        same = seen.generation == self.generation
        new = self.curves.since(seen.metrics) if same else None
        reset = new is None and not (same and seen.metrics == 0 and self.curves.count == 0)
        points = self.curves.points() if new is None else new
        known = seen if same and not reset else Seen()
        fresh = min(self.num_events - known.events, _NEWEST_EVENTS, len(self.events))
        return {
            "generation": self.generation,
            "reset": reset,
            "run": self._standing(),
            "metrics": {"count": self.curves.count, "columns": columns(points)},
            "evaluations": {"count": len(self.evaluations), "records": list(self.evaluations)[known.evaluations :]},
            "events": {"count": self.num_events, "records": list(self.events)[len(self.events) - fresh :] if fresh > 0 else []},
            "texts": {name: value for name, value in self.curves.last.items() if isinstance(value, str)},
        }  # fmt: skip

    def _standing(self) -> dict[str, Any]:
        step = _int(self.curves.last.get("step")) or 0
        total = _int(self.run.get("total_steps"))
        pace = self._step_s()
        state = self._state(step, total, pace)
        left = pace * (total - step) if pace and total and state == "running" else None
        return {
            "name": str(self.run.get("name") or ""),
            "output_dir": str(self.run.get("output_dir") or ""),
            "step": step,
            "total_steps": total,
            "state": state,
            "eta_s": left,
            "updated": self.curves.last.get("time"),
            "live": self.live,
            "notes": list(self.notes),
        }

    def _step_s(self) -> float | None:
        """Seconds a step, of the newest records."""
        timed: list[Point] = [point for point in (self.curves.newest(50)) if "time" in point]
        if len(timed) < 2 or timed[-1]["step"] <= timed[0]["step"]:
            return None
        return max(0.0, timed[-1]["time"] - timed[0]["time"]) / (timed[-1]["step"] - timed[0]["step"])

    def _state(self, step: int, total: int | None, pace: float | None) -> str:
        """running, finished, failed, stopped (by Ctrl-C, or silent before its end) or waiting (no step yet)."""
        for event in reversed(self.events):
            kind = event.get("kind")
            if kind in ("run_finished", "run_failed"):
                return "stopped" if event.get("stopped") else str(kind).removeprefix("run_")
            if kind in ("run_started", "resumed"):
                break
        if total and step >= total:
            return "finished"
        updated = self.curves.last.get("time")
        if not isinstance(updated, int | float):
            return "waiting"
        silent = time.time() - updated
        return "running" if silent < max(_SILENT_S, _MANY_STEPS * (pace or 0.0)) else "stopped"


def _int(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
