"""What a completion says, whether it comes as a string or as messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Completion = str | Sequence[Mapping[str, Any]]
"""As reward functions get it: a string, or `[{"role": "assistant", "content": ...}]` for a chat prompt."""


def completion_text(completion: Completion) -> str:
    """The text of a completion; of several messages, that of the last."""
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


def answer_text(text: str) -> str:
    """What follows the reasoning: the text after the last `</think>`; nothing when `<think>` was never closed."""
    _, tag, tail = text.rpartition("</think>")
    if tag:
        return tail
    return "" if "<think>" in text else text
