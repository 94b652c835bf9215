"""Which samples the page shows: columns of all of them choose, then the records of one page are read.

Samples.table(seconds) ─► filters and order, as arrays ─► records, one by one, until the page is full or time is up
"""

from __future__ import annotations

import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from pydantic import ValidationError

from rlx.episode import CONTEXT, Status
from rlx.samples import Sample

STATUSES = get_args(Status)
Order = Literal["newest", "best", "worst"]
_BUDGET_S = 0.4
_PREVIEW = 240


@dataclass(frozen=True)
class Table:
    """Samples as columns, oldest first. `places` int64 name them for good; `steps` int64; `rewards` float64, NaN where
    there is none; `statuses` int8, of STATUSES, -1 for others; `groups` uint32, of `group_number`. `indexed` is the
    share of the samples that is in it."""

    places: np.ndarray
    steps: np.ndarray
    rewards: np.ndarray
    statuses: np.ndarray
    groups: np.ndarray
    indexed: float = 1.0


class Samples(ABC):
    @abstractmethod
    def table(self, seconds: float) -> Table:
        """What is known after at most about `seconds` of looking for more."""

    @abstractmethod
    def record(self, place: int) -> dict[str, Any] | None:
        """None where it is not there any more."""


@dataclass(frozen=True)
class Wanted:
    """`low` and `high` bound the reward, `text` is looked for in prompt and completion, upper and lower case alike."""

    steps: range | None = None
    status: str | None = None
    group: str | None = None
    low: float | None = None
    high: float | None = None
    text: str = ""
    order: Order = "newest"
    after: int | None = None
    """The last place that an earlier page looked at"""
    limit: int = 20


def choose(samples: Samples, wanted: Wanted, seconds: float = _BUDGET_S) -> dict[str, Any]:
    """One page as JSON: `samples`, `next` (for `after`; None at the end), `matching` (by what the columns tell),
    `total`, `indexed`."""
    end = time.monotonic() + seconds
    table = samples.table(seconds / 2)
    order = _ordered(table, wanted)
    start = 0
    if wanted.after is not None:
        start = int(np.argmax(table.places[order] == wanted.after)) + 1 if wanted.after in table.places[order] else 0
    found: list[dict[str, Any]] = []
    looked = start
    while looked < len(order) and len(found) < wanted.limit and (time.monotonic() < end or looked == start):
        place = int(table.places[order[looked]])
        looked += 1
        record = samples.record(place)
        if record is not None and _has_text(record, wanted):
            found.append(brief(place, record))
    ended = looked >= len(order) and table.indexed >= 1.0
    last = int(table.places[order[looked - 1]]) if looked else wanted.after
    return {
        "samples": found,
        "next": None if ended or last is None else str(last),
        "matching": len(order),
        "total": len(table.places),
        "indexed": table.indexed,
    }


def group_number(key: str) -> int:
    return zlib.crc32(key.encode("utf-8", "surrogatepass"))


def status_number(status: Any) -> int:
    return STATUSES.index(status) if status in STATUSES else -1


def table_of(rows: Iterable[tuple[int, Mapping[str, Any]]]) -> Table:
    """Of records with their places, oldest first."""
    kept = list(rows)
    return Table(
        np.array([place for place, _ in kept], np.int64),
        np.array([_whole(record.get("step")) for _, record in kept], np.int64),
        np.array([reward_of(record.get("rewards")) for _, record in kept], np.float64),
        np.array([status_number(record.get("status", "ok")) for _, record in kept], np.int8),
        np.array([group_number(str(record.get("key", ""))) for _, record in kept], np.uint32),
    )


def reward_of(rewards: Any) -> float:
    """The sum of a record's rewards, NaN where there is none."""
    values = [v for v in rewards.values() if isinstance(v, int | float) and v == v] if isinstance(rewards, dict) else []
    return float(sum(values)) if values else float("nan")


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and abs(value) < 2**62 else 0


def _ordered(table: Table, wanted: Wanted) -> np.ndarray:
    keep = np.ones(len(table.places), bool)
    if wanted.steps is not None:
        keep &= (table.steps >= wanted.steps.start) & (table.steps < wanted.steps.stop)
    if wanted.status is not None:
        keep &= table.statuses == status_number(wanted.status)
    if wanted.group is not None:
        keep &= table.groups == group_number(wanted.group)
    if wanted.low is not None:
        keep &= table.rewards >= wanted.low
    if wanted.high is not None:
        keep &= table.rewards <= wanted.high
    if wanted.order != "newest":
        keep &= ~np.isnan(table.rewards)
    newest_first = np.nonzero(keep)[0][::-1]
    if wanted.order == "newest":
        return newest_first
    rewards = table.rewards[newest_first]
    return newest_first[np.argsort(-rewards if wanted.order == "best" else rewards, kind="stable")]


def _has_text(record: Mapping[str, Any], wanted: Wanted) -> bool:
    if wanted.group is not None and record.get("key") != wanted.group:
        return False
    if not wanted.text:
        return True
    searched = wanted.text.casefold()
    parts = (record.get("completion"), record.get("prompt"), record.get("messages"))
    return any(searched in text.casefold() for part in parts for text in texts_of(part))


def texts_of(messages: Any) -> list[str]:
    """The texts of a prompt or conversation, in order."""
    if isinstance(messages, str):
        return [messages]
    texts = []
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                texts.append(text)
    return texts


def brief(place: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the list."""
    try:
        sample = Sample.model_validate(record)
    except ValidationError:
        return {"id": str(place), "step": _whole(record.get("step")), "status": "unreadable", "prompt": "", "text": ""}
    versions = sample.versions()
    asked = texts_of(sample.prompt)
    return {
        "id": str(place),
        "step": sample.step,
        "group": sample.key,
        "index": sample.index,
        "status": sample.status,
        "reward": sample.reward(),
        "advantage": sample.advantage,
        "tokens": sum(count for version, count in versions.items() if version != CONTEXT),
        "versions": sorted(version for version in versions if version != CONTEXT),
        "prompt": asked[-1][:_PREVIEW] if asked else "",
        "text": sample.completion[:_PREVIEW],
    }
