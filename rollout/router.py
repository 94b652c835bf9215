"""Which worker a group goes to, and when.

    place ──► queue, first come first served ──► the worker with room that would be done first (`candidates.py`)

A whole group goes to one worker, where its prompt is computed once and shared by the samples. How many sequences a
worker gets is found by asking it how loaded it is: more while nothing waits in its engine, less once its key-value
cache overflows and work is thrown away. Those beyond wait here, where they can still go to any worker and be
cancelled for nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field

from rlx.errors import DeadlineExceeded, RlxError, ServiceUnavailable
from rlx.rollout.candidates import Candidates
from rlx.rollout.charge import Charge
from rlx.rollout.deadline import answer_of
from rlx.rollout.fleet import Fleet, Member
from rlx.rollout.worker import EngineLoad
from rlx.wire import GroupRequest

POLL_S = 0.5
POLL_COST_S = 0.002
"""The polls of many workers are spread so that they take the gateway no more than about this share of a second each."""
STATUS_TIMEOUT_S = 10.0
FIRST_LIMIT = 64
FULL = 0.95
"""Share of the key-value cache from which on a worker gets no more than it has."""


@dataclass
class Limit:
    """How many sequences a worker may have: doubled until the first sign that it is full, from then on a sixteenth more
    at a time, and a fifth less whenever its engine preempted something."""

    sequences: int = FIRST_LIMIT
    preemptions: int = 0
    doubling: bool = True

    def learn(self, load: EngineLoad, in_flight: int) -> None:
        """`in_flight`: the sequences that it was given."""
        preempted, self.preemptions = load.preemptions > self.preemptions, load.preemptions
        if preempted:
            self.sequences = max(1, min(self.sequences, load.running + load.waiting) * 4 // 5)
            self.doubling = False
        elif load.waiting or load.kv_cache_usage > FULL:
            self.doubling = False
        elif in_flight >= self.sequences * 3 // 4:
            self.sequences += self.sequences if self.doubling else max(1, self.sequences // 16)


@dataclass(eq=False)
class _Waiter:
    completions: int
    tokens: int
    place: asyncio.Future[Charge]
    since: float = field(default_factory=time.monotonic)


class Router:
    """Consumes what wants a worker, produces members that are charged with it until it ends."""

    def __init__(self, fleet: Fleet):
        self._fleet = fleet
        self._limits: dict[str, Limit] = {}
        self._queue: deque[_Waiter] = deque()
        self._minding: asyncio.Task[None] | None = None
        self._candidates = Candidates(fleet, self._has_room)

    @property
    def waiting(self) -> int:
        """How many wait for room."""
        return len(self._queue)

    @property
    def oldest_s(self) -> float:
        """How long the first in the queue has waited."""
        return time.monotonic() - self._queue[0].since if self._queue else 0.0

    @property
    def waiting_completions(self) -> int:
        """How many completions those that wait want."""
        return sum(waiter.completions for waiter in self._queue)

    def limit(self, member: Member) -> Limit:
        limit = self._limits.get(member.name)
        if limit is None:
            limit = self._limits[member.name] = Limit()
        return limit

    async def assign(self, request: GroupRequest) -> Charge:
        """`place` for a group."""
        n = request.num_generations
        return await self.place(n, n * (request.prompt_ids.size + request.sampling.max_tokens))

    async def place(self, completions: int, tokens: int) -> Charge:
        """A worker, charged until the end of `with`. Waits for one; the caller bounds it. ServiceUnavailable when none can
        come back."""
        waiter = _Waiter(completions, tokens, asyncio.get_running_loop().create_future())
        self._queue.append(waiter)
        self._dispatch()
        if self._minding is None or self._minding.done():
            self._minding = asyncio.create_task(self._mind(), name="router")
        try:
            return await waiter.place
        except asyncio.CancelledError:
            if waiter in self._queue:
                self._queue.remove(waiter)
                self._dispatch()
            elif not waiter.place.cancelled() and waiter.place.exception() is None:
                waiter.place.result().close()
            raise

    async def close(self) -> None:
        if self._minding is not None:
            self._minding.cancel()
            await asyncio.gather(self._minding, return_exceptions=True)

    def _dispatch(self) -> None:
        """Give the first in the queue their workers, as far as there is room."""
        while self._queue:
            first = self._queue[0]
            member = self._candidates.first(first.completions)
            if member is None:
                break
            self._queue.popleft()
            if not first.place.done():
                first.place.set_result(self._fleet.charging(member, first.completions, first.tokens, self._uncharged))
                self._candidates.changed(member)

    def _has_room(self, member: Member, completions: int) -> bool:
        """An idle worker takes any group, also one that is larger than its limit."""
        return not member.in_flight or member.in_flight + completions <= self.limit(member).sequences

    def _uncharged(self, member: Member) -> None:
        self._candidates.changed(member)
        self._dispatch()

    async def _mind(self) -> None:
        """While anything waits or runs, and once after that: ask the workers for their load, and look whether somebody is
        ready."""
        while self._queue or self._busy():
            pause_s = max(POLL_S, POLL_COST_S * len(self._busy()))
            if self._queue and not self._fleet.ready():
                await self._wait_ready(pause_s)
            else:
                await asyncio.sleep(pause_s)
                await asyncio.gather(*(self._ask(member) for member in self._busy()))
                self._candidates.compare()
            self._dispatch()

    async def _wait_ready(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._fleet.wait_ready()
        except TimeoutError:
            pass  # the next look does the same; meanwhile whoever waited may be gone
        except ServiceUnavailable as error:
            while self._queue:
                waiter = self._queue.popleft()
                if not waiter.place.done():
                    waiter.place.set_exception(ServiceUnavailable(str(error)))

    async def _ask(self, member: Member) -> None:
        """Its load, and with it its limit. A worker that says it is gone is down; one that is late, the supervisor's
        to judge."""
        incarnation = member.incarnation
        member.worked = False
        try:
            status = await answer_of(member.name, STATUS_TIMEOUT_S, member.worker.status())
        except DeadlineExceeded:
            return
        except RlxError as error:
            if member.incarnation == incarnation:
                self._fleet.mark_down(member, str(error))
            return
        if member.incarnation == incarnation:
            self._candidates.learn(member, member.load, status.load)
            member.observe(status)
            self.limit(member).learn(status.load, member.in_flight)

    def _busy(self) -> list[Member]:
        """Those with work, now or since they were last asked."""
        return [m for m in self._fleet.members if (m.in_flight or m.worked) and m.state in ("ready", "draining")]
