"""The workers as the service sees them: a state machine without I/O. Who is ready, who is busy, who comes back.

    loading ──► catching_up ──► verifying ──► ready ──► down (died) | quarantined (did not take weights)
                     ▲                                     │
                     └──────────── restarting ◄────────────┘        down | quarantined ──► gone: not restarted any more
    draining: takes no new work and leaves

`TRANSITIONS` is the whole of it. `supervisor.py` moves members along it, `weight_updates.py` swaps their weights,
the router gives them work. Work goes only to a member that is ready and has the fleet's weights.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from rlx.config.sections import ServiceSection
from rlx.errors import ServiceUnavailable
from rlx.rollout.charge import Charge, Marking
from rlx.rollout.events import EventKind, ServiceEvents
from rlx.rollout.worker import EngineLoad, Worker, WorkerStatus

State = Literal[
    "loading", "restarting", "catching_up", "verifying", "ready", "down", "quarantined", "draining", "gone"
]  # fmt: skip
Event = Literal[
    "loaded", "caught_up", "verified", "behind", "swapped", "failed", "refused", "restart", "give_up", "retire"
]

TRANSITIONS: dict[tuple[State, Event], State] = {
    ("loading", "loaded"): "catching_up",
    ("restarting", "loaded"): "catching_up",
    ("catching_up", "caught_up"): "verifying",
    ("verifying", "verified"): "ready",
    ("ready", "behind"): "catching_up",
    ("ready", "swapped"): "verifying",
    ("quarantined", "swapped"): "verifying",
    **{(state, "failed"): "down" for state in ("loading", "restarting", "catching_up", "verifying", "ready")},
    **{(state, "refused"): "quarantined" for state in ("catching_up", "verifying", "ready", "quarantined")},
    **{(state, "restart"): "restarting" for state in ("down", "quarantined")},
    **{(state, "give_up"): "gone" for state in ("down", "quarantined")},
    **{(state, "retire"): "draining" for state in (
        "loading", "restarting", "catching_up", "verifying", "ready", "down", "quarantined", "gone")},
}  # fmt: skip
"""(state, event) → next state; what is not here cannot happen. loaded: its engine is up. behind: the fleet has
newer weights. swapped: it took weights that are to be verified before they serve. failed: it died or did
not answer. refused: it did not take weights, or has other log-probabilities than the learner."""


@dataclass(eq=False)
class Member:
    """One worker and what is known of it. `in_flight` counts completions, `tokens_in_flight` their tokens;
    `worked` says whether it had any since the router last asked for its load.

    `incarnation` counts its processes: what is heard of an earlier one says nothing about this one. `kept`: the process
    is sound, only its weights are refused; it is not restarted, the next update is its next chance, unless it leaves.
    `cause` is why it left the ready ones, `last_cause` what went wrong since, `doing` what its start is about.
    `token_at`, of its newest token or of when it became ready, and `load_at` are on the monotonic clock. `changed` is
    set when something happened that its supervisor should look at."""

    worker: Worker
    state: State = "loading"
    cause: str = ""
    last_cause: str = ""
    doing: str = ""
    in_flight: int = 0
    tokens_in_flight: int = 0
    worked: bool = False
    weight_version: int = 0
    load: EngineLoad = field(default_factory=EngineLoad)
    restarts: int = 0
    incarnation: int = 0
    kept: bool = False
    token_at: float = field(default_factory=time.monotonic)
    load_at: float = field(default_factory=time.monotonic)
    node: str = ""
    pid: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def name(self) -> str:
        return self.worker.name

    @property
    def explanation(self) -> str:
        """Why it is not ready, and what it does about that."""
        doing = self.doing if self.state in ("loading", "restarting") else ""
        return "; ".join(part for part in (self.cause, doing) if part)

    @property
    def may_return(self) -> bool:
        """Whether it can be ready again without anybody's help."""
        return self.state not in ("draining", "gone") and not self.kept

    def token_age_s(self) -> float:
        return time.monotonic() - self.token_at

    def observe(self, status: WorkerStatus) -> None:
        """Note what the worker says of itself. More tokens than the one that a probe asks for are a success."""
        if status.load.generated_tokens > self.load.generated_tokens + 1:
            self.restarts = 0
        self.node, self.pid, self.load, self.load_at = status.node, status.pid, status.load, time.monotonic()
        self.token_at = time.monotonic() - status.token_age_s


