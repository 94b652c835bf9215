"""What goes wrong in rollouts is told once, with its cause."""

from __future__ import annotations

import io

import numpy as np
from rich.console import Console

from rlx.episode import Episode, Row
from rlx.learner.watch.progress import FailureNotes
from rlx.wire import GroupResult, RewardOutcome

ROW = Row(np.array([1], np.int32), np.array([-0.5], np.float32), ((1, 1),))


def group(*episodes: Episode, outcome: str = "ok") -> GroupResult:
    values = np.zeros(len(episodes), np.float32)
    reward = RewardOutcome("m.r", values, 0.1, outcome=outcome, failed=2, error="Traceback [1/0]")
    return GroupResult("k", episodes, (reward,), "w", 0.1, 0.1)


def test_each_kind_of_failure_is_told_once_with_its_first_cause() -> None:
    out = io.StringIO()
    notes = FailureNotes(Console(file=out, width=80))
    ok, lost = Episode((ROW,), "a"), Episode((), "", "env_lost", error="env 'e' died")
    notes.look([group(ok, ok)])
    assert out.getvalue() == ""
    for _ in range(2):
        notes.look([group(ok, lost, outcome="exception"), group(Episode((ROW,), "a", exact=False))])
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("note: m.r: exception; 2 completions have no reward")
    assert lines[0].endswith("Traceback [1/0]")
    assert lines[1].startswith("note: episode env_lost")
    assert lines[1].endswith("env 'e' died")
    assert lines[2].startswith("note: episode not exact")
