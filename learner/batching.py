"""One optimizer step's samples, cut into micro-batches for every rank, and a micro-batch as tensors.

Shapes: B sequences, S tokens of the longest prompt plus completion, P prompt tokens, L completion tokens,
T trained completion tokens of all B sequences laid end to end, without padding.
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
    """One completion, ready to train on. `token_weight` is what `losses.token_weights` gave for the whole step."""

    prompt_ids: np.ndarray
    """int32 [P], P ≥ 1"""
    completion_ids: np.ndarray
    """int32 [L], the end-of-sequence token included when it was sampled"""
    sampling_logprobs: np.ndarray
    """float32 [L], of the distribution that the tokens were sampled from; NaN where unknown"""
    advantage: float
    token_weight: float
    masked: bool = False
    """Keeps its place in the batch and trains no token (a truncated completion under `mask_truncated_completions`)."""

    @property
    def num_trained(self) -> int:
        return 0 if self.masked else len(self.completion_ids)


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
    by_length = sorted(samples, key=_num_tokens, reverse=True)
    bounds = [len(samples) * i // num_slots for i in range(num_slots + 1)]
    ranks: list[list[list[Sample]]] = [[] for _ in range(world_size)]
    padded_tokens = [0] * world_size
    for start, stop in pairwise(bounds):
        part = by_length[start:stop]
        rank = min((r for r in range(world_size) if len(ranks[r]) < micro_batches), key=lambda r: padded_tokens[r])
        ranks[rank].append(part)
        padded_tokens[rank] += len(part) * _num_tokens(part[0])
    return ranks


def _num_tokens(sample: Sample) -> int:
    return len(sample.prompt_ids) + sample.num_trained


def collate(samples: Sequence[Sample]) -> MicroBatch:
    """Tensors of one micro-batch. Which tokens are trained comes from lengths alone, never from ids, so that an
    end-of-sequence token is trained also where the tokenizer pads with it."""
    if any(len(s.prompt_ids) == 0 for s in samples):
        raise ValueError("a sample has an empty prompt: nothing predicts its first completion token")
    trained = [s.num_trained for s in samples]
    prompt_lengths = [len(s.prompt_ids) for s in samples]
    width = max(p + n for p, n in zip(prompt_lengths, trained, strict=True))
    ids_BS = np.full((len(samples), width), _FILLER_ID, dtype=np.int64)
    for row, (sample, p, n) in enumerate(zip(samples, prompt_lengths, trained, strict=True)):
        ids_BS[row, :p] = sample.prompt_ids
        ids_BS[row, p : p + n] = sample.completion_ids[:n]

    lengths_B = np.array(trained, dtype=np.int64)
    row_T = np.repeat(np.arange(len(samples)), lengths_B)
    starts_B = np.cumsum(lengths_B) - lengths_B
    col_T = np.arange(len(row_T)) - starts_B[row_T] + np.array(prompt_lengths)[row_T] - 1
    logprobs = [s.sampling_logprobs[:n] for s, n in zip(samples, trained, strict=True)]
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