class Fleet:
    """`on_event` gets one line when a member goes, comes back or is given up; `events` keep them."""

    def __init__(self, workers: list[Worker], settings: ServiceSection):
        self.members = [Member(worker) for worker in workers]
        self.weight_version = 0
        self.on_event: Callable[[str], None] = lambda line: None
        self.events = ServiceEvents()
        self.updating = False
        self.updates = 0
        self.changes = 0
        """Counts whatever may change who is ready."""
        self._settings = settings
        self._previous: int | None = None
        self._change = asyncio.Event()

    # --- who may work ---------------------------------------------------------------------------------------------

    def ready(self) -> list[Member]:
        """Those that may get work."""
        served = (self.weight_version, self._previous)
        return [m for m in self.members if m.state == "ready" and m.weight_version in served]

    async def wait_ready(self) -> None:
        """Until somebody may get work; the caller bounds it. ServiceUnavailable once nobody can come back."""
        while not self.ready():
            if not any(m.may_return for m in self.members):
                raise ServiceUnavailable(f"no rollout worker is ready, and none comes back: {self.describe()}")
            await self._change.wait()

    def named(self, name: str) -> Member:
        for member in self.ready():
            if member.name == name:
                return member
        raise ServiceUnavailable(f"no worker {name!r} is ready: {self.describe()}")

    def charging(
        self, member: Member, completions: int, tokens: int = 0, ended: Callable[[Member], None] = lambda _: None
    ) -> Charge:
        """`member` is charged with them from now on until the end of `with`."""
        return Charge(self, member, completions, tokens, ended)

    def marking(self, member: Member) -> Marking:
        """Around a call of `member`."""
        return Marking(self, member)

    # --- state ----------------------------------------------------------------------------------------------------

    def move(self, member: Member, event: Event) -> None:
        """KeyError when `TRANSITIONS` does not know it."""
        member.state = TRANSITIONS[member.state, event]
        if member.state == "ready":
            member.cause, member.kept, member.token_at = "", False, time.monotonic()
        elif member.state == "restarting":
            member.incarnation, member.restarts = member.incarnation + 1, member.restarts + 1
        elif member.state == "draining":
            member.kept = False
        self._notify(member)

    def fail(self, member: Member, cause: str, event: Event = "failed", kept: bool = False) -> None:
        """For those that move members: it died or did not answer (failed) or did not take weights (refused).
        The first cause stays until it is ready again; of one with a traceback, the line that says what it was."""
        self.move(member, event)
        member.kept = kept
        line = cause.partition("\n")[0]
        member.cause, member.last_cause = member.cause or line, line
        kind: EventKind = "worker_quarantined" if member.state == "quarantined" else "worker_down"
        self.tell(kind, member.name, f"{member.state}: {cause}")

    def mark_down(self, member: Member, cause: str, quarantine: bool = False) -> None:
        """For those that use members. Of one that does not work nothing new is learned this way."""
        if member.state == "ready":
            self.fail(member, cause, "refused" if quarantine else "failed")

    def note(self, name: str, doing: str) -> None:
        """What the start of worker `name` is about, for people."""
        for member in self.members:
            if member.name == name:
                member.doing = doing

    def add(self, worker: Worker) -> Member:
        if worker.name in [m.name for m in self.members]:
            raise ValueError(f"there is a worker {worker.name!r} already")
        self.members.append(member := Member(worker))
        self.events.add("worker_added", worker.name, f"{worker.name}: added")
        self._notify()
        return member

    def drop(self, name: str) -> None:
        """Forget it, whatever its state."""
        self.members = [m for m in self.members if m.name != name]
        self._notify()

    # --- weights --------------------------------------------------------------------------------------------------

    @contextmanager
    def moving_to(self, version: int) -> Iterator[None]:
        """The fleet's weights are `version` from here on. Those with the version before may work until `settled`, or
        until the body ends. A probe that met this does not count: generation pauses."""
        self._previous, self.weight_version = self.weight_version, version
        self.updating, self.updates = True, self.updates + 1
        self._notify()
        try:
            yield
        finally:
            self.updating = False
            self.settled()
            for member in self.members:
                if self.is_behind(member):
                    member.changed.set()

    def settled(self) -> None:
        """Only the newest weights serve."""
        if self._previous is not None:
            self._previous = None
            self._notify()

    def took(self, member: Member, version: int) -> None:
        member.weight_version = version
        self._notify()

    def is_behind(self, member: Member) -> bool:
        """Ready, but nobody is about to give it the fleet's weights."""
        return member.state == "ready" and member.weight_version != self.weight_version and not self.updating

    # --- for people -----------------------------------------------------------------------------------------------

    def tell(self, kind: EventKind, name: str, what: str) -> None:
        """Worker `name` did or suffered `what`."""
        line = f"{name}: {what}"
        self.events.add(kind, name, line)
        self.on_event(line)

    def silent(self) -> list[Member]:
        """Ready for longer than `service.probe_timeout`, and without a token for as long."""
        return [m for m in self.ready() if m.token_age_s() > self._settings.probe_timeout]

    def status(self, m: Member) -> WorkerStatus:
        return WorkerStatus(m.name, m.state, m.weight_version, round(m.token_age_s(), 3), m.in_flight, m.node, m.pid,
                            m.explanation, m.load, load_age_s=round(time.monotonic() - m.load_at, 3))  # fmt: skip

    def describe(self) -> str:
        return "; ".join(
            f"{m.name} is {m.state}{f' ({m.explanation})' if m.explanation else ''}"
            + (f" with weights {m.weight_version}" if m.weight_version != self.weight_version else "")
            for m in self.members
        ) or "there is no worker"  # fmt: skip

    def _notify(self, member: Member | None = None) -> None:
        self.changes += 1
        change, self._change = self._change, asyncio.Event()
        change.set()
        if member is not None:
            member.changed.set()
