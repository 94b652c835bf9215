"""A deadline that says who was waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from rlx.errors import DeadlineExceeded, RlxError, ServiceUnavailable

T = TypeVar("T")


class deadline:
    """`async with`: cancel the body after `seconds` and raise DeadlineExceeded(message()), asked for at that moment.

    A class, as a generator would double the cost of a call to a worker."""

    __slots__ = ("_message", "_scope")

    def __init__(self, seconds: float, message: Callable[[], str]):
        self._scope, self._message = asyncio.timeout(seconds), message

    async def __aenter__(self) -> None:
        await self._scope.__aenter__()

    async def __aexit__(self, *raised: Any) -> None:
        try:
            await self._scope.__aexit__(*raised)
        except TimeoutError:
            raise DeadlineExceeded(self._message()) from None


async def answer_of(worker: str, seconds: float, answer: Awaitable[T], failing: str = "did not answer") -> T:
    """What the worker answers. Its errors are rlx's; DeadlineExceeded "worker … did not answer within …" in time."""
    try:
        async with deadline(seconds, lambda: f"worker {worker} {failing} within {seconds:g} s"):
            return await answer
    except RlxError:
        raise
    except Exception as error:  # what its adapter does not know takes one worker out, not the service
        raise ServiceUnavailable(f"worker {worker}: {type(error).__name__}: {error}") from error
