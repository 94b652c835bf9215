"""How many sessions of one environment this process may have open, where only the server knows how many it allows."""

from __future__ import annotations

import asyncio

RETRY_S = 0.5
"""Seconds that the first in line waits for a session of this process to end before the server is asked once more:
others may have given theirs back, which nobody tells."""


class Leases:
    """Counts open sessions under a limit: `most`, or fewer when the server refused more. For one event loop.

    Consumes: `take` by episodes that want a session, first come first served. Waits for: an end of a session here.
    Unblocked by: `give`, or RETRY_S seconds, after which one episode asks the server beyond the learned limit.
    """

    def __init__(self, most: int | None):
        self.open = 0
        self._most = self._limit = most
        self._freed = asyncio.Event()
        self._first_in_line = asyncio.Lock()

    async def take(self, seconds: float) -> None:
        """Count one more session. TimeoutError after `seconds`."""
        async with asyncio.timeout(seconds), self._first_in_line:
            while not self._below(self._limit):
                self._freed.clear()
                try:
                    async with asyncio.timeout(RETRY_S):
                        await self._freed.wait()
                except TimeoutError:
                    if self._below(self._most):
                        break
            self.open += 1

    def accepted(self) -> None:
        """The server opened the session that was counted."""
        if self._limit is not None:
            self._limit = max(self._limit, self.open)

    def refused(self) -> None:
        """The server had no session for the one that was counted: no more than are open now, until asked again."""
        self.open -= 1
        self._limit = self.open

    def give(self) -> None:
        """A session has ended."""
        self.open -= 1
        self._freed.set()

    def _below(self, limit: int | None) -> bool:
        return limit is None or self.open < limit
