"""The workers as the service sees them: who is ready, who is busy, and a probe that asks the silent ones for a token.

    start ──► ready ◄──► down        a probe that fails, or a worker that says it died; a later probe may bring it back
                └──► quarantined     it did not take weights that it had said it could take; gets no more work

A worker gets work only when it is ready and holds the fleet's weight version; the next update catches up the others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from rlx.config.sections import ServiceSection
from rlx.errors import DeadlineExceeded, RlxError, ServiceUnavailable
from rlx.rollout.deadline import deadline
from rlx.rollout.worker import Worker, WorkerStatus
from rlx.wire import Sampling

_PROBE_PROMPT = np.zeros(1, dtype=np.int32)
_PROBE_SAMPLING = Sampling(max_tokens=1)


@dataclass
class Member:
    """One worker and what is known of it. `in_flight` counts completions; `token_at` is on the monotonic clock."""

    worker: Worker
    state: str = "loading"
    cause: str = ""
    in_flight: int = 0
    weight_version: int = 0
    token_at: float = field(default_factory=time.monotonic)
    node: str = ""
    pid: int = 0

    @property
    def name(self) -> str:
        return self.worker.name

    def observe(self, status: WorkerStatus) -> None:
        self.node, self.pid = status.node, status.pid
        self.token_at = time.monotonic() - status.token_age_s

    def token_age_s(self) -> float:
        return time.monotonic() - self.token_at


class Fleet:
    def __init__(self, workers: list[Worker], settings: ServiceSection):
        self.members = [Member(worker) for worker in workers]
        self.weight_version = 0
        self._settings = settings
        self._updating = False
        self._updates = 0

    async def start_member(self, member: Member) -> None:
        await member.worker.start()
        status = await member.worker.status()
        member.observe(status)
        member.weight_version = status.weight_version
        self.weight_version = max(self.weight_version, status.weight_version)
        member.state = "ready"

    def ready(self) -> list[Member]:
        """Those that may get work."""
        return [m for m in self.members if m.state == "ready" and m.weight_version == self.weight_version]

    def named(self, name: str) -> Member:
        for member in self.ready():
            if member.name == name:
                return member
        raise ServiceUnavailable(f"no worker {name!r} is ready: {self.describe()}")

    @contextmanager
    def assign(self, completions: int) -> Iterator[Member]:
        """The ready worker with the least in flight, charged with `completions` while the body runs."""
        ready = self.ready()
        if not ready:
            raise ServiceUnavailable(f"no rollout worker is ready: {self.describe()}")
        member = min(ready, key=lambda m: m.in_flight)
        member.in_flight += completions
        try:
            with self.marking(member):
                yield member
        finally:
            member.in_flight -= completions

    @contextmanager
    def marking(self, member: Member) -> Iterator[None]:
        """A worker that says it is gone is down from then on."""
        try:
            yield
        except ServiceUnavailable as error:
            self.mark_down(member, str(error))
            raise

    def mark_down(self, member: Member, cause: str, quarantine: bool = False) -> None:
        if member.state != "quarantined":
            member.state, member.cause = "quarantined" if quarantine else "down", cause

    @contextmanager
    def updating(self) -> Iterator[None]:
        """While the body swaps weights, generation pauses; a probe that met this does not count."""
        self._updating, self._updates = True, self._updates + 1
        try:
            yield
        finally:
            self._updating = False

    def silent(self) -> list[Member]:
        """Ready, but without a token for longer than `service.probe_timeout`."""
        return [m for m in self.ready() if m.token_age_s() > self._settings.probe_timeout]

    def statuses(self) -> list[WorkerStatus]:
        return [
            WorkerStatus(m.name, "down" if m.state == "quarantined" else m.state, m.weight_version,
                         round(m.token_age_s(), 3), m.in_flight, m.node, m.pid, m.cause)
            for m in self.members
        ]  # fmt: skip

    def describe(self) -> str:
        return "; ".join(
            f"{m.name} is {m.state}{f' ({m.cause})' if m.cause else ''}"
            + (f" with weights {m.weight_version}" if m.weight_version != self.weight_version else "")
            for m in self.members
        )

    async def probe(self, member: Member) -> None:
        """Consumes the worker's status and, when it was silent, a token of it. Runs until it is cancelled; waits
        `service.probe_interval` between two looks, and `service.probe_timeout` at most for an answer."""
        interval = self._settings.probe_interval
        while member.state != "quarantined":
            await asyncio.sleep(interval / 2 if member.state == "ready" else interval)
            if self._updating:
                continue
            updates = self._updates
            try:
                await self._look(member)
            except RlxError as error:
                if updates == self._updates or not isinstance(error, DeadlineExceeded):
                    self.mark_down(member, str(error))
            else:
                if member.state == "down":
                    member.state, member.cause = "ready", ""

    async def _look(self, member: Member) -> None:
        timeout = self._settings.probe_timeout
        async with deadline(timeout, lambda: f"worker {member.name} generated no token within {timeout:g} s"):
            status = await member.worker.status()
            if status.state != "ready":
                raise ServiceUnavailable(status.cause or f"worker {member.name} is {status.state}")
            member.observe(status)
            if status.token_age_s >= self._settings.probe_interval or member.state != "ready":
                await member.worker.generate(
                    f"probe-{member.name}-{time.monotonic_ns()}", _PROBE_PROMPT, 1, _PROBE_SAMPLING
                )
                member.token_at = time.monotonic()
            if member.state != "ready":
                member.weight_version = (await member.worker.status()).weight_version
