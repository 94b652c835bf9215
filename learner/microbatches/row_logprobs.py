"""Log-probabilities of training rows, collected from the micro-batches of all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from rlx.learner.microbatches.batching import Sample
from rlx.learner.ranks import Ranks


class RowLogprobs:
    """Log-probabilities of the trained tokens of `samples`, a list that is the same on every rank. Each rank gives those
    of its own micro-batches to `take`; `of_all` then has them all."""

    def __init__(self, samples: Iterable[Sample]):
        self._samples = list(samples)
        self._starts = np.cumsum([0, *(sample.num_trained for sample in self._samples)])
        self._start_of = {id(s): int(start) for s, start in zip(self._samples, self._starts, strict=False)}
        self._taken: list[tuple[int, Tensor]] = []

    def take(self, micro_batch: list[Sample], logprobs_T: Tensor) -> None:
        """Keep what belongs to `samples` of a micro-batch's log-probabilities, float [T] on any device, as copies there."""
        parts = torch.split(logprobs_T.detach(), [sample.num_trained for sample in micro_batch])
        for sample, values in zip(micro_batch, parts, strict=True):
            if len(values) and (start := self._start_of.get(id(sample))) is not None:
                self._taken.append((start, values.clone()))

    def of_all(self, ranks: Ranks) -> np.ndarray:
        """On every rank: float32, sample after sample. All ranks wait for each other here."""
        values = torch.zeros(int(self._starts[-1]))
        for start, taken in self._taken:
            values[start : start + len(taken)] = taken
        return ranks.sum_(values).numpy()

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """What `of_all` gave, by sample."""
        return [values[start:end] for start, end in pairwise(self._starts)]
