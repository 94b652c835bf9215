"""What the service counts of finished groups, for its metrics: sums since it started."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from rlx.episode import Episode, Status
from rlx.wire import RewardOutcome


class GroupStatistics:
    """Times are in seconds. Of reward functions what their calls took, of a whole group its wait for a process, too."""

    def __init__(self) -> None:
        self.generation_s = self.scoring_s = 0.0
        self.episodes: Counter[str] = Counter(dict.fromkeys(get_args(Status), 0))
        """By status"""
        self.turns = self.retries = 0
        self.calls: Counter[tuple[str, str]] = Counter()
        """By reward function and outcome"""
        self.call_s: dict[str, float] = {}
        self.failed_completions: Counter[str] = Counter()

    def add(
        self, episodes: Sequence[Episode], rewards: Sequence[RewardOutcome], generation_s: float, scoring_s: float
    ) -> None:
        """Count one scored group."""
        self.generation_s += generation_s
        self.scoring_s += scoring_s
        for episode in episodes:
            self.episodes[episode.status] += 1
            self.turns += episode.turns
            self.retries += episode.attempts - 1
        for reward in rewards:
            self.calls[reward.name, reward.outcome] += 1
            self.call_s[reward.name] = self.call_s.get(reward.name, 0.0) + reward.seconds
            self.failed_completions[reward.name] += reward.failed
