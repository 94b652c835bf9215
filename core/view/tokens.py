"""Token ids as pieces of text, by the tokenizer.json of a run; without transformers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import try_to_load_from_cache

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Piece = tuple[str, int]
"""A text and how many tokens it takes; more than one where a character is split over tokens."""
_MOST_BYTES = 4
"""Of a character"""
_BROKEN = "\ufffd"


def find_tokenizer(places: Iterable[str]) -> Tokenizer | None:
    """Of the first place, a folder or a hub name in the local cache, that has one that can be read."""
    for place in places:
        file = Path(place) / "tokenizer.json"
        if not file.is_file():
            cached = (
                try_to_load_from_cache(place, "tokenizer.json")
                if place.count("/") < 2 and place[:1] not in "./~"
                else None
            )
            if not isinstance(cached, str):
                continue
            file = Path(cached)
        if (found := _load(str(file), file.stat().st_mtime_ns)) is not None:
            return found
    return None


@lru_cache(maxsize=4)
def _load(path: str, _changed: int) -> Tokenizer | None:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(path)
    except Exception:  # the library raises nothing narrower for a file that is damaged
        return None


def pieces(tokenizer: Tokenizer | None, ids: list[int]) -> list[Piece]:
    """The texts of `ids`, in order; the ids themselves where there is no tokenizer."""
    if tokenizer is None:
        return [(f"[{number}] ", 1) for number in ids]
    found: list[Piece] = []
    at = 0
    while at < len(ids):
        before = ids[at - 1 : at] if at else []
        text, size = _next_piece(tokenizer, before, ids[at : at + _MOST_BYTES])
        found.append((text, size))
        at += size
    return found


def _next_piece(tokenizer: Tokenizer, before: list[int], ids: list[int]) -> Piece:
    """The first token of `ids`, with those that complete its character. `before` tells whether a space is due."""
    prefix = tokenizer.decode(before, skip_special_tokens=False) if before else ""
    texts = []
    for size in range(1, len(ids) + 1):
        text = tokenizer.decode([*before, *ids[:size]], skip_special_tokens=False)
        texts.append(text[len(prefix) :] if text.startswith(prefix) else text)
        if _BROKEN not in texts[-1]:
            return texts[-1], size
    return texts[0], 1
