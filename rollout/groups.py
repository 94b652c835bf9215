"""Groups by key: the running ones and the newest results, so that a resubmitted key never rolls out twice."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import xxhash

from rlx.errors import ServiceError, ServiceUnavailable
from rlx.wire import GroupRequest, GroupResult


class KeyConflict(ServiceError):
    """A key came back with another request."""


@dataclass
class _Entry:
    digest: str
    task: asyncio.Task[GroupResult]
    nbytes: int | None = None
    """Size of the result; None while it runs."""


class GroupStore:
    """Consumes requests, produces results; keeps at most `max_groups` finished groups of `max_bytes` together, the
    least recently asked for go first.

    A group runs in a task of its own: it outlives the caller that submitted it. A failed one is forgotten.
    """

    def __init__(self, max_groups: int, max_bytes: int):
        self._max_groups, self._max_bytes = max_groups, max_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._num_finished, self._nbytes = 0, 0

    async def get(self, request: GroupRequest, run: Callable[[GroupRequest], Awaitable[GroupResult]]) -> GroupResult:
        digest = request_digest(request)
        entry = self._entries.get(request.key)
        if entry is None:
            entry = self._entries[request.key] = self._start(request, digest, run)
        elif entry.digest != digest:
            raise KeyConflict(
                f"the key {request.key!r} was used for another request; give every group a key of its own"
            )
        self._entries.move_to_end(request.key)
        try:
            return await asyncio.shield(entry.task)
        except asyncio.CancelledError:
            if entry.task.cancelled():
                raise ServiceUnavailable(f"group {request.key!r} was stopped: the service is stopping") from None
            raise

    def running(self) -> list[asyncio.Task[GroupResult]]:
        return [entry.task for entry in self._entries.values() if not entry.task.done()]

    def __len__(self) -> int:
        return len(self._entries)

    def _start(
        self, request: GroupRequest, digest: str, run: Callable[[GroupRequest], Awaitable[GroupResult]]
    ) -> _Entry:
        async def body() -> GroupResult:
            return await run(request)

        task = asyncio.create_task(body(), name=f"group {request.key}")
        task.add_done_callback(lambda done: self._finished(request.key, done))
        return _Entry(digest, task)

    def _finished(self, key: str, task: asyncio.Task[GroupResult]) -> None:
        if task.cancelled() or task.exception() is not None:
            del self._entries[key]
            return
        nbytes = self._entries[key].nbytes = _nbytes(task.result())
        self._num_finished += 1
        self._nbytes += nbytes
        if self._num_finished > self._max_groups or self._nbytes > self._max_bytes:
            self._evict()

    def _evict(self) -> None:
        finished = [key for key, entry in self._entries.items() if entry.nbytes is not None]
        for oldest in finished:
            if self._num_finished <= self._max_groups and self._nbytes <= self._max_bytes:
                break
            self._num_finished -= 1
            self._nbytes -= self._entries.pop(oldest).nbytes or 0


def _nbytes(result: GroupResult) -> int:
    rows = [row for episode in result.episodes for row in episode.rows]
    return sum(row.ids.nbytes + row.logprobs.nbytes for row in rows) + sum(len(e.text) for e in result.episodes)


def request_digest(request: GroupRequest) -> str:
    """Of everything that decides the result; the deadline does not."""
    return xxhash.xxh3_128_hexdigest(replace(request, deadline_s=0.0).encode())
