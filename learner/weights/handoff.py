"""Memory that a service on this machine opens instead of having the weights sent.

A buffer is an anonymous file in memory. What may still read it holds a shared lock on it: the service, until newer
weights are committed, and a worker, while it loads. A buffer is written again only when nobody holds such a lock, and
no view on it is left in this process.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import uuid
import weakref
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np

from rlx.hosts import is_loopback
from rlx.rollout.manifest import Offer


@dataclass(eq=False)
class _Buffer:
    fd: int
    name: str
    mapped: mmap.mmap
    in_use: bool = field(default=False)


class Buffers:
    """`take` gives memory to fill, `offer` then lets others in. Memory goes back by itself, with the last view on it."""

    def __init__(self) -> None:
        self._buffers: list[_Buffer] = []

    def take(self, nbytes: int) -> tuple[memoryview, Offer]:
        buffer = self._free(nbytes) or self._new(nbytes)
        buffer.in_use = True
        array = np.frombuffer(buffer.mapped, np.uint8)
        weakref.finalize(array, _give_back, buffer)
        return memoryview(array), Offer(os.getpid(), buffer.fd, buffer.name)  # type: ignore[arg-type]

    def open(self, offer: Offer) -> None:
        """From here on others may read it."""
        fcntl.flock(offer.fd, fcntl.LOCK_UN)

    def _free(self, nbytes: int) -> _Buffer | None:
        """One of that size that nobody reads, locked. Those of other sizes go."""
        for buffer in [b for b in self._buffers if not b.in_use]:
            if len(buffer.mapped) != nbytes:
                self._buffers.remove(buffer)
                buffer.mapped.close()
                os.close(buffer.fd)
                continue
            try:
                fcntl.flock(buffer.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            return buffer
        return None

    def _new(self, nbytes: int) -> _Buffer:
        name = f"rlx-weights-{uuid.uuid4().hex}"
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.posix_fallocate(fd, 0, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        fcntl.flock(fd, fcntl.LOCK_EX)
        self._buffers.append(buffer := _Buffer(fd, name, mmap.mmap(fd, nbytes)))
        return buffer


def buffers_for(base_url: str) -> Buffers | None:
    """None where the service is on another machine, or this system has no such memory."""
    near = is_loopback(urlsplit(base_url).hostname) and hasattr(os, "memfd_create")
    return Buffers() if near else None


def _give_back(buffer: _Buffer) -> None:
    buffer.in_use = False
