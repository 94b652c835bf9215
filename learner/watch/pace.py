"""How fast a run goes, and when it will be done."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable

_LOOKED_AT = 50
_OUTLIER = 4.0
"""Times the median from which on a step is no sign of the pace: the service was away, the machine slept."""


class Pace:
    """Steps of a run of `total`, that begins at `step`. `now` is a clock in seconds."""

    def __init__(self, step: int, total: int, now: Callable[[], float] = time.perf_counter):
        self.step, self.total, self._now = step, total, now
        self._began = self._last = now()
        self._seconds: deque[float] = deque(maxlen=_LOOKED_AT)

    def reached(self, step: int) -> None:
        """The optimizer step `step` has ended."""
        now = self._now()
        if step > self.step:
            self._seconds.append((now - self._last) / (step - self.step))
        self.step, self._last = step, now

    @property
    def elapsed_s(self) -> float:
        return self._now() - self._began

    @property
    def left_s(self) -> float | None:
        """Seconds to the end by the last steps' pace, without outliers; None before the first step."""
        if not self._seconds:
            return None
        most = _OUTLIER * statistics.median(self._seconds)
        pace = statistics.fmean(seconds for seconds in self._seconds if seconds <= most)
        return pace * (self.total - self.step)


def clock(seconds: float) -> str:
    """1:02, 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
