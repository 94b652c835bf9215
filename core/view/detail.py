"""One sample as the page shows it: messages cut at a length, and tokens with what colours them, a range at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from rlx.samples import Sample
from rlx.view.choose import brief
from rlx.view.tokens import find_tokenizer, pieces

MOST_TOKENS = 2_000
"""Tokens a request."""
_MOST_MESSAGES = 200
_MOST_VALUES = 50
_LEARNER = "learner_logprobs"
"""The learner's own log-probabilities, where the run recorded them; their gap to the worker's is a colour."""


def detail(place: int, record: Mapping[str, Any], chars: int) -> dict[str, Any]:
    """Everything but tokens, as JSON; of every text the first `chars` characters. Raises pydantic's ValidationError."""
    sample = Sample.model_validate(record)
    rows = record.get("rows")
    return {
        **brief(place, record),
        "turns": sample.turns,
        "exact": sample.exact,
        "worker": sample.worker,
        "rewards": sample.rewards,
        "step_rewards": [step.model_dump() for step in sample.step_rewards[:_MOST_VALUES]],
        "by_version": sorted(sample.versions().items()),
        "prompt_messages": list(_messages(sample.prompt, "prompt", chars)),
        "messages": list(_messages(sample.messages, "shown to the rewards", chars)) if sample.messages else [],
        "completion": _cut(sample.completion, chars),
        "error": _cut(sample.error, chars),
        "values": [[name, _cut(_text(value), chars)] for name, value in _values(sample)],
        "timings": record.get("timings") if isinstance(record.get("timings"), dict) else {},
        "rows": [len(row.get("ids", [])) for row in rows] if isinstance(rows, list) else [],
    }


def tokens(record: Mapping[str, Any], row: int, start: int, places: Iterable[str]) -> dict[str, Any]:
    """At most MOST_TOKENS tokens of a training row from `start` on, as JSON: `pieces` [text, number of tokens], and for
    each token `versions` (-1: context), `logprobs` (None: none), `gaps` (learner − worker, None: not recorded)."""
    rows = record.get("rows")
    if not isinstance(rows, list) or not 0 <= row < len(rows):
        return {"pieces": [], "versions": [], "logprobs": [], "gaps": [], "next": None}
    found = rows[row]
    ids, end = found.get("ids", []), start + MOST_TOKENS
    logprobs = found.get("logprobs", [])
    own = found.get(_LEARNER) or []
    gaps = [
        a - b if a is not None and b is not None else None
        for a, b in zip(own[start:end], logprobs[start:end], strict=False)
    ]
    tokenizer = find_tokenizer(places)
    return {
        "known": tokenizer is not None,
        "pieces": pieces(tokenizer, ids[start:end]),
        "versions": list(islice(_unrolled(found.get("versions", [])), start, end)),
        "logprobs": logprobs[start:end],
        "gaps": gaps,
        "next": end if end < len(ids) else None,
    }


def _unrolled(runs: Iterable[tuple[int, int]]) -> Iterator[int]:
    for version, count in runs:
        yield from (version for _ in range(count))


def _messages(messages: str | list[dict[str, Any]] | None, role: str, chars: int) -> Iterator[dict[str, Any]]:
    if isinstance(messages, str):
        yield {"role": role, **_cut(messages, chars)}
        return
    for message in (messages or [])[:_MOST_MESSAGES]:
        others = {
            name: value for name, value in message.items() if name not in ("role", "content") and value is not None
        }
        content = message.get("content")
        parts = content if isinstance(content, list) else [] if content is None else [content]
        texts = [part.get("text", part) if isinstance(part, dict) else part for part in parts]
        lines = [_text(text) for text in texts] + [f"{name}: {_text(value)}" for name, value in others.items()]
        yield {"role": str(message.get("role", "no role")), **_cut("\n".join(lines), chars)}
    if messages and len(messages) > _MOST_MESSAGES:
        yield {"role": f"{len(messages) - _MOST_MESSAGES} more messages are not shown", "text": "", "length": 0}


def _values(sample: Sample) -> Iterator[tuple[str, Any]]:
    yield from islice(
        ((name, value) for part in (sample.columns, sample.extra) for name, value in part.items()), _MOST_VALUES
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cut(text: str, chars: int) -> dict[str, Any]:
    return {"text": text[:chars], "length": len(text)}
