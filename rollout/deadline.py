"""A deadline that says who was waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from rlx.errors import DeadlineExceeded


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
