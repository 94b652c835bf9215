"""Training rows as the tensors of a micro-batch, padded or packed.

Shapes: B sequences, S tokens of the longest prompt plus completion, P prompt tokens, L completion tokens,
T trained completion tokens of all B sequences laid end to end, without padding. A sequence is a training row: an
episode has one, or several where its context was rewritten.
Not here: which samples share a micro-batch (`splitting.py`), the forward (`logprobs.py`), attention within a packed
row (`packing.py`), the loss and its weights (`objective/losses.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlx.learner.microbatches.packing import Segments, Span

_FILLER_ID = 0
"""Stands right of each sequence in `input_ids_BS`; no trained position can see it, so any id of the vocabulary does."""


@dataclass(frozen=True)
class Layout:
    """How the sequences of a micro-batch are laid out. The default works with every model."""

    packed: bool = False
    """One row without padding, instead of one row each, padded to the longest"""
    share_prompts: bool = False
    """In a packed row, forward a prompt that several samples have once, where `worth_sharing`"""
    pair_cost: float = 0.0
    """What attention costs for one query and one key, in units of all that one token costs otherwise"""
    flash: str | None = None
    """The flash attention for packed rows; see `packing.Segments`"""


PADDED = Layout()


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
    old_logprobs: np.ndarray | None = None
    """float32, of the trained tokens, under the policy before the first step on this sample; None: the present one"""

    @cached_property
    def trained(self) -> np.ndarray:
        """Places in `completion_ids` of the trained tokens, ascending."""
        if self.masked:
            return np.arange(0)
        return np.arange(len(self.completion_ids)) if self.sampled is None else np.flatnonzero(self.sampled)

    @property
    def num_trained(self) -> int:
        return int(self.trained.size)

    @cached_property
    def num_forwarded(self) -> int:
        """Tokens that the forward needs: nothing behind the last trained one."""
        trained = self.trained
        return len(self.prompt_ids) + (int(trained[-1]) + 1 if trained.size else 0)

    @cached_property
    def prompt_key(self) -> bytes:
        """The same for samples with the same prompt."""
        return self.prompt_ids.tobytes()


@dataclass(frozen=True)
class MicroBatch:
    """Sequences padded on the right or packed into one row, and flat tensors over their T trained tokens, sequence
    after sequence."""

    input_ids_BS: Tensor
    """int64; a masked sample stands here with its prompt only. Packed: one row"""
    lengths_B: Tensor
    """int64, trained tokens of each sequence; they sum to T"""
    row_T: Tensor
    """int64, the row of `input_ids_BS` that a token belongs to"""
    col_T: Tensor
    """int64, the column whose logits predict it (one left of its own, or the last of a shared prompt)"""
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
    segments: Segments | None = None
    """What sees what in a packed row; None where the rows are padded"""
    old_logprobs_T: Tensor | None = None
    """float32, of the policy before the first step on these tokens; None: of the present one"""

    def to(self, device: torch.device | str) -> MicroBatch:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor | Segments) else v for k, v in values.items()}
        return MicroBatch(**moved)


_WORTH_SHARING = 0.1
"""Share of a group's tokens that sharing its prompt must save: completions then attend through a mask, which costs."""


def worth_sharing(prompt_tokens: int, forwarded: Sequence[int]) -> bool:
    """Whether samples with the same prompt, of so many forwarded tokens each, are cheaper with the prompt once."""
    return (len(forwarded) - 1) * prompt_tokens >= _WORTH_SHARING * sum(forwarded)


def by_prompt(samples: Iterable[Sample]) -> list[list[Sample]]:
    """The samples of each prompt, in the order in which the prompts first appear."""
    groups: dict[bytes, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt_key, []).append(sample)
    return list(groups.values())


def groups_in_row(samples: Sequence[Sample], layout: Layout) -> list[tuple[list[Sample], bool]]:
    """What stands in a packed row, group after group: the samples of a group, and whether they share their prompt, which
    then stands there once. Samples that train nothing are left out, except one where none does."""
    needed = [s for s in samples if s.num_trained] or list(samples[:1])
    if not layout.share_prompts:
        return [([s], False) for s in needed]
    return [(g, worth_sharing(len(g[0].prompt_ids), [s.num_forwarded for s in g])) for g in by_prompt(needed)]


