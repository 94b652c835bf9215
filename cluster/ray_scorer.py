"""Every reward function on whole groups, in processes that can be killed: `rlx.rollout.group_runner.Scorer` over Ray."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np

from rlx.cluster.calls import all_or_first_error
from rlx.cluster.reward_pool import RewardPool
from rlx.config import Config
from rlx.episode import Episode
from rlx.rewards.scoring import ScoreRequest, no_values
from rlx.wire import GroupRequest, RewardOutcome


class RayScorer:
    """The functions score side by side. `of`: whose processes they are, where several scorers run side by side."""

    def __init__(self, config: Config, of: str = ""):
        self.functions = [RewardPool(name, index, config, of) for index, name in enumerate(config.trl.reward_funcs)]

    async def start(self) -> None:
        await all_or_first_error([function.start() for function in self.functions])

    async def score(
        self, request: GroupRequest, episodes: list[Episode]
    ) -> tuple[list[RewardOutcome], dict[str, float]]:
        given = [index for index, episode in enumerate(episodes) if episode.scorable]
        if not given:
            return [no_values(function.name, len(episodes)) for function in self.functions], {}
        group = ScoreRequest.of(request, [episodes[index] for index in given])
        answers = await all_or_first_error([function.score(group) for function in self.functions])
        metrics = {name: value for _, logged in answers for name, value in logged.items()}
        return [_scatter(outcome, given, len(episodes)) for outcome, _ in answers], metrics

    async def close(self) -> None:
        await asyncio.gather(*(function.close() for function in self.functions))


def _scatter(outcome: RewardOutcome, given: list[int], num_episodes: int) -> RewardOutcome:
    """The outcome of the episodes `given` as one of all: no value for the others."""
    values = np.full(num_episodes, np.nan, dtype=np.float32)
    values[given] = outcome.values
    extra: dict[str, list[Any]] = {}
    for name, column in outcome.extra.items():
        by_index = dict(zip(given, column, strict=True))
        extra[name] = [by_index.get(index) for index in range(num_episodes)]
    return replace(outcome, values=values, extra=extra)
