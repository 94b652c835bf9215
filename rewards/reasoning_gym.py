"""The score that a task of the reasoning-gym library gives an answer, for `datasets: - path: reasoning_gym:TASK`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

import yaml

from rlx.errors import UserCodeError
from rlx.rewards.text import Completion, answer_text, completion_text

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def reward(
    completions: Sequence[Completion],
    task: Sequence[str],
    answer: Sequence[str | None],
    metadata: Sequence[str],
    log_extra: Callable[[str, list[Any]], None] | None = None,
    **kwargs: Any,
) -> list[float]:
    """From 0 to 1, by the rules of the task. What the task cannot read is no answer, and gets 0."""
    given = [extract_answer(completion_text(c), gold) for c, gold in zip(completions, answer, strict=True)]
    if log_extra is not None:
        log_extra("parsed_answer", given)
    return [_score(*row) for row in zip(given, task, answer, metadata, strict=True)]


def extract_answer(text: str, gold: str | None = None) -> str:
    """What stands in the last `<answer>` after the reasoning; without one the last line, or all where `gold` has
    several lines."""
    text = answer_text(text)
    tagged: list[str] = _TAGGED.findall(text)
    if tagged:
        return tagged[-1].strip()
    lines = text.strip().splitlines()
    return text.strip() if gold and "\n" in gold else lines[-1].strip() if lines else ""


def _score(given: str, task: str, answer: str | None, metadata: str) -> float:
    score_answer = _scorer(task)
    entry = {"answer": answer, "metadata": json.loads(metadata, object_hook=_tuple)}
    try:
        return float(score_answer(given, entry))
    except Exception:  # the library's parsers raise whatever they like for what they cannot read
        return 0.0


@lru_cache(maxsize=64)
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise UserCodeError(f"needs {error.name}, which is not installed. Type: pip install reasoning-gym") from error
    name, _, options = task.partition("?")
    values = {option: yaml.safe_load(text) for option, text in parse_qsl(options)}
    score_answer: Callable[[str, dict[str, Any]], float] = reasoning_gym.create_dataset(name, **values).score_answer
    return score_answer


def _tuple(value: dict[str, Any]) -> Any:
    return tuple(value["("]) if value.keys() == {"("} else value
