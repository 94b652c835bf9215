"""Does the completion have the shape that was asked for? 1.0 or 0.0."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rlx.rewards.text import Completion, answer_text, completion_text

_THINK = re.compile(r"\s*<think>(?P<thought>.*?)</think>(?P<answer>.*)", re.DOTALL)


def think(completions: Sequence[Completion], **kwargs: Any) -> list[float]:
    """`<think>`, a thought, `</think>`, an answer: each tag once, nothing before, both parts not blank."""
    return [float(_has_think_shape(completion_text(completion))) for completion in completions]


def boxed(completions: Sequence[Completion], **kwargs: Any) -> list[float]:
    r"""Exactly one `\boxed{...}`, closed and not blank, after the reasoning if there is any."""
    return [float(_has_one_box(answer_text(completion_text(completion)))) for completion in completions]


reward = think


def _has_think_shape(text: str) -> bool:
    match = _THINK.fullmatch(text)
    if match is None or text.count("<think>") != 1 or text.count("</think>") != 1:
        return False
    return bool(match["thought"].strip() and match["answer"].strip())


def _has_one_box(text: str) -> bool:
    _, *boxes = re.split(r"\\boxed\s*\{", text)
    if len(boxes) != 1:
        return False
    depth = 1
    for position, character in enumerate(boxes[0]):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return bool(boxes[0][:position].strip())
    return False
