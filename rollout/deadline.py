"""A deadline that says who was waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from rlx.errors import DeadlineExceeded, RlxError, ServiceUnavailable

T = TypeVar("T")


@asynccontextmanager
async def deadline(seconds: float, message: Callable[[], str]) -> AsyncIterator[None]:
    """Cancel the body after `seconds` and raise DeadlineExceeded(message()), asked for at that moment."""
    try:
        async with asyncio.timeout(seconds) as scope:
            yield
    except TimeoutError as error:
        if scope.expired() and not isinstance(error, DeadlineExceeded):
            raise DeadlineExceeded(message()) from None
        raise


async def answer_of(worker: str, seconds: float, answer: Awaitable[T], failing: str = "did not answer") -> T:
    """What the worker answers. Its errors are rlx's; DeadlineExceeded "worker … did not answer within …" in time."""
    try:
        async with deadline(seconds, lambda: f"worker {worker} {failing} within {seconds:g} s"):
            return await answer
    except RlxError:
        raise
    except Exception as error:  # what its adapter does not know takes one worker out, not the service
        raise ServiceUnavailable(f"worker {worker}: {type(error).__name__}: {error}") from error
