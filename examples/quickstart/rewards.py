"""The quickstart's transform and rewards, in the contracts of the YAML's `datasets[].type` and `trl.reward_funcs`."""

from __future__ import annotations

import random
from typing import Any

Messages = list[dict[str, str]]


def to_prompt(cfg: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, list[str]]]:
    """A data set row {question, answer} as one user message; the rewards see `answer`."""

    def transform_fn(example: dict[str, str], tokenizer: Any = None) -> dict[str, Any]:
        return {"prompt": [{"role": "user", "content": example["question"]}], "answer": example["answer"]}

    return transform_fn, {"remove_columns": ["question"]}


def exact_match(completions: list[Messages], answer: list[str], **kwargs: Any) -> list[float]:
    """1.0 where the reply is the answer and nothing else, 0.0 elsewhere."""
    return [float(reply[-1]["content"] == right) for reply, right in zip(completions, answer, strict=True)]


def shuffled_match(
    prompts: list[Messages], completions: list[Messages], answer: list[str], **kwargs: Any
) -> list[float]:
    """The control: exact_match's scores, dealt at random among the completions of the same prompt.

    A group keeps its scores, mean and spread, but they say nothing about who earned them, so a model trained on them
    must not improve. The deal depends on the group's contents alone.
    """
    scores = exact_match(completions, answer)
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(repr(prompt), []).append(index)
    dealt = [0.0] * len(scores)
    for asked, members in groups.items():
        hand = [scores[index] for index in members]
        random.Random(f"{asked}{[completions[index] for index in members]}").shuffle(hand)
        for index, score in zip(members, hand, strict=True):
            dealt[index] = score
    return dealt
