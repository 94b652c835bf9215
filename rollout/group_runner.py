"""One group from request to scored result, on whichever worker it is given; without HTTP and without a fleet."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np

from rlx.episode import Episode
from rlx.errors import ServiceUnavailable
from rlx.rollout.deadline import deadline
from rlx.rollout.fleet import Member
from rlx.rollout.statistics import GroupStatistics
from rlx.rollout.worker import Worker
from rlx.wire import GroupRequest, GroupResult, GroupTimes, RewardOutcome

EPISODE_REWARD = "episode"
"""The name of the column of rewards that the episodes themselves give."""
MAX_WORKERS_LOST = 3
REWARDS, EPISODES = "the reward functions", "the rollout function"
Assign = Callable[[GroupRequest], Awaitable[AbstractContextManager[Member]]]
"""Waits for a worker and holds it while its context is open."""


class Episodes(Protocol):
    """Makes the episodes of a group: one plain reply each, or what a rollout function and its environments do."""

    own_reward: bool
    """Whether episodes may bring a reward of their own, which becomes one more column of rewards, `episode`."""

    async def start(self) -> None:
        """Load the user's function and reach its environments; UserCodeError or ConfigError with the key."""

    async def run(self, worker: Worker, request: GroupRequest) -> list[Episode]:
        """`request.num_generations` episodes on `worker`. What goes wrong within an episode is its status; raises
        ServiceError when the worker breaks its contract, UserCodeError when too many episodes fail."""

    async def close(self) -> None: ...


class Scorer(Protocol):
    """Runs every reward function on one whole group, once."""

    async def start(self) -> None:
        """Resolve and load every reward function; UserCodeError with the config key when one does not load."""

    async def score(
        self, request: GroupRequest, episodes: list[Episode]
    ) -> tuple[list[RewardOutcome], dict[str, float]]:
        """Outcomes in the order of `trl.reward_funcs`, and what the functions logged with `log_metric`.

        Only the scorable episodes are given to the functions; the others get NaN. A function that fails gives NaN
        and says so in its outcome; UserCodeError with the first traceback once it failed too often
        (`rewards.reward_failure_budget`).
        """

    async def close(self) -> None: ...


class GroupRunner:
    """Runs groups. `group_timeout`: seconds that one may take at most, whatever its request says; `describe` says why
    there is no worker, for the message of a group whose deadline passed meanwhile."""

    def __init__(
        self,
        episodes: Episodes,
        scorer: Scorer,
        group_timeout: float = 600.0,
        describe: Callable[[], str] = lambda: "",
    ):
        self._episodes, self._scorer = episodes, scorer
        self._group_timeout, self._describe = group_timeout, describe
        self.statistics = GroupStatistics()

    async def run(self, worker: Worker, request: GroupRequest) -> GroupResult:
        """The scored group, on this worker or not at all."""

        async def here(_: GroupRequest) -> AbstractContextManager[Member]:
            return nullcontext(Member(worker))

        return await self.run_on(here, request, max_lost=1)

    async def run_on(self, assign: Assign, request: GroupRequest, max_lost: int = MAX_WORKERS_LOST) -> GroupResult:
        """The scored group. When its worker is lost it is generated anew, whole, on the next that `assign` gives;
        `max_lost` workers at most, within the one deadline of the group."""
        seconds = min(request.deadline_s, self._group_timeout)
        waiting_for, received = "", time.time()

        def message() -> str:
            who = waiting_for or f"a worker ({self._describe()})"
            return f"group {request.key!r}: {who} did not answer within the {seconds:g} s of the group"

        async with deadline(seconds, message):
            lost: list[str] = []
            while True:
                worker, waiting_for = "", ""
                try:
                    with await assign(request) as member:
                        worker, start, placed = member.name, time.monotonic(), time.time()
                        waiting_for = f"worker {worker}"
                        episodes = await self._episodes.run(member.worker, request)
                    break
                except ServiceUnavailable as error:
                    if not worker or len(lost) + 1 >= max_lost:
                        raise _with_earlier(error, lost) from error
                    lost.append(str(error))
            generated = time.monotonic()
            waiting_for = f"{REWARDS} (trl.reward_funcs)"
            rewards, metrics = await self._scorer.score(request, episodes)
        generation_s, reward_s = generated - start, time.monotonic() - generated
        self.statistics.add(episodes, rewards, generation_s, reward_s)
        if self._episodes.own_reward:
            rewards.append(_own_rewards(episodes))
        return GroupResult(
            key=request.key,
            episodes=tuple(episodes),
            rewards=tuple(rewards),
            worker=worker,
            generation_s=generation_s,
            reward_s=reward_s,
            metrics=metrics,
            times=_times(received, placed, generation_s, reward_s),
        )


def _times(received: float, placed: float, generation_s: float, reward_s: float) -> GroupTimes:
    """Durations are of the monotonic clock, so that a clock that is set meanwhile turns nothing around."""
    generated = placed + generation_s
    return GroupTimes(*(round(at, 4) for at in (received, max(received, placed), generated, generated + reward_s)))


def _with_earlier(error: ServiceUnavailable, lost: list[str]) -> ServiceUnavailable:
    earlier = f"; before that: {'; '.join(lost)}" if lost else ""
    return ServiceUnavailable(f"{error}{earlier}")


def _own_rewards(episodes: list[Episode]) -> RewardOutcome:
    """The rewards that the episodes gave themselves; an episode that failed has none."""
    values = [e.reward if e.scorable and e.reward is not None else np.nan for e in episodes]
    return RewardOutcome(EPISODE_REWARD, np.array(values, dtype=np.float32), 0.0)
