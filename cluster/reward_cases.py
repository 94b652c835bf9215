"""What `rlx reward test` scores: completions whose worth is plain, or the groups that a run has saved."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rlx.config import Config
from rlx.errors import ConfigError, DatasetError, ModelError
from rlx.rewards.scoring import ScoreRequest

ANSWER_COLUMNS = ("answer", "solution", "target", "label", "ground_truth")
GROUP_SIZE = 2
"""Completions of a trivial group, all the same: a function may compare within a group."""
EMPTY, PROMPT, ANSWER, LONG, SAVED = "nothing", "the prompt", "the answer", "a long text", "saved"


@dataclass(frozen=True)
class Case:
    """A group to score. `kind`: what its completions are; `recorded` [G]: what each got in the run, by reward name."""

    kind: str
    request: ScoreRequest
    recorded: Sequence[Mapping[str, float]] = ()


def trivial_cases(config: Config, rows: int, answer_column: str | None) -> list[Case]:
    """For each of the first rows of the data set: no text, the prompt, the answer where there is one, a long text."""
    import datasets

    from rlx.learner.incoming.data import first_rows
    from rlx.tokenizer import load_tokenizer

    datasets.disable_progress_bars()
    tokenizer: Any = None
    try:
        tokenizer = load_tokenizer(config)
    except ModelError as error:
        Console(stderr=True).print(
            f"note: completion_ids are made up, there is no tokenizer. {error}", markup=False, soft_wrap=True
        )
    as_text = rewards_get_text(config)
    return [
        _trivial(config, tokenizer, row, kind, text, as_text)
        for row in first_rows(config, tokenizer, rows)
        for kind, text in _trivial_texts(config, row, answer_column).items()
    ]


def rewards_get_text(config: Config) -> bool:
    """Whether the rollout function gives the rewards strings, whatever the prompt is."""
    if config.trl.rollout_func is None:
        return False
    from rlx.envs.load import returns_text  # it imports transformers

    return returns_text(config)


def completion_for(prompt: Any, text: str, as_text: bool) -> Any:
    """The completion `text` of `prompt` as a reward function gets it in a run."""
    return text if as_text or isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _trivial_texts(config: Config, row: Mapping[str, Any], answer_column: str | None) -> dict[str, str]:
    prompt = row["prompt"]
    texts = {EMPTY: "", PROMPT: prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "")}
    if answer_column is not None and answer_column not in row:
        raise ConfigError(f"--answer-column {answer_column}: there is no such column. There are: {', '.join(row)}.")
    column = answer_column or next((name for name in ANSWER_COLUMNS if name in row), None)
    if column is not None and row[column] is not None:
        texts[ANSWER] = row[column] if isinstance(row[column], str) else json.dumps(row[column], default=str)
    return {**texts, LONG: "word " * config.trl.max_completion_length}


def _trivial(config: Config, tokenizer: Any, row: Mapping[str, Any], kind: str, text: str, as_text: bool) -> Case:
    limit = config.trl.max_completion_length
    encoded = tokenizer(text, add_special_tokens=False, verbose=False) if tokenizer else None
    ids = list(range(len(text.split()))) if encoded is None else encoded["input_ids"]
    columns = {name: value for name, value in row.items() if name != "prompt"}
    group = [completion_for(row["prompt"], text, as_text)] * GROUP_SIZE
    return Case(kind, ScoreRequest(row["prompt"], group, [ids[:limit]] * GROUP_SIZE, columns, limit))


def saved_cases(config: Config, path: Path) -> list[Case]:
    """The groups of a samples.jsonl, as far as they were saved, with what their completions got."""
    if not path.is_file():
        raise DatasetError(f"--samples {path}: there is no such file.")
    groups: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            prompt, _ = record["prompt"], record["completion"]
            rewards = {name: math.nan if value is None else float(value) for name, value in record["rewards"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatasetError(f"--samples {path}, line {number}: not a saved sample: {error!r}.") from error
        if record.get("status", "ok") in ("ok", "truncated"):
            key = (record.get("key", json.dumps(prompt)), record.get("step", 0))
            groups.setdefault(key, []).append({**record, "rewards": rewards})
    if not groups:
        raise DatasetError(f"--samples {path}: it holds no episode that rewards would see.")
    return [_saved(config, records) for records in groups.values()]


def _saved(config: Config, records: list[dict[str, Any]]) -> Case:
    first, names = records[0], dict.fromkeys(name for record in records for name in record.get("extra", {}))
    request = ScoreRequest(
        prompt=first["prompt"],
        completions=[_completion(record) for record in records],
        completion_ids=[_sampled_ids(record) for record in records],
        columns=first.get("columns", {}),
        max_completion_length=config.trl.max_completion_length,
        step=first.get("step", 0),
        own_columns={name: [record.get("extra", {}).get(name) for record in records] for name in names},
    )
    return Case(SAVED, request, [record["rewards"] for record in records])


def _completion(record: Mapping[str, Any]) -> Any:
    if "messages" in record or isinstance(record["prompt"], str):
        return record.get("messages", record["completion"])
    return [{"role": "assistant", "content": record["completion"]}]


def _sampled_ids(record: Mapping[str, Any]) -> list[int]:
    ids: list[int] = []
    for row in record.get("rows", ()):
        at = 0
        for version, count in row["versions"]:
            ids += row["ids"][at : at + count] if version >= 0 else []
            at += count
    return ids
