"""Brings workers back: one loop per worker.

    consumes      the member's state
    waits for     a change of it, or half of `service.probe_interval`
    does          ready: ask for its status, and for a token when it was silent
                  ready with old weights: catch up → verify
                  down or quarantined: restart → catch up → verify, at most `service.max_restarts` times in a row;
                  a start that has no devices yet goes on waiting for them, and is none of those times
    produces      members that are ready, or gone with their first cause

Everything a worker is asked has a deadline. `admit` and `retire` are for workers that join and leave.
"""

from __future__ import annotations

import asyncio
import time

import numpy as np

from rlx.config.sections import ServiceSection
from rlx.errors import DeadlineExceeded, RlxError, ServiceUnavailable
from rlx.rollout.deadline import answer_of
from rlx.rollout.fleet import Fleet, Member
from rlx.rollout.weight_updates import WeightUpdates
from rlx.rollout.worker import NoDevices, Worker
from rlx.wire import Sampling

CLOSE_TIMEOUT_S = 20.0
MAX_PAUSE_S = 60.0
LOOK_COST_S = 0.002
"""Looks at many workers are spread so that they take the gateway no more than about this share of a second each."""
_PROBE_PROMPT = np.zeros(1, dtype=np.int32)
_PROBE_SAMPLING = Sampling(max_tokens=1)


class Supervisor:
    def __init__(self, fleet: Fleet, weights: WeightUpdates, settings: ServiceSection, start_timeout_s: float):
        self._fleet, self._weights, self._settings = fleet, weights, settings
        self._start_timeout_s = start_timeout_s
        self._loops: dict[str, asyncio.Task[None]] = {}

    async def bring_up(self, member: Member) -> None:
        """The first start of a worker of the service. Its error is the caller's, who also bounds it."""
        await self._load(member)
        await self._weights.restore(member)

    def start(self) -> None:
        """Look after every member from here on."""
        for member in self._fleet.members:
            self._look_after(member)

    async def close(self) -> None:
        """Look after nobody any more; the workers are the caller's to close."""
        loops, self._loops = list(self._loops.values()), {}
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)

    def admit(self, worker: Worker) -> Member:
        """A new worker: it starts, catches up and is verified in the background, then serves."""
        member = self._fleet.add(worker)
        self._look_after(member)
        return member

    def retire(self, name: str) -> asyncio.Task[None]:
        """It gets no new work from here on. The task gives it `service.drain_timeout` seconds for what it does, closes and
        forgets it."""
        member = next((m for m in self._fleet.members if m.name == name), None)
        if member is None:
            names = ", ".join(m.name for m in self._fleet.members) or "none"
            raise ServiceUnavailable(f"there is no worker {name!r}; the workers are: {names}")
        if loop := self._loops.pop(name, None):
            loop.cancel()
        if member.state != "draining":
            self._fleet.move(member, "retire")
        return asyncio.create_task(self._leave(member, loop), name=f"{name} leaves")

    async def _leave(self, member: Member, loop: asyncio.Task[None] | None) -> None:
        name = member.name
        if loop is not None:
            await asyncio.gather(loop, return_exceptions=True)
        try:
            async with asyncio.timeout(self._settings.drain_timeout):
                while member.in_flight:
                    member.changed.clear()
                    await member.changed.wait()
        except TimeoutError:
            self._fleet.tell("worker_removed", name, f"leaves with {member.in_flight} completions unfinished")
        try:
            await answer_of(name, CLOSE_TIMEOUT_S, member.worker.close(), "did not close")
        finally:
            self._fleet.drop(name)
            self._fleet.tell("worker_removed", name, "left")

    # --- the loop of one worker -----------------------------------------------------------------------------------

    def _look_after(self, member: Member) -> None:
        task = asyncio.create_task(self._mind(member), name=f"supervisor of {member.name}")
        self._loops[member.name] = task
        task.add_done_callback(lambda done: self._ended(member, done))

    def _ended(self, member: Member, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self._fleet.tell(
                "worker_down", member.name, f"nobody looks after it any more: {type(error).__name__}: {error}"
            )

    async def _mind(self, member: Member) -> None:
        while member.state not in ("draining", "gone"):
            member.changed.clear()
            if self._fleet.is_behind(member):
                await self._catch_up(member)
            elif member.state in ("loading", "restarting"):
                await self._bring(member)
            elif member.state in ("down", "quarantined") and not member.kept:
                await self._restart(member)
            elif not await _happens(member.changed, self._pause_s()) and member.state == "ready":
                await self._look(member)

    def _pause_s(self) -> float:
        return max(self._settings.probe_interval / 2, LOOK_COST_S * len(self._fleet.members))

    async def _restart(self, member: Member) -> None:
        done, most = member.restarts, self._settings.max_restarts
        if done >= most:
            if done and member.last_cause != member.cause:
                member.cause += f"; restarted {done} times, the last time: {member.last_cause}"
            self._fleet.move(member, "give_up")
            self._fleet.tell("worker_down", member.name, f"given up after {done} restarts: {member.cause}")
            return
        if done:
            await asyncio.sleep(min(self._settings.probe_interval * 2 ** (done - 1), MAX_PAUSE_S))
        self._fleet.move(member, "restart")
        self._fleet.tell("worker_restarted", member.name, f"restarting, {done + 1} of {most}")
        await self._bring(member)

    async def _bring(self, member: Member) -> None:
        """A process, the weights, the probe. What goes wrong is noted on the member; that there is nothing for it to run
        on is not: it is brought up when there is."""
        try:
            await answer_of(member.name, self._start_timeout_s, self._load(member), "did not start")
        except NoDevices:
            return
        except RlxError as error:
            self._fleet.fail(member, f"it did not start: {error}")
        else:
            await self._restore(member)

    async def _load(self, member: Member) -> None:
        await member.worker.start()
        status = await member.worker.status()
        member.load = status.load
        member.observe(status)
        self._fleet.took(member, status.weight_version)
        self._fleet.move(member, "loaded")

    async def _catch_up(self, member: Member) -> None:
        self._fleet.move(member, "behind")
        await self._restore(member)

    async def _restore(self, member: Member) -> None:
        try:
            found = await self._weights.restore(member)
        except RlxError as error:
            self._fleet.fail(
                member, f"it did not come back to weights {self._fleet.weight_version}: {error}", "refused"
            )
        else:
            far = "" if found is None else f", log p is off by {found:.2g} nats in the mean"
            self._fleet.tell("worker_started", member.name, f"ready with weights {member.weight_version}{far}")

    # --- is it alive? ---------------------------------------------------------------------------------------------

    async def _look(self, member: Member) -> None:
        """A probe that met an update does not count, unless the worker said that it is gone."""
        if self._fleet.updating:
            return
        updates = self._fleet.updates
        try:
            await answer_of(member.name, self._settings.probe_timeout, self._ask(member), "generated no token")
        except RlxError as error:
            if updates == self._fleet.updates or not isinstance(error, DeadlineExceeded):
                self._fleet.mark_down(member, str(error))

    async def _ask(self, member: Member) -> None:
        status = await member.worker.status()
        if status.state != "ready":
            raise ServiceUnavailable(status.cause or f"worker {member.name} is {status.state}")
        member.observe(status)
        if status.token_age_s >= self._settings.probe_interval:
            request_id = f"probe-{member.name}-{time.monotonic_ns()}"
            await member.worker.generate(request_id, _PROBE_PROMPT, 1, _PROBE_SAMPLING)
            member.token_at = time.monotonic()


async def _happens(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
