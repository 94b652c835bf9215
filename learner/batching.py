"""One optimizer step's samples, cut into micro-batches for every rank, and a micro-batch as tensors.

Shapes: B sequences, S tokens of the longest prompt plus completion, P prompt tokens, L completion tokens,
T trained completion tokens of all B sequences laid end to end, without padding. A sequence is a training row: an
episode has one, or several where its context was rewritten.
Not here: the forward (`logprobs.py`), the loss and its weights (`losses.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

_FILLER_ID = 0
"""Stands right of each sequence in `input_ids_BS`; no trained position can see it, so any id of the vocabulary does."""


@dataclass(frozen=True)
class Sample:
    """One training row. `token_weight` is what `losses.token_weights` gave its episode for the whole step."""

    prompt_ids: np.ndarray
    """int32 [P], P ≥ 1"""
    completion_ids: np.ndarray
    """int32 [L], the end-of-sequence token included when it was sampled, and what an environment said in between"""
    sampling_logprobs: np.ndarray
    """float32 [L], of the distribution that the tokens were sampled from; NaN where unknown"""
    advantage: float
    token_weight: float
    masked: bool = False
    """Keeps its place in the batch and trains no token (a truncated completion under `mask_truncated_completions`)."""
    sampled: np.ndarray | None = None
    """bool [L], the tokens that the policy sampled, which alone are trained; None means all"""

    @property
    def trained(self) -> np.ndarray:
        """Places in `completion_ids` of the trained tokens, ascending."""
        if self.masked:
            return np.arange(0)
        return np.arange(len(self.completion_ids)) if self.sampled is None else np.flatnonzero(self.sampled)

    @property
    def num_trained(self) -> int:
        return int(self.trained.size)

    @property
    def num_forwarded(self) -> int:
        """Tokens that the forward needs: nothing behind the last trained one."""
        trained = self.trained
        return len(self.prompt_ids) + (int(trained[-1]) + 1 if trained.size else 0)


@dataclass(frozen=True)
class MicroBatch:
    """Sequences padded on the right, and flat tensors over their T trained tokens, sequence after sequence."""

    input_ids_BS: Tensor
    """int64; a masked sample stands here with its prompt only"""
    lengths_B: Tensor
    """int64, trained tokens of each sequence; they sum to T"""
    row_T: Tensor
    """int64, the row of `input_ids_BS` that a token belongs to"""
    col_T: Tensor
    """int64, the column whose logits predict it (one left of its own)"""
    target_ids_T: Tensor
    """int64"""
    sampling_logprobs_T: Tensor
    """float32"""
    advantages_T: Tensor
    """float32"""
    weights_T: Tensor
    """float32"""
    first_col: int
    """The least `col_T`: logits are needed from this column on"""

    def to(self, device: torch.device | str) -> MicroBatch:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}
        return MicroBatch(**moved)


def split(samples: Sequence[Sample], world_size: int, micro_batches: int) -> list[list[list[Sample]]]:
    """`result[rank][i]`: micro-batch i of a rank. Every sample lands in exactly one; all have the same number of
    samples, or differ by one where B does not divide.

    Neighbours in length share a micro-batch, so that padding is small. The longest micro-batches go first, each to the
    rank that has the fewest padded tokens so far, so that the ranks end together and a too long batch shows at once.
    """
    num_slots = world_size * micro_batches
    if len(samples) < num_slots:
        raise ValueError(
            f"{len(samples)} samples cannot fill {micro_batches} micro-batches on {world_size} processes: "
            f"lower gradient_accumulation_steps or generate at least {num_slots} completions per step"
        )
    by_length = sorted(samples, key=lambda s: s.num_forwarded, reverse=True)
    bounds = [len(samples) * i // num_slots for i in range(num_slots + 1)]
    ranks: list[list[list[Sample]]] = [[] for _ in range(world_size)]
    padded_tokens = [0] * world_size
    for start, stop in pairwise(bounds):
        part = by_length[start:stop]
        rank = min((r for r in range(world_size) if len(ranks[r]) < micro_batches), key=lambda r: padded_tokens[r])
        ranks[rank].append(part)
        padded_tokens[rank] += len(part) * part[0].num_forwarded
    return ranks


def collate(samples: Sequence[Sample]) -> MicroBatch:
    """Tensors of one micro-batch. Which tokens are trained comes from places alone, never from ids, so that an
    end-of-sequence token is trained also where the tokenizer pads with it."""
    if any(len(s.prompt_ids) == 0 for s in samples):
        raise ValueError("a sample has an empty prompt: nothing predicts its first completion token")
    places = [s.trained for s in samples]
    lengths_B = np.array([p.size for p in places], dtype=np.int64)
    width = max(s.num_forwarded for s in samples)
    ids_BS = np.full((len(samples), width), _FILLER_ID, dtype=np.int64)
    for row, sample in enumerate(samples):
        start = len(sample.prompt_ids)
        ids_BS[row, :start] = sample.prompt_ids
        ids_BS[row, start : sample.num_forwarded] = sample.completion_ids[: sample.num_forwarded - start]

    row_T = np.repeat(np.arange(len(samples)), lengths_B)
    cols = [len(s.prompt_ids) + p - 1 for s, p in zip(samples, places, strict=True)]
    col_T = np.concatenate(cols).astype(np.int64)
    logprobs = [s.sampling_logprobs[p] for s, p in zip(samples, places, strict=True)]
    return MicroBatch(
        input_ids_BS=torch.from_numpy(ids_BS),
        lengths_B=torch.from_numpy(lengths_B),
        row_T=torch.from_numpy(row_T),
        col_T=torch.from_numpy(col_T),
        target_ids_T=torch.from_numpy(ids_BS[row_T, col_T + 1]),
        sampling_logprobs_T=torch.from_numpy(np.concatenate(logprobs).astype(np.float32)),
        advantages_T=torch.tensor([s.advantage for s in samples], dtype=torch.float32)[row_T],
        weights_T=torch.tensor([s.token_weight for s in samples], dtype=torch.float32)[row_T],
        first_col=int(col_T.min()) if len(col_T) else width - 1,
    )
