"""The user's synchronous functions, each call in a thread of its own beside the event loop.

A thread cannot be killed. Whoever waits for one may be cancelled; then a `Bridge` raises EpisodeOver in the thread
at the next thing it asks for, and a thread that goes on regardless is named by `stuck_threads`, so that its process
can be replaced. So is a thread that the user's own `asyncio.to_thread` began, as far as `Executor` runs them.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from rlx.errors import UserCodeError

T = TypeVar("T")

GRACE_S = 2.0
"""Seconds that a thread may go on after its episode is over."""

_abandoned: dict[threading.Thread, float] = {}


@dataclass
class Work:
    """What threads work for, called `name`; `over_at` is when it was over, on time.monotonic()."""

    name: str
    over_at: float | None = None

    def end(self) -> None:
        self.over_at = time.monotonic()


working_for: contextvars.ContextVar[Work | None] = contextvars.ContextVar("working_for", default=None)
_at_work: dict[threading.Thread | asyncio.Task[Any], Work] = {}


class Executor(ThreadPoolExecutor):
    """An event loop's threads, each known to `stuck_threads` by the `working_for` of who began its call."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        work = working_for.get()
        return super().submit(fn if work is None else partial(_at, work, fn), *args, **kwargs)


def _at(work: Work, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    thread = threading.current_thread()
    _at_work[thread] = work
    try:
        return function(*args, **kwargs)
    finally:
        del _at_work[thread]


class EpisodeOver(BaseException):
    """Ends a user's function in its thread: nobody waits for it any more. `except Exception` does not catch it."""


def stuck_threads() -> list[str]:
    """Names of the threads, and of coroutines that ignore their end, which still run although what they work for was
    over more than GRACE_S seconds ago."""
    for thread in list(_abandoned):  # at once: the episodes' own thread may add to it meanwhile
        if not thread.is_alive():
            _abandoned.pop(thread, None)
    now = time.monotonic()
    own = [thread.name for thread, since in list(_abandoned.items()) if now - since > GRACE_S]
    works = [work for work in list(_at_work.values()) if work.over_at is not None and now - work.over_at > GRACE_S]
    return [*own, *(work.name for work in works)]


def leave_behind(task: asyncio.Task[Any], work: Work) -> None:
    """`task` goes on although it was cancelled: `stuck_threads` names it until it ends."""
    _at_work[task] = work
    task.add_done_callback(lambda task: _at_work.pop(task, None))


async def in_thread(function: Callable[[], T], name: str) -> T:
    """What `function()` returns or raises, run in a new thread called `name`. UserCodeError where it ends its thread
    by SystemExit or the like. Cancelling this leaves the thread behind, to be named by `stuck_threads`."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
            loop.call_soon_threadsafe(lambda: None if outcome.done() else set_outcome(value))

    def run() -> None:
        try:
            value = context.run(function)
        except Exception as error:  # the user's: it is raised again where the caller awaits
            settle(outcome.set_exception, _awaitable(error, name))
        except BaseException as error:  # SystemExit in a task would end the event loop of all episodes
            settle(outcome.set_exception, _ended(error, name))
        else:
            settle(outcome.set_result, value)

    context = contextvars.copy_context()
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        return await outcome
    except asyncio.CancelledError:
        _abandoned[thread] = time.monotonic()
        raise


def _awaitable(error: Exception, name: str) -> Exception:
    return _ended(error, name) if isinstance(error, StopIteration) else error


def _ended(error: BaseException, name: str) -> UserCodeError:
    ended = UserCodeError(
        f"{name} raised {type(error).__name__}, which ends a program. Raise another error, or return."
    )
    ended.__cause__ = error
    return ended


class Bridge:
    """Runs coroutines of the event loop for one thread beside it. Made in the loop, used in the thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._waiting: set[Future[Any]] = set()
        self._over = False

    def wait(self, coroutine: Coroutine[Any, Any, T], deadline: float) -> T:
        """The result of `coroutine`. EpisodeOver once the episode is closed, or if the loop has not answered by
        `deadline`, on time.monotonic()."""
        with self._lock:
            if self._over:
                coroutine.close()
                raise EpisodeOver
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._waiting.add(future)
        try:
            return future.result(max(deadline - time.monotonic(), 0) + GRACE_S)
        except CancelledError:
            raise EpisodeOver from None
        except TimeoutError:
            if future.done():
                raise
            future.cancel()
            raise EpisodeOver from None
        finally:
            with self._lock:
                self._waiting.discard(future)

    def close(self) -> None:
        """The episode is over: EpisodeOver for the waiting thread, and for all that it asks from now on."""
        with self._lock:
            self._over = True
            waiting = list(self._waiting)
        for future in waiting:
            future.cancel()
