"""Rows of a task of the reasoning-gym library: `datasets: - path: reasoning_gym:chain_sum`.

    reasoning_gym:countdown?min_numbers=3&max_numbers=4     the task's own options, by the library's names
    split: train[:1000]                                     how many rows, or which; 500 without a slice

Each row has `prompt` (one user message), `question`, `answer`, `task` (what follows `reasoning_gym:`) and `metadata`,
JSON in which `{"(": [...]}` is a tuple. `rlx.rewards.reasoning_gym` scores them.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qsl

import datasets
import yaml

from rlx.config import Config
from rlx.config.sections import DatasetSection
from rlx.errors import DatasetError

PREFIX = "reasoning_gym:"
DEFAULT_ROWS = 500
MAX_ROWS = 2**20
REQUEST = "Give the final answer between <answer> and </answer>."
_SPLIT = re.compile(r"(\w+)(?:\[(\d*):(\d*)\])?")


def read_task(config: Config, section: DatasetSection, key: str) -> datasets.Dataset:
    """The rows of the entry `key`, a function of `seed` and the entry. DatasetError when the library, the task or an
    option is not there.

    Row i of a task comes from seed + i, so every entry has a range of its own, of MAX_ROWS; those of `test_datasets`,
    and of a split that is not called train, lie apart from those that are trained on.
    """
    where, task = f"{config.path}: {key}", str(section.path).removeprefix(PREFIX)
    match = _SPLIT.fullmatch(section.split)
    if match is None:
        raise DatasetError(f"{where}.split: {section.split!r} is not known for reasoning_gym; write train[:1000].")
    first, last = int(match[2] or 0), int(match[3] or DEFAULT_ROWS)
    if not first < last <= MAX_ROWS:
        raise DatasetError(f"{where}.split: {section.split!r} names no rows between 0 and {MAX_ROWS:,}.")
    held_out = key.startswith("test_datasets") or match[1] != "train"
    entry = int(re.sub(r"\D", "", key) or 0) % 16
    seed = (config.seed % 128) * 2**25 + held_out * 2**24 + entry * MAX_ROWS
    generator = _create(where, task, seed=seed, size=last)
    return datasets.Dataset.from_list([_row(task, generator[index]) for index in range(first, last)])


def _create(where: str, task: str, **size: int) -> Any:
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise DatasetError(
            f"{where}.path: {PREFIX}{task} needs {error.name}, which is not installed. Type: pip install reasoning-gym"
        ) from error
    name, _, options = task.partition("?")
    try:
        values = {option: yaml.safe_load(text) for option, text in parse_qsl(options, strict_parsing=bool(options))}
        return reasoning_gym.create_dataset(name, **values, **size)
    except (ValueError, TypeError, AssertionError) as error:
        raise DatasetError(f"{where}.path: {PREFIX}{task}: {error}. The tasks are listed at {_LIST}.") from error


_LIST = "https://github.com/open-thought/reasoning-gym/blob/main/GALLERY.md"


def _row(task: str, entry: dict[str, Any]) -> dict[str, Any]:
    prompt = [{"role": "user", "content": f"{entry['question']}\n\n{REQUEST}"}]
    columns = {"question": entry["question"], "answer": entry["answer"], "task": task}
    return {"prompt": prompt, **columns, "metadata": json.dumps(_plain(entry["metadata"]), default=str)}


def _plain(value: Any) -> Any:
    """`value` for JSON, with its tuples marked."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    items = [_plain(item) for item in value] if isinstance(value, list | tuple) else value
    return {"(": items} if isinstance(value, tuple) else items
