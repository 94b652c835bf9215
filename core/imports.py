"""What makes imports of libraries that take seconds quicker.

Importing vLLM or TRL makes a million objects, nearly all of which stay. Python's search for cycles goes through them
again and again: up to a third of the processor's time of such an import.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_USUALLY, _SELDOM = gc.get_threshold(), (100_000, 50, 100)


@contextmanager
def loading() -> Iterator[None]:
    """Around such imports: nothing is searched for cycles meanwhile."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def begin_loading() -> None:
    """For a process whose imports are another program's, from here to `loaded`: cycles are searched for seldom."""
    gc.set_threshold(*_SELDOM)


def loaded() -> None:
    """For a process of its own: what has been imported by now is never searched again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_USUALLY)
