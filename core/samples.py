"""Reading a run's samples.jsonl: the newest first, filtered, or the best and worst. Showing them is `rlx.sample_view`.

    samples.jsonl, from its end ──► lines_backwards ──► Reader (counts what is no sample) ──► chosen

The file is never held in memory: the newest samples are at its end, and the best and worst pass through a heap. The
record is what `rlx.learner.watch.report` writes; of it a `Sample` keeps what is shown.
"""

from __future__ import annotations

import heapq
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from rlx.episode import CONTEXT, Status
from rlx.errors import ConfigError, DatasetError

DEFAULT_LIMIT = 10
_BLOCK = 1 << 20
_LONGEST_LINE = 64 << 20
_TOO_LONG = b"\0"  # in no JSON
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000110bd\U000110cd\U00013430-\U0001343f"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e01ef]+"
)
"""Controls but newline and tab, format characters (bidi overrides among them) but the joiners, surrogates, tags: what
could steer a terminal, or hide or turn around other text."""


class SampledRow(BaseModel):
    """Of a training row only which weight version sampled how many tokens, run-length encoded; -1 is context."""

    versions: list[tuple[int, int]] = []


class StepRewardRecord(BaseModel):
    value: float | None = None
    name: str = "env"
    turn: int | None = None


class Sample(BaseModel):
    """A record of samples.jsonl, as far as it is shown. Fields that an older or foreign file lacks have defaults."""

    step: int
    prompt: str | list[dict[str, Any]]
    completion: str = ""
    key: str = ""
    index: int = 0
    messages: str | list[dict[str, Any]] | None = None
    status: str = "ok"
    turns: int = 1
    exact: bool = True
    rows: list[SampledRow] = []
    rewards: dict[str, float | None] = {}
    step_rewards: list[StepRewardRecord] = []
    extra: dict[str, Any] = {}
    error: str = ""
    columns: dict[str, Any] = {}
    worker: str = ""
    advantage: float | None = None

    def versions(self) -> Counter[int]:
        """Tokens by weight version; context is -1."""
        counts: Counter[int] = Counter()
        for row in self.rows:
            for version, count in row.versions:
                counts[version] += count
        return counts

    def reward(self, name: str | None = None) -> float | None:
        """The reward `name`, or the sum of all that applied, without weights; None where there is none."""
        given = [self.rewards.get(name)] if name is not None else self.rewards.values()
        values = [value for value in given if value is not None and not math.isnan(value)]
        return math.fsum(values) if values else None


@dataclass(frozen=True)
class Query:
    """Which samples, and how many. `best`, `worst` and `limit` exclude each other; a `limit` of 0 is all of them."""

    steps: range | None = None
    status: str | None = None
    group: str | None = None
    diff_versions: bool = False
    best: int | None = None
    worst: int | None = None
    by: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if sum(count is not None for count in self.counts) > 1:
            raise ConfigError("--best, --worst and --limit each say how many samples to show: give one of them.")
        if self.by is not None and self.best is None and self.worst is None:
            raise ConfigError("--by names the reward that --best or --worst goes by: give one of them too.")
        if self.status is not None and self.status not in get_args(Status):
            raise ConfigError(f"--status {self.status!r}: there is {', '.join(get_args(Status))}.")

    @property
    def counts(self) -> tuple[int | None, int | None, int | None]:
        return self.best, self.worst, self.limit

    def matches(self, sample: Sample) -> bool:
        return (
            (self.steps is None or sample.step in self.steps)
            and self.status in (None, sample.status)
            and self.group in (None, sample.key)
            and (not self.diff_versions or len(sample.versions().keys() - {CONTEXT}) > 1)
        )


def parse_steps(text: str) -> range:
    """`12`, `3:8` (both ends count), `3:` or `:8`. ConfigError for anything else."""
    match = re.fullmatch(r"(\d{1,15})|(\d{0,15}):(\d{0,15})", text, re.ASCII)
    if match is None or text == ":":
        raise ConfigError(f"--step {text!r} is no step. Write --step 12, --step 3:8, --step 3: or --step :8.")
    first, last = (match[1], match[1]) if match[1] else (match[2], match[3])
    steps = range(int(first or 0), int(last) + 1 if last else sys.maxsize)
    if not steps:
        raise ConfigError(f"--step {text}: the first step lies behind the last one. Write --step {last}:{first}.")
    return steps


def parts(folder: Path, name: str) -> list[Path]:
    """The files that NAME.jsonl is spread over, the oldest first: NAME.2.jsonl, NAME.1.jsonl, NAME.jsonl."""
    older = []
    for path in folder.glob(f"{name}.*.jsonl"):
        if match := re.fullmatch(r"\d{1,6}", path.name[len(name) + 1 : -len(".jsonl")], re.ASCII):
            older.append((int(match[0]), path))
    newest = folder / f"{name}.jsonl"
    return [path for _, path in sorted(older, reverse=True)] + ([newest] if newest.is_file() else [])


