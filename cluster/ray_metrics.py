"""The gateway's series as metrics of Ray, so that they are on Ray's own endpoints and dashboard, too.

    readings ── every REFRESH_S, in the background ──► ray.util.metrics ─► Ray's agent of this node ─► Prometheus

Ray puts `ray_` before the names, exports about every ten seconds, and shows a counter once it is above 0.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from ray.util.metrics import Counter, Gauge

from rlx.cluster.progress import Say
from rlx.series import Reading

REFRESH_S = 5.0
_SHARE = 0.01
"""Of a core, at most: with very many workers the refreshes are farther apart. Processor time, not the clock's: a machine
that stood still for a moment is no reason."""
_TIMEOUT_S = 10.0


class RayMetrics:
    """`read` gives the readings, in the event loop. What goes wrong ends the refreshing and is said once: the service
    goes on, and so does its own /metrics."""

    def __init__(self, read: Callable[[], Iterable[Reading]], say: Say):
        self._read, self._say = read, say
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._counted: dict[tuple[str, tuple[str, ...]], float] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Refresh from here on, until `close`."""
        self._task = asyncio.create_task(self._keep(), name="Ray's metrics")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _keep(self) -> None:
        while True:
            work = asyncio.create_task(asyncio.to_thread(self._refresh, list(self._read())))
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    used_s = await asyncio.shield(work)
            except Exception as error:  # Ray's, of any kind: monitoring must not touch the service
                told = f"no answer within {_TIMEOUT_S:g} s" if isinstance(error, TimeoutError) else error
                self._say(f"note: Ray's metrics stand still from here on ({told}); /metrics of the gateway does not")
                return
            finally:
                await asyncio.wait([work], timeout=_TIMEOUT_S)  # also when cancelled: Ray ends next
            await asyncio.sleep(max(REFRESH_S, used_s / _SHARE))

    def _refresh(self, readings: list[Reading]) -> float:
        """Seconds of processor time that it took."""
        began = time.thread_time()
        for reading in readings:
            series, tags = reading.series, dict(zip(reading.series.labels, reading.labels, strict=True))
            if series.kind == "gauge":
                if series.name not in self._gauges:
                    self._gauges[series.name] = Gauge(series.name, series.help, series.labels)
                self._gauges[series.name].set(reading.value, tags)
            elif (grown := self._growth(reading)) > 0:
                if series.name not in self._counters:
                    self._counters[series.name] = Counter(series.name, series.help, series.labels)
                self._counters[series.name].inc(grown, tags)
        return time.thread_time() - began

    def _growth(self, reading: Reading) -> float:
        """Of a counter since the last time; one that fell, as that of a worker which was restarted, began at 0."""
        key = reading.series.name, reading.labels
        before = self._counted.get(key, 0.0)
        self._counted[key] = reading.value
        return reading.value - before if reading.value >= before else reading.value