def collate(samples: Sequence[Sample], layout: Layout = PADDED) -> MicroBatch:
    """Tensors of one micro-batch. Which tokens are trained comes from places alone, never from ids, so that an
    end-of-sequence token is trained also where the tokenizer pads with it."""
    if any(len(s.prompt_ids) == 0 for s in samples):
        raise ValueError("a sample has an empty prompt: nothing predicts its first completion token")
    lengths_B = np.array([s.num_trained for s in samples], dtype=np.int64)
    if layout.packed:
        ids_BS, cols, segments = _pack(samples, layout)
        row_T = np.zeros(lengths_B.sum(), dtype=np.int64)
    else:
        ids_BS, segments = _pad(samples), None
        row_T = np.repeat(np.arange(len(samples)), lengths_B)
        cols = [len(s.prompt_ids) + s.trained - 1 for s in samples]
    col_T = np.concatenate(cols).astype(np.int64)
    logprobs = [s.sampling_logprobs[s.trained] for s in samples]
    old = [s.old_logprobs for s in samples if s.old_logprobs is not None]
    return MicroBatch(
        input_ids_BS=torch.from_numpy(ids_BS),
        lengths_B=torch.from_numpy(lengths_B),
        row_T=torch.from_numpy(row_T),
        col_T=torch.from_numpy(col_T),
        target_ids_T=torch.from_numpy(np.concatenate([s.completion_ids[s.trained] for s in samples]).astype(np.int64)),
        sampling_logprobs_T=torch.from_numpy(np.concatenate(logprobs).astype(np.float32)),
        advantages_T=torch.from_numpy(np.repeat(np.array([s.advantage for s in samples], np.float32), lengths_B)),
        weights_T=torch.from_numpy(np.repeat(np.array([s.token_weight for s in samples], np.float32), lengths_B)),
        first_col=int(col_T.min()) if len(col_T) else ids_BS.shape[1] - 1,
        segments=segments,
        old_logprobs_T=torch.from_numpy(np.concatenate(old)) if old else None,
    )


def _pad(samples: Sequence[Sample]) -> np.ndarray:
    ids_BS = np.full((len(samples), max(s.num_forwarded for s in samples)), _FILLER_ID, dtype=np.int64)
    for row, sample in enumerate(samples):
        start = len(sample.prompt_ids)
        ids_BS[row, :start] = sample.prompt_ids
        ids_BS[row, start : sample.num_forwarded] = sample.completion_ids[: sample.num_forwarded - start]
    return ids_BS


def _pack(samples: Sequence[Sample], layout: Layout) -> tuple[np.ndarray, list[np.ndarray], Segments]:
    """The row [1, N], for each sample the columns that predict its trained tokens, and the row's segments."""
    pieces: list[np.ndarray] = []
    spans: list[Span] = []
    cols = {id(sample): np.empty(0, np.int64) for sample in samples}
    end = 0

    def add(*ids: np.ndarray, prefix: Span | None = None) -> Span:
        nonlocal end
        start, end = end, end + sum(len(i) for i in ids)
        pieces.extend(ids)
        spans.append(Span(start, end) if prefix is None else Span(start, end, prefix.start, prefix.stop))
        return spans[-1]

    for group, shared in groups_in_row(samples, layout):
        prompt_ids = group[0].prompt_ids
        prompt = add(prompt_ids) if shared else None
        for sample in group:
            ids = sample.completion_ids[: sample.num_forwarded - len(prompt_ids)]
            if prompt is None:
                cols[id(sample)] = add(prompt_ids, ids).start + len(prompt_ids) + sample.trained - 1
            else:
                start = add(ids, prefix=prompt).start
                cols[id(sample)] = np.where(sample.trained > 0, start + sample.trained - 1, prompt.stop - 1)
    segments = Segments(tuple(spans), torch.device("cpu"), layout.flash)
    return np.concatenate(pieces).astype(np.int64)[None], [cols[id(s)] for s in samples], segments
