"""The learner's processes among themselves: bytes from rank 0 to all, over gloo. Nothing is pickled."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist

SNAPSHOT, WHOLE_STATE = 0, 1
"""Jobs that rank 0 calls the others to"""
_FIRST_JOB = -2
"""Sent in place of the number of frames: `_FIRST_JOB - n` calls the others to job n"""


class StoppedByRankZero(Exception):
    """Rank 0 failed and says why; this rank has nothing to add."""


class Ranks:
    """Where this process stands. `timeout_s` bounds every wait for rank 0. `jobs` are what rank 0 may `call` the others
    to while they wait for its frames."""

    def __init__(self, timeout_s: float):
        self.jobs: Sequence[Callable[[], object]] = ()
        self._group: dist.ProcessGroup | None = None
        self.rank, self.size = 0, 1
        if dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))

    def from_first(self, make: Callable[[], list[bytes]]) -> list[bytes]:
        """The frames that `make` gives on rank 0, on every rank. When it raises there, the others leave."""
        if self.rank != 0:
            return self.broadcast([])
        try:
            frames = make()
        except Exception:  # whatever it is goes on up; the others must not wait for it
            with contextlib.suppress(RuntimeError):  # one of them is gone, too: what is told is what ended this rank
                self.broadcast(None)
            raise
        return self.broadcast(frames)

    def call(self, job: int) -> None:
        """On rank 0, which owes the others frames: they run `jobs[job]` now, and this rank does its own part in it."""
        if self.size > 1:
            dist.broadcast(torch.tensor([_FIRST_JOB - job]), src=0, group=self._group)

    def broadcast(self, frames: list[bytes] | None) -> list[bytes]:
        """Rank 0's frames on every rank. None on rank 0 raises StoppedByRankZero on the others."""
        if self.size == 1:
            return frames or []
        count = torch.tensor([-1 if frames is None else len(frames)])
        dist.broadcast(count, src=0, group=self._group)
        while count.item() <= _FIRST_JOB and self.rank != 0:
            self.jobs[_FIRST_JOB - int(count)]()
            dist.broadcast(count, src=0, group=self._group)
        if count.item() < 0:
            if self.rank == 0:
                return []
            raise StoppedByRankZero("rank 0 stopped the run")
        sizes = torch.tensor([len(f) for f in frames or []] if self.rank == 0 else [0] * int(count))
        dist.broadcast(sizes, src=0, group=self._group)
        ends = np.cumsum(sizes.numpy()).tolist()
        data = torch.zeros(ends[-1] if ends else 0, dtype=torch.uint8)
        if self.rank == 0:
            data.numpy()[:] = np.frombuffer(b"".join(frames or []), dtype=np.uint8)
        dist.broadcast(data, src=0, group=self._group)
        whole = data.numpy().data
        return [bytes(whole[start:end]) for start, end in pairwise([0, *ends])]

    def wait_for_all(self) -> None:
        """Returns when every rank is here."""
        self.sum_(torch.zeros(1))

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        """Add `values` (CPU, any shape) over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self._group)
        return values

    def max_(self, values: torch.Tensor) -> torch.Tensor:
        """The largest over all ranks, element by element, in place."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group)
        return values
