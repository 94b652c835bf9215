"""Making actors, and calling their methods: a call is cancelled when the caller is, and its failures as errors of rlx."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorAlreadyExistsError, RayActorError, RayError, RayTaskError

from rlx.errors import DeadlineExceeded, ModelError, RlxError, ServiceError, ServiceUnavailable

T = TypeVar("T")
_NAME_TIMEOUT_S = 20.0
_COLOURS = re.compile(r"\x1b\[\d+m")
_CAUSES = {
    "connection error code 2": "its process ended without a word (killed, out of memory, or a crash)",
    "killed by the OOM killer": "it was killed because memory ran out",
    "`ray.kill`": "rlx ended its process, as something that ran in it did not end",
    "exit code": "its process exited",
}


async def create(actor_class: type, name: str, *arguments: Any, **options: Any) -> Any:
    """A new actor called `name`. Ray gives the name of one that just died free a moment later."""
    deadline = time.monotonic() + _NAME_TIMEOUT_S
    while True:
        try:
            return ray.remote(actor_class).options(name=name, max_restarts=0, **options).remote(*arguments)
        except ActorAlreadyExistsError:
            if time.monotonic() > deadline:
                raise ServiceUnavailable(f"the old actor {name} did not go away in {_NAME_TIMEOUT_S:g} s") from None
            await asyncio.sleep(0.05)


async def call(ref: ray.ObjectRef[Any], who: str, timeout_s: float | None = None, hint: str = "") -> Any:
    """The result of an actor's method. Cancelling this coroutine cancels the method in the actor.

    ServiceUnavailable when the actor `who` is dead, with `hint` on where to read more; DeadlineExceeded after
    `timeout_s` seconds, None: the caller bounds it; errors of rlx.errors raised in the actor arrive as themselves, those
    of its engine with `hint`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            with translated(who, hint):
                return await ref
    except DeadlineExceeded:
        raise
    except TimeoutError:
        ray.cancel(ref)
        raise DeadlineExceeded(f"{who} did not answer within {timeout_s:g} s{hint}") from None
    except asyncio.CancelledError:
        ray.cancel(ref)
        raise


async def all_or_first_error(parts: Iterable[Awaitable[T]]) -> list[T]:
    """Results in order; with the first error the others are cancelled, and have ended when it is raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def stream(items: ray.ObjectRefGenerator, who: str, hint: str = "") -> AsyncGenerator[Any, None]:
    """What an actor's streaming method yields. Dropping the iterator cancels the method in the actor."""
    finished = False
    try:
        with translated(who, hint):
            async for ref in items:
                yield await ref
        finished = True
    finally:
        if not finished:
            ray.cancel(items)


@contextmanager
def translated(who: str, hint: str = "") -> Iterator[None]:
    """Ray's errors in the body as errors of rlx about `who`."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, ServiceUnavailable | ModelError):
            raise type(error.cause)(f"{error.cause}{hint}") from None
        if isinstance(error.cause, RlxError):
            raise error.cause from None
        trace = _COLOURS.sub("", str(error))
        raise ServiceError(f"{who} failed: {type(error.cause).__name__}: {error.cause}\n{trace}") from None
    except RayActorError as error:
        raise ServiceUnavailable(f"{who} died: {cause_of(error)}{hint}") from None
    except RayError as error:
        raise ServiceError(f"{who}: {type(error).__name__}: {_short(str(error))}") from None


def cause_of(error: RayActorError) -> str:
    """Ray's long explanation of an actor's death, in a few words."""
    text = str(error)
    detail = text.rpartition("Worker exit detail:")[2] or text.strip().splitlines()[-1]
    return next((words for sign, words in _CAUSES.items() if sign in detail), _short(detail))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:297] + "..."
