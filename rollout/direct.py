"""The direct token path (`service.direct`): the gateway hands out workers' addresses, tokens do not pass it.

    learner ── POST /v1/routes: keys and sizes ──► gateway   Leases: the router's choice, charged until the learner
       │    ◄── addresses ────────────────────────           is done with the key or its deadline is over
       └── POST /v1/rollouts ──► worker                      WorkerGroups: engine → rewards → result, once per key

A lease is a group of the gateway whose tokens come elsewhere: it is cancelled, replaced with its session and drained
as one. The HTTP of both is in `direct_app.py`, the learner's side in `direct_client.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from rlx.errors import RlxError
from rlx.rollout.fleet import Member
from rlx.rollout.group_runner import GroupRunner
from rlx.rollout.groups import GroupStore, Over, check_request
from rlx.rollout.http_errors import error_body
from rlx.rollout.service import KEPT_BYTES, KEPT_GROUPS, RolloutService
from rlx.rollout.worker import Worker
from rlx.wire import GroupRequest, GroupResult

_POLL_S = 10.0
"""How long the gateway keeps a learner that waits for a place, before it has to ask again."""


class WorkerGroups:
    """In the worker's process: whole groups of `worker`, each once per key."""

    def __init__(self, worker: Worker, runner: GroupRunner):
        self._worker, self._runner = worker, runner
        self._groups = GroupStore(KEPT_GROUPS, KEPT_BYTES)

    async def rollout(self, request: GroupRequest) -> GroupResult:
        """The scored group of `request`; the same key again gives the same result, or joins the running one."""
        check_request(request)
        return await self._groups.get(request, partial(self._runner.run, self._worker))

    def cancel(self, keys: Iterable[str]) -> None:
        """Stop the running groups among `keys`; who waits for one gets GroupCancelled."""
        self._groups.cancel(keys)


@dataclass
class _Lease:
    key: str
    placed: asyncio.Future[Member]
    over: asyncio.Event
    task: asyncio.Task[None]

    def holds(self, ready: list[Member]) -> bool:
        """Whether it waits for a place, or nobody is done with it and its worker may work: as the process that it was, or
        anew."""
        if not self.placed.done():
            return True
        if self.over.is_set() or self.placed.cancelled() or self.placed.exception():
            return False
        return self.placed.result() in ready


class Leases:
    """In the gateway: who generates which group. `address` of a worker; `stop` ends a group there."""

    def __init__(
        self,
        service: RolloutService,
        address: Callable[[Worker], str],
        stop: Callable[[Worker, str], Awaitable[None]],
    ):
        self._service, self._address, self._stop = service, address, stop
        self._leases: dict[str, _Lease] = {}
        self._stops: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._leases)

    def check_session(self, session: str | None) -> None:
        """As the service's; one that stops still hears which groups are done."""
        if not self._service.is_stopping:
            self._service.check_session(session)

    async def route(self, groups: list[GroupRequest], done: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
        """End the leases of the keys `done`; find workers for `groups`, of which only key, sizes and deadline count.

        `{"routes": [{"key", "url", "worker"}], "errors": [{"key", "error": {"type", "message"}}]}` as soon as there is
        one of either, or nothing after a while; ask again for the others. The same key has the same worker, as long as
        that lives.
        """
        for key in done:
            if lease := self._leases.get(key):
                lease.over.set()
        leases = {group.key: await self._lease(group) for group in groups}
        if leases:
            waits = [lease.placed for lease in leases.values()]
            await asyncio.wait(waits, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED)
        routes, errors = [], []
        for key, lease in leases.items():
            if not lease.placed.done():
                continue
            if error := lease.placed.exception():
                assert isinstance(error, RlxError)
                errors.append({"key": key, **error_body(error)})
            else:
                member = lease.placed.result()
                routes.append({"key": key, "url": self._address(member.worker), "worker": member.name})
        return {"routes": routes, "errors": errors}

    async def _lease(self, group: GroupRequest) -> _Lease:
        lease = self._leases.get(group.key)
        if lease is None:
            return self._begin(group)
        if lease.holds(self._service.fleet.ready()):
            lease.over.clear()  # of one that waits for a place: it is wanted again
            return lease
        lease.over.set()
        await asyncio.wait([lease.task])
        return self._leases.get(group.key) or self._begin(group)

    def _begin(self, group: GroupRequest) -> _Lease:
        placed, over = asyncio.get_running_loop().create_future(), asyncio.Event()
        lease = _Lease(group.key, placed, over, asyncio.create_task(self._hold(group), name=f"lease {group.key}"))
        self._leases[group.key] = lease
        return lease

    async def _hold(self, group: GroupRequest) -> None:
        lease = self._leases[group.key]
        try:
            await self._service.on_worker(group, partial(self._until_over, lease))
        except RlxError as error:
            if not lease.placed.done():
                lease.placed.set_exception(error)
                lease.placed.exception()  # seen, also when nobody asks any more
        finally:
            lease.placed.cancel()
            del self._leases[group.key]

    async def _until_over(self, lease: _Lease, member: Member) -> NoReturn:
        lease.placed.set_result(member)
        try:
            await lease.over.wait()
        except asyncio.CancelledError:
            self._stop_later(member.worker, lease.key)
            raise
        raise Over(f"the lease of {lease.key!r} is over")

    def _stop_later(self, worker: Worker, key: str) -> None:
        async def stop() -> None:
            with contextlib.suppress(RlxError):  # a worker that is gone has stopped
                await self._stop(worker, key)

        task = asyncio.create_task(stop())
        self._stops.add(task)
        task.add_done_callback(self._stops.discard)
