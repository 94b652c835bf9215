"""The metrics of a run as curves of bounded size: neighbouring points are averaged when there are too many."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

MAX_POINTS = 1_000
_TAIL = 500
Point = dict[str, float]


class Curves:
    """The numbers of metrics records. Between `max_points` and twice as many points are kept, and the newest records
    as they came."""

    def __init__(self, max_points: int = MAX_POINTS):
        self._max_points = max_points
        self._points: list[Point] = []
        self._open: list[Point] = []
        self._stride = 1
        """Records that a point stands for"""
        self._tail: deque[Point] = deque(maxlen=_TAIL)
        self.count = 0
        """Records seen"""
        self.last: dict[str, Any] = {}
        """The newest record, with its texts"""

    def add(self, record: Mapping[str, Any]) -> None:
        point = {name: float(value) for name, value in record.items() if _is_number(value)}
        if "step" not in point:
            return
        self.count += 1
        self.last = dict(record)
        self._tail.append(point)
        self._open.append(point)
        if len(self._open) == self._stride:
            self._points.append(_mean(self._open))
            self._open = []
        if len(self._points) == 2 * self._max_points:
            self._points = [_mean(self._points[i : i + 2]) for i in range(0, len(self._points), 2)]
            self._stride *= 2

    def points(self) -> list[Point]:
        """All of them, oldest first."""
        return [*self._points, *([_mean(self._open)] if self._open else [])]

    def newest(self, count: int) -> list[Point]:
        """The newest records, at most `count` and 500."""
        return list(self._tail)[-count:]

    def since(self, count: int) -> list[Point] | None:
        """What came after the first `count` records; None where that is not known any more, or was never."""
        new = self.count - count
        if not 0 <= new <= len(self._tail) or count == 0:
            return None
        return list(self._tail)[len(self._tail) - new :]


def columns(points: Iterable[Point]) -> dict[str, list[float | None]]:
    """`points` by name, with six digits; None where a point lacks a name."""
    rows = list(points)
    names = dict.fromkeys(name for row in rows for name in row)
    return {
        name: [float(f"{row[name]:.6g}") if name in row else None for row in rows] for name in names if name != "step"
    } | {"step": [row["step"] for row in rows]}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mean(points: list[Point]) -> Point:
    """Name by name over the points that have it; of the step the last."""
    if len(points) == 1:
        return points[0]
    values: dict[str, list[float]] = {}
    for point in points:
        for name, value in point.items():
            values.setdefault(name, []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()} | {"step": points[-1]["step"]}
