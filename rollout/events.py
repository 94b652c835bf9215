"""What happened to the workers, for people and for the learner's events.jsonl."""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Literal, get_args

EventKind = Literal[
    "worker_added", "worker_started", "worker_down", "worker_quarantined", "worker_restarted", "worker_removed"
]  # fmt: skip
KEPT_EVENTS = 1000


class ServiceEvents:
    """The newest KEPT_EVENTS, each with a number `n` that grows by one from 1 on."""

    def __init__(self) -> None:
        self._ring: deque[dict[str, Any]] = deque(maxlen=KEPT_EVENTS)
        self.counts: Counter[str] = Counter(dict.fromkeys(get_args(EventKind), 0))
        """All of them, by kind"""
        self.on_event: Callable[[dict[str, Any]], None] = lambda event: None

    @property
    def newest(self) -> int:
        """The number of the last one; 0 before the first."""
        return self.counts.total()

    def add(self, kind: EventKind, worker: str, text: str) -> None:
        self.counts[kind] += 1
        event = {
            "n": self.newest, "time": time.time(), "source": "service", "kind": kind, "step": None, "text": text,
            "worker": worker,
        }  # fmt: skip
        self._ring.append(event)
        self.on_event(event)

    def after(self, number: int) -> list[dict[str, Any]]:
        """Those that are newer, the oldest first. A number that was not given yet is of a service before this one: then
        all of them."""
        new = self.newest - number if number <= self.newest else self.newest
        return list(itertools.islice(self._ring, max(len(self._ring) - new, 0), None))
