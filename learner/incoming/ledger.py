"""The books of a run's prompts: which may be sampled, which are too old, which a step may train on.

    pending ─dispatch─► in flight ─arrived─► ready ──────take──────► consumed
       ▲                    │                  │ └ spare (no spread) ─► filtered, or consumed to fill a step up
       └── failed, too old ─┴──────────────────┘

Ticket n is one prompt of one epoch (`requests.PromptOrder`); it ends exactly once. Pure: no clock, no thread, no I/O.
Ages count optimizer steps: the policy of step s is what s steps have trained, `oldest` the policy of a sample's oldest
token, its staleness the step that trains it less `oldest`. Not here: keys, versions and requests (`feed.py`).
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

_EACH = 3
"""Groups in flight for each worker at least: of those that it works on, the last completions run alone."""
State = Literal["pending", "in_flight", "ready", "spare"]
Arrival = Literal["kept", "too_old", "unknown"]


@dataclass(frozen=True)
class Rules:
    """A batch of `groups_per_step` tickets is consumed every `steps_per_batch` of `total_steps` steps; the others are
    keys of `async:`."""

    groups_per_step: int
    total_steps: int
    max_staleness: int = 0
    max_inflight_groups: int | None = None
    max_requeues: int = 2
    oversample: float = 1.0
    dynamic_sampling: bool = False
    max_sampling_attempts: int = 4
    steps_per_batch: int = 1
    """Optimizer steps that train on one batch; its age is counted at the first"""


@dataclass
class Ticket:
    """One unfinished prompt. `attempt` counts the times that it was put back; `oldest` is, in flight, the policy that
    was served when it was sent, which can only be too low. `given_up`: no step waits for it in this attempt."""

    number: int
    attempt: int = 0
    state: State = "pending"
    oldest: int = 0
    given_up: bool = False


@dataclass(frozen=True)
class Taken:
    """What one step takes: `consumed` ticket numbers, ascending; `filtered` ones, which nothing is trained on; those
    `cancelled` in flight (number, attempt), and those `dropped` after they had arrived, which both come again."""

    step: int
    consumed: tuple[int, ...]
    filtered: tuple[int, ...]
    cancelled: tuple[tuple[int, int], ...]
    dropped: tuple[int, ...]


class Ledger:
    """`step` is the next step to take a batch; `served` the policy that the workers sample from, None before the first.

    After each change: `dispatch()` what may be sent, and, where a step waits, `take()`.
    """

    def __init__(self, rules: Rules, step: int = 0):
        self.rules, self.step = rules, step
        self.served: int | None = None
        self._next = step // rules.steps_per_batch * rules.groups_per_step
        self._open: dict[int, Ticket] = {}
        self._count: Counter[State] = Counter()
        self._fitting: int | None = None
        """Groups in flight that `fit` allows"""

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """For a checkpoint: every ticket below `next` that is not in `open` has ended."""
        return {"next": self._next, "open": sorted(self._open)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()` at the same step: what had not ended comes again."""
        self._next, self._open = int(state["next"]), {int(n): Ticket(int(n)) for n in state["open"]}
        self._count = Counter({"pending": len(self._open)})

    def count(self, *states: State) -> int:
        """Unfinished tickets in `states`."""
        return sum(self._count[state] for state in states)

    def attempt(self, number: int) -> int:
        return self._open[number].attempt

    # --- in and out -----------------------------------------------------------------------------------------------

    def serve(self, step: int) -> None:
        """The workers sample from the policy of `step` from now on."""
        if step > self.step or (self.served is not None and step < self.served):
            raise ValueError(f"policy {step} cannot follow {self.served} before step {self.step}")
        self.served = step

    def fit(self, workers: int, running: int, waiting: int) -> None:
        """Learn how many sequences the `workers` run and how many wait there: what waits for long grows too old before it
        is trained. In flight are from here on so many groups that not more wait than run; while fewer wait, a quarter
        more each time. Nothing where `max_inflight_groups` is given, or where nothing may grow old."""
        if not workers or self.rules.max_inflight_groups is not None or not self.rules.max_staleness:
            return
        if running and waiting > running:
            in_flight = self._count["in_flight"]
            fitting = in_flight * 2 * running // (running + waiting)
            self._fitting = max(_EACH * workers, (in_flight + fitting) // 2)
        elif self._fitting is not None:
            self._fitting += self._fitting // 4 + 1

    def dispatch(self) -> list[Ticket]:
        """Tickets to send now, in flight from here on; those that were put back go first."""
        ahead = self._steps_ahead()
        if ahead < 1 or (not self._count["pending"] and not self._room_for_new(ahead)):
            return []
        assert self.served is not None
        sent = []
        occupied = sorted(t.number for t in self._open.values() if t.state in ("in_flight", "ready"))
        protected = sum(1 for n in occupied if self._is_protected(self._open[n]))
        for ticket in self._in_state("pending"):
            fits = bisect.bisect(occupied, ticket.number) < ahead * self.rules.groups_per_step + self._extra
            if self._is_protected(ticket) and not self._is_last:
                fits = fits and protected < ahead * self.rules.groups_per_step
            if fits and self._has_slot:
                protected += self._is_protected(ticket)
                bisect.insort(occupied, ticket.number)
                sent.append(self._send(ticket))
        while not self._count["pending"] and self._has_slot and self._room_for_new(ahead):
            ticket = self._open[self._next] = Ticket(self._next)
            self._next += 1
            self._count["pending"] += 1
            sent.append(self._send(ticket))
        return sent

    def arrived(self, number: int, attempt: int, oldest: int, useful: bool = True) -> Arrival:
        """A group came whose oldest token is of the policy `oldest`; not `useful` where its rewards have no spread.

        too_old: it must not be trained, its prompt comes again. unknown: nobody waits for it.
        """
        ticket = self._open.get(number)
        if ticket is None or ticket.attempt != attempt or ticket.state != "in_flight":
            return "unknown"
        ticket.oldest = oldest
        if self._is_too_old(ticket):
            self._put_back(ticket)
            return "too_old"
        self._move(ticket, "ready" if useful or not self.rules.dynamic_sampling else "spare")
        return "kept"

    def failed(self, number: int, attempt: int) -> bool:
        """No group came of it; its prompt comes again. False where nobody waits for it."""
        ticket = self._open.get(number)
        if ticket is None or ticket.attempt != attempt or ticket.state != "in_flight":
            return False
        self._put_back(ticket)
        return True

    def held_up_by(self) -> list[Ticket]:
        """In flight: what the next step waits for only because it would be too old for the one after. Each may be given
        up; the step has groups enough without them."""
        if self._is_last or self._count["ready"] < self.rules.groups_per_step:
            return []
        return [t for t in self._waited_for() if t.state == "in_flight" and not self._is_protected(t)]

    def give_up(self, number: int) -> None:
        """Do not wait for this one of `held_up_by()`: it is cancelled and its prompt comes again, unless it arrives
        before the step is taken."""
        self._open[number].given_up = True

    def take(self) -> Taken | None:
        """The batch of `step`, or None while it is not complete; then the next step begins to be the next."""
        chosen = self._last_batch() if self._is_last else self._batch()
        if chosen is None:
            return None
        for ticket in chosen:
            self._end(ticket)
        spares = self._in_state("spare")
        for ticket in spares:
            self._end(ticket)
        step, self.step = self.step, self.step + self.rules.steps_per_batch
        late = [t for t in self._open.values() if t.state in ("in_flight", "ready") and self._is_too_old(t)]
        cancelled = tuple((t.number, t.attempt) for t in late if t.state == "in_flight")
        dropped = tuple(t.number for t in late if t.state == "ready")
        for ticket in late:
            self._put_back(ticket)
        return Taken(step, _numbers(chosen), _numbers(spares), cancelled, dropped)

    # --- the rules ------------------------------------------------------------------------------------------------

    def _batch(self) -> list[Ticket] | None:
        """The oldest that are ready, once those that are waited for are among them."""
        size = self.rules.groups_per_step
        if self._count["ready"] < size and not self._exhausted:
            return None
        must = self._waited_for()
        if any(ticket.state != "ready" for ticket in must):
            return None
        numbers = {ticket.number for ticket in must}
        others = sorted((t for t in self._in_state("ready") if t.number not in numbers), key=_by_age)
        return [*must, *others, *self._in_state("spare")][:size]

    def _last_batch(self) -> list[Ticket] | None:
        """The lowest numbers, so that no prompt is left behind; the run ends with it."""
        size = self.rules.groups_per_step
        lowest = sorted((t for t in self._open.values() if t.state != "spare"), key=lambda t: t.number)[:size]
        if len(lowest) == size and all(ticket.state == "ready" for ticket in lowest):
            return lowest
        if self._exhausted and not self.count("in_flight", "pending"):
            return [*lowest, *self._in_state("spare")][:size]
        return None

    def _waited_for(self) -> list[Ticket]:
        """What the step must have so that nothing is too old afterwards: first of all, nothing that was put back often
        enough."""
        alive = [t for t in self._open.values() if t.state in ("in_flight", "ready")]
        protected = self._due([t for t in alive if self._is_protected(t)])
        numbers = {ticket.number for ticket in protected}
        others = self._due([t for t in alive if self._is_worth_waiting(t)])
        return [*protected, *(t for t in others if t.number not in numbers)][: self.rules.groups_per_step]

    def _due(self, tickets: list[Ticket]) -> list[Ticket]:
        """As many of them as the later steps cannot take before they are too old; ready ones first."""
        due: list[Ticket] = []
        left: list[Ticket] = []
        for seen, ticket in enumerate(sorted(tickets, key=_by_age), 1):
            later_steps = (ticket.oldest + self.rules.max_staleness - self.step) // self.rules.steps_per_batch
            bisect.insort(left, ticket, key=self._by_readiness)
            while len(due) < seen - self.rules.groups_per_step * later_steps:
                due.append(left.pop(0))
        return due

    def _steps_ahead(self) -> int:
        """Batches, from the next one, that may hold what is sampled now."""
        if self.served is None or self.step >= self.rules.total_steps:
            return 0
        return (self.rules.max_staleness - (self.step - self.served)) // self.rules.steps_per_batch + 1

    def _room_for_new(self, ahead: int) -> bool:
        size, occupied = self.rules.groups_per_step, self.count("in_flight", "ready", "pending")
        left = -(-(self.rules.total_steps - self.step) // self.rules.steps_per_batch)
        drawn = self.rules.max_sampling_attempts * size + (min(ahead, left) - 1) * size + self._extra
        return (
            ahead > 0
            and occupied < min(ahead * size + self._extra, left * size)
            and (not self.rules.dynamic_sampling or occupied + self._count["spare"] < drawn)
        )

    @property
    def _extra(self) -> int:
        """Groups that are sent on top of those that will be in time: some of them will be put back."""
        return math.ceil(self.rules.groups_per_step * (self.rules.oversample - 1)) if self.rules.max_requeues else 0

    @property
    def _has_slot(self) -> bool:
        limit = self.rules.max_inflight_groups or self._fitting
        return limit is None or self._count["in_flight"] < limit

    @property
    def _is_last(self) -> bool:
        return self.step >= self.rules.total_steps - self.rules.steps_per_batch

    @property
    def _exhausted(self) -> bool:
        """Whether so many groups were sampled for the step that it is filled with spare ones."""
        drawn = self.count("ready", "spare")
        return self.rules.dynamic_sampling and drawn >= self.rules.max_sampling_attempts * self.rules.groups_per_step

    def _is_too_old(self, ticket: Ticket) -> bool:
        return self.step - ticket.oldest > self.rules.max_staleness

    def _is_protected(self, ticket: Ticket) -> bool:
        return ticket.attempt >= self.rules.max_requeues

    def _is_worth_waiting(self, ticket: Ticket) -> bool:
        """With `oversample`, a step goes on with the first groups that are complete."""
        return self._is_protected(ticket) or not (self._extra or ticket.given_up)

    def _by_readiness(self, ticket: Ticket) -> tuple[bool, bool, int, int]:
        return ticket.state != "ready", not self._is_protected(ticket), *_by_age(ticket)

    # --- entries --------------------------------------------------------------------------------------------------

    def _in_state(self, state: State) -> list[Ticket]:
        if not self._count[state]:
            return []
        return sorted((t for t in self._open.values() if t.state == state), key=lambda t: t.number)

    def _send(self, ticket: Ticket) -> Ticket:
        assert self.served is not None
        ticket.oldest = self.served
        self._move(ticket, "in_flight")
        return ticket

    def _put_back(self, ticket: Ticket) -> None:
        ticket.attempt += 1
        ticket.given_up = False
        self._move(ticket, "pending")

    def _move(self, ticket: Ticket, state: State) -> None:
        self._count[ticket.state] -= 1
        self._count[state] += 1
        ticket.state = state

    def _end(self, ticket: Ticket) -> None:
        self._count[ticket.state] -= 1
        del self._open[ticket.number]


def _by_age(ticket: Ticket) -> tuple[int, int]:
    return ticket.oldest, ticket.number


def _numbers(tickets: Iterable[Ticket]) -> tuple[int, ...]:
    return tuple(sorted(ticket.number for ticket in tickets))
