"""The live view of a run in a terminal: a few lines that stay in place, under everything that is printed.

    step 12/40  ━━━━━━━━━━━━────────────────────  0:42, 1:38 left
    reward      0.512  ▁▂▃▄▅▆▇█  0.120 to 0.512   len 34.5  kl 0.0012
    time        3.50 s = rollouts 1.20 + train 2.10 + publish 0.20
    bound       generation-bound: 1 more worker would balance it
    workers     2/2 ready, weights 13
    12:03:04    rlx-rollout-1: restarting, 1 of 3

Its height never changes, so nothing jumps; a line that is too long is cut. Not here: what a line of the log says
(`progress.py`).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from rlx.errors import RlxError
from rlx.learner.watch.pace import Pace, clock

_EVENTS = 3
_LABEL = 12
_REFRESHES_PER_S = 4
_LOOK_S = 3.0
"""Seconds between two looks at the workers and the service's log."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_HISTORY = 400
SERVICE_LOG = "RLX_SERVICE_LOG"
"""Environment: where `rlx run` writes what its service says; its warnings are shown here, so that two processes do not
write to one terminal."""
_WARNING = "warning: "


class LiveView:
    """`workers` asks the service for its workers (records as `/v1/workers` has them), None where there is no service."""

    def __init__(
        self,
        console: Console,
        pace: Pace,
        workers: Callable[[], Sequence[Mapping[str, Any]]] | None = None,
        service_log: Path | None = None,
    ):
        self._console, self._pace = console, pace
        self._workers, self._service_log, self._service_is_up = workers, service_log, False
        self._rewards: list[float] = []
        self._measures, self._time, self._bound, self._fleet = "", "waiting for the first step", "", ""
        self._events: list[tuple[str, str, str]] = []
        self._told, self._telling = set(), threading.Lock()  # type: tuple[set[str], threading.Lock]
        self._over = threading.Event()
        self._live = Live(console=console, refresh_per_second=_REFRESHES_PER_S, get_renderable=lambda: self)

    def start(self) -> None:
        self._live.start()
        if self._workers is not None or self._service_log is not None:
            threading.Thread(target=self._look, name="live-view", daemon=True).start()

    def stop(self) -> None:
        """Give the terminal back; idempotent."""
        self._over.set()
        self._live.stop()

    def step(self, reward: float, measures: str, time_split: str, bottleneck: str) -> None:
        """What the step that just ended looked like."""
        self._rewards = [*self._rewards[-_HISTORY:], reward]
        self._measures, self._time, self._bound = measures, time_split, bottleneck

    def tell(self, text: str, instead_of: str = "") -> None:
        """An event, shown until others push it out; the same text once. It takes the place of one that was told with the
        same `instead_of`. Any thread."""
        with self._telling:
            if text in self._told:
                return
            self._told.add(text)
            others = [event for event in self._events if not instead_of or event[2] != instead_of]
            self._events = [*others[1 - _EVENTS :], (time.strftime("%H:%M:%S"), text, instead_of)]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, console.size.height
        lines = self._lines(width)
        for line in lines[: max(1, height - 2)]:
            line.truncate(width, overflow="ellipsis")
            line.no_wrap = True
            yield line

    def _lines(self, width: int) -> list[Text]:
        pace = self._pace
        left = "" if pace.left_s is None else f", {clock(pace.left_s)} left"
        head, tail = f"step {pace.step}/{pace.total}", f"{clock(pace.elapsed_s)}{left}"
        room = min(40, width - max(_LABEL, len(head) + 2) - len(tail) - 2)
        bar = Text(head.ljust(_LABEL) if len(head) < _LABEL else f"{head}  ", style="bold")
        if room >= 4:
            full = round(room * pace.step / max(pace.total, 1))
            bar.append("━" * full, style="green").append("─" * (room - full), style="dim").append("  ")
        bar.append(tail, style="not bold")
        known = [reward for reward in self._rewards if not math.isnan(reward)]
        reward = "" if not known else f"{known[-1]:.3f}  {sparkline(known, min(24, max(8, width - 52)))}"
        if len(known) > 1:
            reward += f"  {known[0]:.3f} to {known[-1]:.3f}"
        lines = [
            bar,
            _line("reward", f"{reward}   {self._measures}"),
            _line("time", self._time),
            _line("bound", self._bound),
            _line("workers", self._fleet),
        ]
        events = [_line(at, text, "yellow") for at, text, _ in self._events]
        return lines + events + [Text("") for _ in range(_EVENTS - len(events))]

    def _look(self) -> None:
        place = 0
        while not self._over.wait(_LOOK_S if self._fleet else 0.1):
            if self._workers is not None:
                self._fleet = _fleet_line(self._workers)
            if self._service_log is not None:
                place = self._follow(self._service_log, place)

    def _follow(self, log: Path, place: int) -> int:
        """Tell what the service has written since `place`; returns where it ends now."""
        if not log.exists():
            return place
        with log.open("rb") as stream:
            stream.seek(place)
            said = stream.read()
        whole = said.rfind(b"\n") + 1
        for line in said[:whole].decode(errors="replace").splitlines():
            if self._service_is_up and line.startswith(_WARNING):
                self.tell(line)
            self._service_is_up |= line.startswith("ready: ")
        return place + whole


def sparkline(values: list[float], width: int) -> str:
    """The finite `values` as at most `width` blocks; each stands for the mean of its share of them."""
    size = max(1, math.ceil(len(values) / width))
    means = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    low, high = min(means), max(means)
    if high == low:
        return _BLOCKS[0] * len(means)
    return "".join(_BLOCKS[round((mean - low) / (high - low) * (len(_BLOCKS) - 1))] for mean in means)


def _fleet_line(workers: Callable[[], Sequence[Mapping[str, Any]]]) -> str:
    try:
        statuses = workers()
    except (RlxError, OSError, RuntimeError) as error:  # RuntimeError: the client was closed meanwhile
        return f"the service does not answer: {error}"
    ready = [status for status in statuses if status["state"] == "ready"]
    others = [f"{status['name']} {status['state']}" for status in statuses if status["state"] != "ready"]
    weights = [f"weights {max(status['weight_version'] for status in ready)}"] if ready else []
    return ", ".join([f"{len(ready)}/{len(statuses)} ready", *weights, *others])


def _line(label: str, text: str, style: str = "") -> Text:
    return Text(label.ljust(_LABEL), style="dim").append(text, style=f"not dim {style}".strip())
