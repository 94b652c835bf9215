"""What the service says while it loads and runs: plain lines, or one live line in a terminal."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from rich.console import Console

Say = Callable[[str], None]
WARNING = "warning: "
EVENT = "worker "
"""Both begin lines of the service that `rlx run` shows also while it trains: one more, one fewer worker."""
_LOOK_INTERVAL_S = 0.5
_REPEAT_INTERVAL_S = 15.0
_SILENT = ("waiting", "closed")


class Loading(Protocol):
    """A part with something to wait for."""

    name: str
    phase: str

    @property
    def seconds_in_phase(self) -> float: ...


def say(line: str) -> None:
    """Print one line now, also into a pipe; at once, as other processes print to the same terminal."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@asynccontextmanager
async def shown(parts: Sequence[Loading], say: Say) -> AsyncIterator[None]:
    """While the body runs, show the phases of `parts`, and how long they last."""
    watching = asyncio.create_task(_live(parts) if sys.stdout.isatty() else _lines(parts, say))
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _live(parts: Sequence[Loading]) -> None:
    with Console().status("") as status:
        while True:
            status.update("   ".join(f"{p.name}: {p.phase} ({p.seconds_in_phase:.0f} s)" for p in parts))
            await asyncio.sleep(_LOOK_INTERVAL_S)


async def _lines(parts: Sequence[Loading], say: Say) -> None:
    said: dict[str, tuple[str, float]] = {}
    while True:
        for part in parts:
            phase, since = said.get(part.name, ("", 0.0))
            if phase == part.phase and (phase == "ready" or time.monotonic() - since < _REPEAT_INTERVAL_S):
                continue
            elapsed = f" ({part.seconds_in_phase:.0f} s)" if phase == part.phase else ""
            if part.phase not in _SILENT:
                say(f"{part.name}: {part.phase}{elapsed}")
            said[part.name] = (part.phase, time.monotonic())
        await asyncio.sleep(_LOOK_INTERVAL_S)
