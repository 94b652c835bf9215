"""Every reward function on whole groups, each in a process that can be killed: `rlx.rollout.worker.Scorer` over Ray."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlx.cluster.calls import call, create
from rlx.cluster.reward_actor import RewardActor
from rlx.config import Config
from rlx.episode import Episode
from rlx.errors import DeadlineExceeded, ServiceUnavailable, UserCodeError
from rlx.rewards.scoring import ScoreRequest
from rlx.wire import GroupRequest, RewardOutcome

LOAD_TIMEOUT_S = 120.0
_Answer = tuple[RewardOutcome, dict[str, float]]


class RayScorer:
    """The functions score side by side, each one group after the other.

    Their processes run on the gateway's node, where the folder of the YAML is: nothing has to be shipped to a
    cluster, and a function finds the files next to it.
    """

    def __init__(self, config: Config):
        self.functions = [_RewardProcess(name, index, config) for index, name in enumerate(config.trl.reward_funcs)]

    async def start(self) -> None:
        await _all_or_first_error([function.start() for function in self.functions])

    async def score(
        self, request: GroupRequest, episodes: list[Episode]
    ) -> tuple[list[RewardOutcome], dict[str, float]]:
        group = ScoreRequest.of(request, episodes)
        answers = await _all_or_first_error([function.score(group) for function in self.functions])
        metrics = {name: value for _, logged in answers for name, value in logged.items()}
        return [outcome for outcome, _ in answers], metrics

    async def close(self) -> None:
        for function in self.functions:
            function.close()


class _RewardProcess:
    """Entry `index` of `trl.reward_funcs`. The process is replaced when it hangs or dies."""

    def __init__(self, name: str, index: int, config: Config):
        self.pid = 0
        self._name = name
        self._index = index
        self._base_dir = str(config.base_dir)
        self._timeout_s = config.rewards.timeout
        self._who = f"trl.reward_funcs[{index}] ({name})"
        self._label = f"rlx-reward-{index}-{name}"
        self._turn = asyncio.Lock()
        self._actor: Any = None
        self._running: set[asyncio.Task[_Answer]] = set()

    async def start(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # No CPU is asked of Ray: the engines may have reserved all of them.
        self._actor = await create(RewardActor, self._label, self._label, num_cpus=0, scheduling_strategy=here)
        loading = self._actor.load.remote(self._name, self._index, self._base_dir)
        try:
            self.pid = await call(loading, self._who, LOAD_TIMEOUT_S)
        except ServiceUnavailable as error:
            raise UserCodeError(f"{error}, while it was imported") from None
        except DeadlineExceeded:
            self._kill()
            raise DeadlineExceeded(f"{self._who} was not imported within {LOAD_TIMEOUT_S:g} s") from None

    async def score(self, group: ScoreRequest) -> _Answer:
        """The deadline counts from the function's turn. A caller that goes away leaves the call to its end: the
        next group must not pay for it."""
        task = asyncio.create_task(self._score(group))
        self._running.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def close(self) -> None:
        for task in self._running:
            task.cancel()
        self._kill()

    async def _score(self, group: ScoreRequest) -> _Answer:
        async with self._turn:
            if self._actor is None:
                await self.start()
            try:
                return await call(self._actor.score.remote(group), self._who, self._timeout_s)
            except DeadlineExceeded:
                self._kill()
                await self.start()
                raise DeadlineExceeded(
                    f"{self._who} did not answer within {self._timeout_s:g} s (rewards.timeout); its process was killed"
                ) from None
            except ServiceUnavailable as error:
                self._kill()
                await self.start()
                raise UserCodeError(f"{error}. A reward function must return, and must not end its process.") from None

    def _done(self, task: asyncio.Task[_Answer]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # seen, also when the caller went away

    def _kill(self) -> None:
        actor, self._actor = self._actor, None
        if actor is not None:
            ray.kill(actor)


async def _all_or_first_error(parts: list[Any]) -> list[Any]:
    """Results in order; with the first error the others are cancelled."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