def samples_files(out: Path) -> list[Path]:
    """The parts of samples.jsonl in an output_dir, the newest first, or the file itself. ConfigError or DatasetError
    when there is nothing."""
    if not out.exists():
        raise ConfigError(f"{out}: there is no such folder or file. Give the output_dir of a run.")
    if out.is_dir() and (filled := [path for path in reversed(parts(out, "samples")) if path.stat().st_size]):
        return filled
    path = out / "samples.jsonl" if out.is_dir() else out
    if path.is_file():
        if path.stat().st_size == 0:
            raise DatasetError(f"{path} is empty: the run has finished no step yet, or had samples_per_step: 0.")
        return [path]
    if not out.is_dir():
        raise ConfigError(f"{out} is not a file that can be read from its end. Give an output_dir or a samples.jsonl.")
    runs = sorted(child.name for child in out.iterdir() if (child / "samples.jsonl").is_file())
    if runs:
        raise DatasetError(f"{out} is no output_dir, but its folders are: {_listed(runs)}. Give one of them.")
    names = sorted(child.name for child in out.iterdir())
    raise DatasetError(
        f"{out} has no samples.jsonl; it holds {_listed(names) if names else 'nothing'}. "
        "A run writes one at its first step."
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(name if name.isprintable() else ascii(name) for name in names[:8]) or "none") + more


def lines_backwards(path: Path) -> Iterator[bytes]:
    """The lines of a file, the last first. What follows the last newline comes first, empty where nothing does; a line
    of more than 64 MiB comes as bytes that are no JSON."""
    with path.open("rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        pieces: list[bytes] = []  # the last one first, of the line whose beginning is not read yet
        while end > 0:
            begin = max(0, end - _BLOCK)
            stream.seek(begin)
            first, *rest = stream.read(end - begin).split(b"\n")
            if rest:
                yield b"".join(reversed([*pieces, rest.pop()]))
                yield from reversed(rest)
                pieces = []
            pieces.append(first)
            if sum(map(len, pieces)) > _LONGEST_LINE:
                pieces = [_TOO_LONG]
            end = begin
        yield b"".join(reversed(pieces))


@dataclass
class Reader:
    """The samples of files, the newest first, each with its line. What was read is counted on the way."""

    path: Path
    older: Sequence[Path] = ()
    """Files before it, the newest first"""
    samples: int = 0
    unrewarded: int = 0
    """Samples that match and have no reward to be the best or worst by."""
    broken: int = 0
    cut_off: bool = False
    steps: list[int] = field(default_factory=list)
    """The lowest and the highest step."""
    statuses: set[str] = field(default_factory=set)
    rewards: set[str] = field(default_factory=set)

    def __iter__(self) -> Iterator[tuple[Sample, bytes]]:
        lines = (line for path in (self.path, *self.older) for line in lines_backwards(path))
        for place, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                sample = Sample.model_validate_json(line)
            except ValidationError:
                self.cut_off |= place == 0
                self.broken += place > 0
                continue
            self.samples += 1
            self.steps = [min([*self.steps, sample.step]), max([*self.steps, sample.step])]
            self.statuses.add(sample.status)
            self.rewards.update(sample.rewards)
            yield sample, line

    def notes(self, shown: int) -> Iterator[str]:
        if self.cut_off:
            yield "the last line is cut off and left out: the run was killed there, or is writing it now"
        if self.broken:
            yield (
                f"{self.broken} of the {self.broken + self.samples} lines read "
                f"{'is' if self.broken == 1 else 'are'} no sample and left out"
            )
        if self.unrewarded and shown:
            yield f"{self.unrewarded} of those that match left out: they have no reward to compare"

    def nothing(self, query: Query) -> DatasetError:
        """Why nothing was shown, after all was read."""
        if not self.samples:
            return DatasetError(f"{self.path} holds no whole sample.")
        if query.by is not None and query.by not in self.rewards:
            return DatasetError(f"no sample has a reward {query.by!r}. There is {_listed(sorted(self.rewards))}.")
        if self.unrewarded:
            return DatasetError(f"no sample that matches has a reward, of the {self.samples} of {self.path}.")
        first, last = self.steps
        return DatasetError(
            f"none of the {self.samples} samples of {self.path} matches. They are of "
            f"{f'step {first}' if first == last else f'steps {first} to {last}'}, "
            f"with status {_listed(sorted(self.statuses))}."
        )


def chosen(reader: Reader, query: Query) -> Iterator[tuple[Sample, bytes]]:
    """The newest matches as they are found; the best or worst, which have a reward, after all is read."""
    matches = (found for found in reader if query.matches(found[0]))
    if query.best is None and query.worst is None:
        limit = DEFAULT_LIMIT if query.limit is None else query.limit
        yield from islice(matches, limit or None)
        return
    pick = heapq.nlargest if query.best is not None else heapq.nsmallest
    count = query.best or query.worst or 0
    for _, sample, line in pick(count, _rewarded(reader, matches, query.by), key=lambda item: item[0]):
        yield sample, line


def _rewarded(
    reader: Reader, matches: Iterator[tuple[Sample, bytes]], name: str | None
) -> Iterator[tuple[float, Sample, bytes]]:
    for sample, line in matches:
        reward = sample.reward(name)
        if reward is None:
            reader.unrewarded += 1
        else:
            yield reward, sample, line
