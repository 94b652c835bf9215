"""What `rlx reward test` prints: a table, what is odd, and the first failure of every reward."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlx.cluster.reward_cases import ANSWER, EMPTY, LONG, PROMPT, SAVED, Case

STUCK = {"timeout": "blocks", "crash": "ends its process"}
"""Outcomes that cost a process, and what the reward does then."""
_SHOWN = 12
_LEAST = 1e-6
"""A reward below this is none."""


@dataclass
class Scores:
    """What one reward gave: the calls of each kind, in order; why it could not be loaded, or not be tried."""

    name: str
    calls: list[Call] = field(default_factory=list)
    broken: str = ""
    untried: str = ""

    def of(self, kind: str) -> list[Call]:
        return [call for call in self.calls if call.case.kind == kind]

    def values(self, kind: str) -> list[float]:
        """Of every completion of a kind that got a value."""
        return [value for call in self.of(kind) for value in call.values if not math.isnan(value)]

    @property
    def failures(self) -> list[Call]:
        return [call for call in self.calls if call.outcome != "ok"]

    @property
    def failed(self) -> bool:
        return bool(self.broken or self.failures)


@dataclass(frozen=True)
class Call:
    """A group that was scored: `values` [G], NaN for None; `outcome` as in a run, or `refused` for a reward that no
    call will get to work."""

    case: Case
    values: list[float]
    seconds: float
    outcome: str
    error: str


def show(console: Console, scores: Sequence[Scores], saved: bool) -> None:
    """The table, then what is odd, then the first failure of each reward."""
    console.print(_saved_table(scores) if saved else _trivial_table(scores))
    if saved:
        if _changes(scores):
            console.print(_changes_table(scores))
        elif any(_pairs(score) for score in scores):
            console.print("no reward differs from the saved one")
        else:
            console.print("none of these rewards was saved: there is nothing to compare with")
    for score in scores:
        if score.untried:
            console.print(f"note  {score.untried}", markup=False, soft_wrap=True)
        for oddity in oddities(score):
            console.print(f"note  {score.name} {oddity}", markup=False, soft_wrap=True)
    for score in scores:
        if score.failed:
            error = score.broken or score.failures[0].error
            console.print(f"error {error}", markup=False, soft_wrap=True)


def oddities(score: Scores) -> list[str]:
    """What should make one look at a reward, though it did not fail."""
    found = []
    for outcome, what in STUCK.items():
        kinds = dict.fromkeys(call.case.kind for call in score.calls if call.outcome == outcome)
        if kinds:
            found.append(f"{what} ({outcome}) for {', '.join(kinds)}")
    means = {kind: _mean(score.values(kind)) for kind in (EMPTY, PROMPT, ANSWER, LONG) if score.of(kind)}
    if not means or score.failed:
        return found
    known = {kind: value for kind, value in means.items() if value is not None}
    rest = [value for kind, value in known.items() if kind != EMPTY]
    if not known:
        found.append("gives no value for anything")
    elif len({round(value, 6) for value in known.values()}) == 1 and len(known) > 1:
        hint = "" if ANSWER in known else "; name the column of the right answer with --answer-column"
        found.append(f"gives {next(iter(known.values())):g} for everything{hint}")
    else:
        if EMPTY in known and rest and known[EMPTY] > min(0, max(rest)):
            found.append(
                f"pays for nothing: {known[EMPTY]:g} for an empty completion, at most {max(rest):g} for another"
            )
        for kind in (PROMPT, LONG):
            if ANSWER in known and known.get(kind, -math.inf) >= max(known[ANSWER], _LEAST):
                found.append(f"pays {known[kind]:g} for {kind}, and {known[ANSWER]:g} for the answer")
    return found


def _trivial_table(scores: Sequence[Scores]) -> Table:
    kinds = [kind for kind in (EMPTY, PROMPT, ANSWER, LONG) if any(score.of(kind) for score in scores)]
    table = Table(title="mean reward by what the completion is, and seconds of the slowest call")
    table.add_column("reward", overflow="fold")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for score in scores:
        cells = ["[red]not loaded[/red]" if score.broken else _cell(score, kind) for kind in kinds]
        cells = ["not tried"] * len(kinds) if score.untried else cells
        table.add_row(escape(score.name), *cells)
    return table


def _cell(score: Scores, kind: str) -> str:
    calls = score.of(kind)
    if not calls:
        return "-"
    bad = Counter(call.outcome for call in calls if call.outcome != "ok")
    value = ", ".join(f"{count} {name}" if count > 1 else name for name, count in bad.items())
    shown = f"[red]{value}[/red]" if value else _number(_mean(score.values(kind)))
    return f"{shown}  {max(call.seconds for call in calls):.2f} s"


def _saved_table(scores: Sequence[Scores]) -> Table:
    table = Table(title="saved completions, scored again")
    table.add_column("reward", overflow="fold")
    for column in ("scored", "saved mean", "mean now", "changed", "seconds", "groups"):
        table.add_column(column, justify="right")
    for score in scores:
        pairs = _pairs(score)
        recorded = _mean([old for old, _ in pairs if not math.isnan(old)])
        outcomes = Counter(call.outcome for call in score.calls)
        told = ", ".join(f"{count} {name}" for name, count in outcomes.items()) or "not loaded"
        table.add_row(
            escape(score.name), str(sum(len(call.values) for call in score.calls)), _number(recorded), _number(_mean(score.values(SAVED))),
            str(sum(_differ(*pair) for pair in pairs)), f"{sum(call.seconds for call in score.calls):.2f}",
            f"[red]{told}[/red]" if score.failed else told,
        )  # fmt: skip
    return table


def _changes_table(scores: Sequence[Scores]) -> Table:
    changes = _changes(scores)
    table = Table(
        title=f"the first {_SHOWN} of {len(changes)} rewards that differ" if len(changes) > _SHOWN else "what differs"
    )
    for column, justify in (
        ("step", "right"),
        ("reward", "left"),
        ("completion", "left"),
        ("saved", "right"),
        ("now", "right"),
    ):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for step, name, completion, old, new in changes[:_SHOWN]:
        table.add_row(str(step), escape(name), escape(f"{completion!r:.60}"), _number(old), _number(new))
    return table


def _changes(scores: Sequence[Scores]) -> list[tuple[int, str, Any, float, float]]:
    """(step, reward, completion, saved, now) wherever the two differ and the reward was saved."""
    return [
        (call.case.request.step, score.name, completion, recorded[score.name], new)
        for score in scores
        for call in score.calls
        for completion, recorded, new in zip(
            call.case.request.completions, call.case.recorded, call.values, strict=True
        )
        if score.name in recorded and _differ(recorded[score.name], new)
    ]


def _pairs(score: Scores) -> list[tuple[float, float]]:
    """(saved, now) of every completion for which the reward was saved; NaN for no value."""
    return [
        (recorded[score.name], new)
        for call in score.calls
        for recorded, new in zip(call.case.recorded, call.values, strict=True)
        if score.name in recorded
    ]


def _differ(old: float, new: float) -> bool:
    return not (math.isnan(old) and math.isnan(new)) and not math.isclose(old, new, rel_tol=1e-5, abs_tol=1e-6)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: float | None) -> str:
    return "none" if value is None or math.isnan(value) else f"{value:.4g}"
