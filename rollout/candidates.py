"""Which workers may get a group, the one that would be done with it first in front.

Finding that one takes a time that hardly grows with their number. A worker's pace is the seconds of one of its decode
steps, found from what it says of its load: tokens in flight count by it, and a worker that is much slower than the
others gets nothing for a while, as a whole step would wait for its groups. Not here: who is ready (`fleet.py`), how
much each may have (`router.py`).
"""

from __future__ import annotations

import heapq
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from rlx.rollout.fleet import Fleet, Member
from rlx.rollout.worker import EngineLoad

SLOW = 3.0
"""Times the median worker's pace from which on a worker is left out ..."""
SLOW_S = 60.0
"""... and the seconds, since it was last seen so slow, after which it is tried again."""
_SHORTEST_S = 0.05
"""Seconds of work that a pace is found from at least."""
_Entry = tuple[float, int, int, Member]


@dataclass(frozen=True)
class _Pace:
    step_s: float
    incarnation: int
    """Of the process that it was found for"""
    seen_at: float


class Candidates:
    """`has_room(member, completions)` says whether a worker may have so many more. Whoever changes a worker's charge or
    its room calls `changed`; who is ready it sees itself."""

    def __init__(self, fleet: Fleet, has_room: Callable[[Member, int], bool]):
        self._fleet, self._has_room = fleet, has_room
        self._paces: dict[Member, _Pace] = {}
        self._relative: dict[Member, float] = {}
        self._eligible: set[Member] = set()
        self._heap: list[_Entry] = []
        self._entry_of: dict[Member, _Entry] = {}
        self._order = itertools.count()
        self._changes, self._most_refused = -1, 0

    def first(self, completions: int) -> Member | None:
        """The worker to give them to; None while none has room."""
        is_outdated = self._changes != self._fleet.changes or len(self._heap) > 4 * len(self._eligible) + 16
        if is_outdated or completions < self._most_refused:
            self._rebuild()
        while self._heap:
            entry = self._heap[0]
            member = entry[-1]
            if self._entry_of.get(member) is entry:
                if self._has_room(member, completions):
                    return member
                del self._entry_of[member]  # until it has changed
                self._most_refused = max(self._most_refused, completions)
            heapq.heappop(self._heap)
        return None

    def changed(self, member: Member) -> None:
        if self._changes == self._fleet.changes and member in self._eligible:
            heapq.heappush(self._heap, self._enter(member))

    def learn(self, member: Member, before: EngineLoad, load: EngineLoad) -> None:
        """What it said of itself at two times, one after the other."""
        seconds, tokens = load.busy_s - before.busy_s, load.generated_tokens - before.generated_tokens
        sequences = (before.running + load.running) / 2
        if seconds < _SHORTEST_S or tokens < 1 or not sequences:
            return
        step_s, known = seconds * sequences / tokens, self._paces.get(member)
        if known is not None and known.incarnation == member.incarnation:
            step_s = (step_s + known.step_s) / 2
        self._paces[member] = _Pace(step_s, member.incarnation, time.monotonic())

    def compare(self) -> None:
        """Look at all again, by what was learned."""
        self._paces = {m: pace for m, pace in self._paces.items() if pace.incarnation == m.incarnation}
        paces = {m: self._paces[m].step_s for m in self._fleet.ready() if m in self._paces}
        median_s = statistics.median_low(paces.values()) if paces else 1.0
        self._relative = {m: step_s / median_s for m, step_s in paces.items()}
        self._rebuild()

    def _is_slow(self, member: Member) -> bool:
        if self._relative.get(member, 1.0) <= SLOW:
            return False
        return member.in_flight > 0 or time.monotonic() - self._paces[member].seen_at < SLOW_S

    def _rebuild(self) -> None:
        self._changes, self._most_refused = self._fleet.changes, 0
        ready = self._fleet.ready()
        self._eligible = {m for m in ready if not self._is_slow(m)} or set(ready)
        self._entry_of = {}
        self._heap = [self._enter(m) for m in ready if m in self._eligible]
        heapq.heapify(self._heap)

    def _enter(self, member: Member) -> _Entry:
        cost = member.tokens_in_flight * self._relative.get(member, 1.0)
        entry = self._entry_of[member] = (cost, member.in_flight, next(self._order), member)
        return entry
