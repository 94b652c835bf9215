"""The Ray actor of one reward function, `rlx-reward-0-NAME`: the user's code in the main thread of a process of its own.

What the function prints goes to the terminal of the service.
"""

from __future__ import annotations

import os

from rlx.rewards.scoring import RewardWorker, ScoreRequest
from rlx.wire import RewardOutcome


class RewardActor:
    """Scores one group at a time. `ray_scorer.RayScorer` is its other end."""

    _label = "rlx-reward"  # for Ray's messages about an actor that could not be made

    def __init__(self, label: str):
        self._label = label
        self._worker: RewardWorker | None = None

    def __repr__(self) -> str:
        return self._label

    def load(self, name: str, index: int, base_dir: str) -> int:
        """Import the function; UserCodeError when that fails. Returns the process id."""
        self._worker = RewardWorker(name, index, base_dir)
        return os.getpid()

    def score(self, request: ScoreRequest) -> tuple[RewardOutcome, dict[str, float]]:
        """The outcome, and what the function logged with `log_metric`."""
        assert self._worker is not None, "`load` comes first"
        return self._worker.score(request), self._worker.metrics
