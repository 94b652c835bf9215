"""Rows without padding: what attends to what in them, the attention that keeps to it, and whether a model can.

    padded   [prompt completion . . ]      packed   [prompt completion | prompt completion | ...]
             [prompt completion . . ]      shared   [prompt | completion | completion | prompt | ...]

A packed row is cut into segments. A token sees the tokens before it in its own segment and, where the segment names a
prefix, all tokens of that earlier segment: the prompt that several completions share, which is forwarded once.

Shapes: N tokens of the row, K key rows of all segments laid end to end, H heads.
Not here: which samples share a row (`splitting.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_flash_attention_utils import _flash_attention_forward

ATTENTION = "rlx_segments"
"""The name of our attention among those of transformers"""

_in_segments: ContextVar[bool] = ContextVar("in_segments", default=False)


@dataclass(frozen=True)
class Span:
    """A segment: places [start, stop) of the row, and the segment before it that it sees, [0, 0) for none."""

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0

    @property
    def depth(self) -> int:
        """Position of its first token."""
        return self.prefix_stop - self.prefix_start

    @property
    def context(self) -> int:
        """Keys that its last token sees."""
        return self.depth + self.stop - self.start


@dataclass(frozen=True)
class Segments:
    """The segments of one row, side by side from its first token to its last; a prefix is a whole segment."""

    spans: tuple[Span, ...]
    device: torch.device
    flash: str | None = None
    """The flash attention of transformers that runs them; None: scaled dot products, segment by segment"""

    def to(self, device: torch.device | str) -> Segments:
        return Segments(self.spans, torch.device(device), self.flash)

    @cached_property
    def position_ids(self) -> Tensor:
        """int64 [1, N]"""
        parts = [torch.arange(s.depth, s.context) for s in self.spans]
        return torch.cat(parts)[None].to(self.device)

    @cached_property
    def key_index(self) -> Tensor:
        """int64 [K]: places of the keys of all segments, prefix first."""
        parts = [
            torch.arange(*ends) for s in self.spans for ends in ((s.prefix_start, s.prefix_stop), (s.start, s.stop))
        ]
        return torch.cat(parts).to(self.device)

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """Cumulative lengths int32 [segments + 1] of queries and of keys, and the longest of each."""
        queries, keys = [s.stop - s.start for s in self.spans], [s.context for s in self.spans]
        sums = [torch.tensor([0, *n]).cumsum(0).to(self.device, torch.int32) for n in (queries, keys)]
        return sums[0], sums[1], max(queries), max(keys)

    def mask(self, span: Span, window: int | None) -> Tensor | None:
        """bool [queries, keys]: what a segment's tokens see; None where that is everything before them."""
        if window is not None and span.context <= window:
            window = None
        if span.depth == 0 and window is None:
            return None
        key = span, window
        if key not in self._masks:
            keys = torch.arange(span.context, device=self.device)
            distance = torch.arange(span.depth, span.context, device=self.device)[:, None] - keys
            self._masks[key] = (distance >= 0) & (distance < (window or span.context))
        return self._masks[key]

    @cached_property
    def _masks(self) -> dict[tuple[Span, int | None], Tensor]:
        return {}


@contextmanager
def segmented(segments: Segments | None) -> Iterator[dict[str, Any]]:
    """The arguments that make a model forward a packed row; none for a padded batch. Forward in here."""
    token = _in_segments.set(segments is not None)
    try:
        yield {} if segments is None else {"position_ids": segments.position_ids, "segments": segments}
    finally:
        _in_segments.reset(token)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, [1, H, N, head size] to [1, N, H, head size]; without segments sdpa's."""
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if segments.flash is not None:
        return _flash(segments, module, query, key, value, dropout, scaling, sliding_window, **kwargs), None
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"{unknown[0]} in packed attention without flash attention")
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    lengths = [s.stop - s.start for s in segments.spans]
    parts = [torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)]
    place = {span.start: i for i, span in enumerate(segments.spans)}
    outputs = []
    for span, q, k, v in zip(segments.spans, *parts, strict=True):
        if span.depth:
            prefix = place[span.prefix_start]
            k, v = torch.cat([parts[1][prefix], k], dim=2), torch.cat([parts[2][prefix], v], dim=2)
        mask = segments.mask(span, sliding_window)
        outputs.append(
            functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=mask is None
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _flash(
    segments: Segments,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
    **kwargs: Any,
) -> Tensor:
    """Variable-length flash attention; its causal mask is aligned with the last key, which is what a prefix needs."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if any(span.depth for span in segments.spans):
        key, value = key.index_select(1, segments.key_index), value.index_select(1, segments.key_index)
    bounds_q, bounds_k, longest_q, longest_k = segments.bounds
    softcap_and_sinks = {name: kwargs[name] for name in ("softcap", "s_aux") if kwargs.get(name) is not None}
    output: Tensor = _flash_attention_forward(
        query, key, value, None, query_length=query.shape[1], is_causal=True, dropout=dropout,
        softmax_scale=scaling, sliding_window=sliding_window, cu_seq_lens_q=bounds_q, cu_seq_lens_k=bounds_k,
        max_length_q=longest_q, max_length_k=longest_k, target_dtype=get_target_dtype(query, module),
        attn_implementation=segments.flash, **softcap_and_sinks,
    )  # fmt: skip
    return output


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _in_segments.get() else sdpa_mask(*args, **kwargs)


AttentionInterface.register(ATTENTION, segment_attention)
AttentionMaskInterface.register(ATTENTION, _mask)
