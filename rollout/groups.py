"""Groups by key: the running ones and the newest results, so that a resubmitted key never rolls out twice; and whose
they are: a key belongs to the session that it begins with, `<session>/...`."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

import xxhash

from rlx.errors import GroupCancelled, ServiceError, ServiceUnavailable, SessionReplaced, WireError
from rlx.wire import GroupRequest, GroupResult

KEPT_CANCELLED = 16384
"""Cancelled keys that are remembered."""


class KeyConflict(ServiceError):
    """A key came back with another request."""


class Over(ServiceError):
    """Raised by the work on a group whose result goes to the learner by another way (`service.direct`): nothing is kept
    of the group, and it counts as ok."""


@dataclass
class _Entry:
    digest: str
    task: asyncio.Task[GroupResult]
    nbytes: int | None = None
    """Size of the result; None while it runs."""
    stopped_by: ServiceError | None = None


class GroupStore:
    """Consumes requests, produces results; keeps at most `max_groups` finished groups of `max_bytes` together, the
    least recently asked for go first.

    A group runs in a task of its own: it outlives the caller that submitted it. A failed one is forgotten. A key that
    was cancelled stays so until its session begins anew, as the request may arrive after its cancellation.
    """

    def __init__(self, max_groups: int, max_bytes: int):
        self._max_groups, self._max_bytes = max_groups, max_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._num_finished, self._nbytes = 0, 0
        self._session: str | None = None
        self._replaced: set[str] = set()
        self._cancelled: OrderedDict[str, None] = OrderedDict()
        self.outcomes = Counter({"ok": 0, "failed": 0, "cancelled": 0})
        """Groups by how they ended"""

    async def get(self, request: GroupRequest, run: Callable[[GroupRequest], Awaitable[GroupResult]]) -> GroupResult:
        if self._session is not None and (asked := session_of(request.key)) in self._replaced:
            check_session(asked, self._session, f"group {request.key!r}")
        digest = request_digest(request)
        entry = self._entries.get(request.key)
        if entry is None:
            if request.key in self._cancelled:
                raise _cancelled(request.key)
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
                stopped = ServiceUnavailable(f"group {request.key!r} was stopped: the service is stopping")
                raise entry.stopped_by or stopped from None
            raise

    def begin_session(self, session: str) -> list[str]:
        """A learner takes over: from here on keys of the session before are refused, and its running groups are
        cancelled, and named. Keys that are no learner's (of people, of `rlx rollout test`) are served all the same."""
        replaced, self._session = self._session, session
        self._cancelled.clear()
        self._replaced.discard(session)
        if replaced is None or replaced == session:
            return []
        self._replaced.add(replaced)
        stopped = [k for k, entry in self._entries.items() if not entry.task.done() and session_of(k) == replaced]
        for key in stopped:
            self._stop(key, _session_replaced(f"group {key!r}", replaced, session))
        return stopped

    def cancel(self, keys: Iterable[str]) -> list[str]:
        """Stop the running groups among `keys` and name them; keys that were never seen are refused from here on."""
        stopped = []
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None and entry.task.done():
                continue
            self._cancelled[key] = None
            if entry is not None and self._stop(key, _cancelled(key)):
                stopped.append(key)
        while len(self._cancelled) > KEPT_CANCELLED:
            self._cancelled.popitem(last=False)
        return stopped

    def _stop(self, key: str, cause: ServiceError) -> bool:
        entry = self._entries[key]
        entry.stopped_by = entry.stopped_by or cause
        return entry.task.cancel()

    def running(self) -> list[asyncio.Task[GroupResult]]:
        return [entry.task for entry in self._entries.values() if not entry.task.done()]

    @property
    def num_running(self) -> int:
        return len(self._entries) - self._num_finished

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
        self.outcomes[_outcome(task)] += 1
        if task.cancelled() or task.exception() is not None:
            del self._entries[key]
            return
        nbytes = self._entries[key].nbytes = _nbytes(task.result())
        self._num_finished += 1
        self._nbytes += nbytes
        self._evict()

    def _evict(self) -> None:
        while self._num_finished > self._max_groups or (self._num_finished and self._nbytes > self._max_bytes):
            oldest = next(key for key, entry in self._entries.items() if entry.nbytes is not None)
            self._num_finished -= 1
            self._nbytes -= self._entries.pop(oldest).nbytes or 0


def _outcome(task: asyncio.Task[GroupResult]) -> str:
    if task.cancelled():
        return "cancelled"
    return "ok" if isinstance(task.exception(), Over | None) else "failed"


def _nbytes(result: GroupResult) -> int:
    rows = [row for episode in result.episodes for row in episode.rows]
    return sum(row.ids.nbytes + row.logprobs.nbytes for row in rows) + sum(len(e.text) for e in result.episodes)


def check_request(request: GroupRequest) -> None:
    """What the types of the wire do not say already."""
    ids = request.prompt_ids
    wrong = None
    if not 0 < len(request.key) <= 512:
        wrong = f"key must have 1 to 512 characters, got {len(request.key)}"
    elif ids.ndim != 1 or ids.size == 0 or ids.min() < 0:
        wrong = "prompt_ids must be a list of at least one token id, none negative"
    elif request.num_generations < 1:
        wrong = f"n must be at least 1, got {request.num_generations}"
    elif not isinstance(request.prompt, str | list):
        wrong = f"prompt must be a string or a list of messages, got {type(request.prompt).__name__}"
    elif not isinstance(request.columns, Mapping):
        wrong = f"columns must be an object, got {type(request.columns).__name__}"
    elif not isinstance(request.sampling.max_tokens, int) or request.sampling.max_tokens < 1:
        wrong = f"sampling.max_tokens must be a positive integer, got {request.sampling.max_tokens!r}"
    elif not (math.isfinite(request.deadline_s) and request.deadline_s > 0):
        wrong = f"deadline_s must be a positive number of seconds, got {request.deadline_s}"
    if wrong:
        raise WireError(f"not a group request: {wrong}")


def session_of(key: str) -> str:
    return key.partition("/")[0]


def check_session(session: str, current: str, what: str) -> None:
    """Raise SessionReplaced where `what` is of another session than the current one."""
    if session != current:
        raise _session_replaced(what, session, current)


def _session_replaced(what: str, session: str, current: str) -> SessionReplaced:
    return SessionReplaced(
        f"{what} is of the session {session!r}, but the service belongs to the session {current!r} now: another "
        "learner took it over; stop one of the two, or give each a service of its own (vllm.port)"
    )


def _cancelled(key: str) -> GroupCancelled:
    return GroupCancelled(f"group {key!r} was cancelled by the learner")


def request_digest(request: GroupRequest) -> str:
    """Of everything that decides the result; the deadline does not."""
    decide = [value for name, value in vars(request).items() if name not in ("prompt_ids", "sampling", "deadline_s")]
    said = repr((decide, vars(request.sampling))).encode()
    return xxhash.xxh3_128_hexdigest(said + request.prompt_ids.tobytes())
