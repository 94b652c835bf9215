"""The processes of a reward function: what ends one, and how it is replaced."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import write_config

from rlx.cluster import reward_pool
from rlx.cluster.reward_pool import RewardPool, _Process
from rlx.errors import DeadlineExceeded, ServiceUnavailable, UserCodeError
from rlx.processes import start_of
from rlx.rewards.scoring import ScoreRequest
from rlx.wire import RewardOutcome


@pytest.fixture
def group_leader() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("is_another", [True, False])
def test_a_process_that_got_the_number_of_one_that_died_is_left_alone(
    tmp_path: Path, group_leader: subprocess.Popen[bytes], is_another: bool
) -> None:
    lost = _Process(0, "lost", tmp_path)
    lost.actor.runs_as(group_leader.pid)
    assert lost.actor.start == start_of(group_leader.pid)
    lost.actor.start -= is_another
    lost.kill()
    if is_another:
        assert group_leader.poll() is None
    else:
        assert group_leader.wait(60) == -9


GROUP = ScoreRequest("p", ["a", "b"], [[1], [2]])


class Pool(RewardPool):
    """Its processes are made up: `starts` are the errors of the next ones, None where one starts."""

    def __init__(self, folder: Path, *starts: Exception | None):
        super().__init__("reward_functions.length", 0, write_config(folder, "rewards: {timeout: 30}"))
        self.starts, self.killed = list(starts), 0
        self.answers: list[Any] = []
        self.asked: list[ScoreRequest] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def _new_process(self, number: int) -> Any:
        await asyncio.sleep(0)
        if (error := self.starts.pop(0)) is not None:
            raise error
        pool = self

        class Process(SimpleNamespace):
            def kill(self) -> None:
                pool.killed += 1

        return Process(number=number, in_flight=0, blocked=False, log="log", actor=SimpleNamespace(label="p", pid=0))

    async def _call(self, process: Any, group: ScoreRequest) -> Any:
        self.asked.append(group)
        await self.gate.wait()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return RewardOutcome("f", np.asarray(answer, np.float32), 0.1), {}


async def test_a_process_that_dies_while_it_replaces_another_is_replaced_too(tmp_path: Path) -> None:
    pool = Pool(tmp_path, None, UserCodeError("it died, while it was imported"), None)
    await pool.start()
    pool.answers = [ServiceUnavailable("it died"), [1.0, 2.0]]
    async with asyncio.timeout(60):
        first, second = await asyncio.gather(pool.score(GROUP), pool.score(GROUP))
    assert (first[0].outcome, first[0].failed) == ("crash", 2)
    assert (second[0].outcome, second[0].values.tolist()) == ("ok", [1.0, 2.0])
    assert pool.killed == 1
    await pool.close()


async def test_who_waits_longest_for_a_process_is_next_whoever_comes_meanwhile(tmp_path: Path) -> None:
    pool = Pool(tmp_path, None)
    await pool.start()
    pool.answers = [[0.0, 0.0]] * 3
    groups = [replace(GROUP, step=step) for step in range(3)]
    pool.gate.clear()
    calls = [asyncio.create_task(pool.score(group)) for group in groups[:2]]
    for _ in range(5):
        await asyncio.sleep(0)
    calls.append(asyncio.create_task(pool.score(groups[2])))
    pool.gate.set()
    await asyncio.gather(*calls)
    assert [group.step for group in pool.asked] == [0, 1, 2]
    await pool.close()


async def test_a_process_that_cannot_be_replaced_is_told_to_all_who_wait_for_it(tmp_path: Path) -> None:
    pool = Pool(tmp_path, None, *[UserCodeError("it died, while it was imported")] * reward_pool._STARTS)
    await pool.start()
    pool.answers = [DeadlineExceeded("it did not answer")]
    async with asyncio.timeout(60):
        first, *others = await asyncio.gather(*[pool.score(GROUP) for _ in range(3)], return_exceptions=True)
    assert not isinstance(first, BaseException)
    assert first[0].outcome == "timeout"
    assert [str(other) for other in others] == ["it died, while it was imported"] * 2
    await pool.close()


async def test_a_pool_that_is_closed_while_a_process_is_replaced_leaves_none(tmp_path: Path) -> None:
    pool = Pool(tmp_path, None, None)
    await pool.start()
    pool.answers = [ServiceUnavailable("it died")]
    await pool.score(GROUP)
    await pool.close()
    assert (pool.pids, pool._num_starting) == ([], 0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
