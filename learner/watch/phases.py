"""What every rank does in a step, as spans: forward and backward, optimizer, checkpoint."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback

from rlx.learner.ranks import Ranks
from rlx.learner.watch.group_spans import span
from rlx.learner.watch.journal import Journal, unix


class PhaseSpans(TrainerCallback):
    """On every rank; the others bring theirs to rank 0 at each step's end, a few numbers."""

    def __init__(self, journal: Journal, ranks: Ranks):
        self._journal, self._ranks = journal, ranks
        self._marks = [0.0, 0.0, 0.0, 0.0]
        """On time.monotonic(): forward began, it and backward ended, the optimizer ended, the library was here last"""

    def begin(self) -> None:
        """The groups of a step are here."""
        self._marks[0] = time.monotonic()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._marks[1] = time.monotonic()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._marks[2] = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Of this and the other ranks, which run on the same machine and so by the same clock."""
        mine = torch.zeros(self._ranks.size, 3, dtype=torch.float64)
        mine[self._ranks.rank] = torch.tensor([unix(mark) for mark in self._marks[:3]], dtype=torch.float64)
        for rank, (began, trained, ended) in enumerate(self._ranks.sum_(mine).tolist()):
            process = f"learner rank {rank}"
            self._journal.add(span(state.global_step, "forward and backward", process, "training", began, trained, {}))
            self._journal.add(span(state.global_step, "optimizer", process, "training", trained, ended, {}))
        self._marks[3] = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._marks[3] = time.monotonic()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._ranks.rank == 0:
            self._journal.saved(state.global_step, self._marks[3], time.monotonic())
