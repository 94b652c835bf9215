from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import numpy as np
import pytest
from fakes import write_config

from rlx.cluster.ray_scorer import RayScorer
from rlx.errors import DeadlineExceeded, UserCodeError
from rlx.processes import descendants
from rlx.wire import Completion, GroupRequest, Sampling

pytestmark = pytest.mark.usefixtures("runtime")


def request(step: int = 0) -> GroupRequest:
    return GroupRequest("key", "prompt", np.array([1], np.int32), 2, Sampling(8), step=step)


def completions(*texts: str) -> list[Completion]:
    return [Completion(np.array([1], np.int32), np.zeros(1, np.float32), ((0, 1),), "stop", text) for text in texts]


async def started(folder: Path, rewards: str, timeout_s: float = 30) -> RayScorer:
    scorer = RayScorer(write_config(folder, f"rewards: {{timeout: {timeout_s}}}", rewards))
    await scorer.start()
    return scorer


async def test_every_function_scores_the_group_in_the_main_thread_of_its_own_process(tmp_path):
    scorer = await started(tmp_path, "reward_functions.length, reward_functions.in_main_thread")
    outcomes, metrics = await scorer.score(request(), completions("a", "bcd"))
    assert [outcome.name for outcome in outcomes] == ["reward_functions.length", "reward_functions.in_main_thread"]
    assert [outcome.values.tolist() for outcome in outcomes] == [[1.0, 3.0], [1.0, 1.0]]
    assert metrics == {"pid": scorer.functions[1].pid}
    assert len({os.getpid(), *(function.pid for function in scorer.functions)}) == 3
    await scorer.close()


async def test_a_function_that_hangs_is_named_killed_and_replaced(tmp_path):
    scorer = await started(tmp_path, "reward_functions.length, reward_functions.hangs_on_odd_steps", timeout_s=1)
    pid, start = scorer.functions[1].pid, time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        await scorer.score(request(step=1), completions("a", "b"))
    assert str(caught.value) == (
        "trl.reward_funcs[1] (reward_functions.hangs_on_odd_steps) did not answer within 1 s (rewards.timeout); "
        "its process was killed"
    )
    assert time.monotonic() - start < 10
    assert pid not in descendants(1)
    outcomes, _ = await scorer.score(request(step=2), completions("a", "b"))
    assert outcomes[1].values.tolist() == [1.0, 1.0]
    assert scorer.functions[1].pid != pid
    await scorer.close()


async def test_waiting_for_other_groups_does_not_count_against_the_deadline(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\ndef half(completions, **_):\n    time.sleep(0.5)\n    return [0, 0]\n"
    )
    scorer = await started(tmp_path, "slow.half", timeout_s=1.5)
    answers = await asyncio.gather(*(scorer.score(request(), completions("a", "b")) for _ in range(5)))
    assert len(answers) == 5
    await scorer.close()


async def test_a_function_that_ends_its_process_is_the_users_error_and_is_replaced(tmp_path):
    scorer = await started(tmp_path, "reward_functions.ends_its_process")
    pid = scorer.functions[0].pid
    with pytest.raises(UserCodeError, match=r"trl\.reward_funcs\[0\] \(reward_functions\.ends_its_process\) died"):
        await scorer.score(request(), completions("a", "b"))
    assert scorer.functions[0].pid != pid
    await scorer.close()


async def test_what_the_function_raises_surfaces_with_its_traceback(tmp_path):
    scorer = await started(tmp_path, "reward_functions.raises")
    with pytest.raises(UserCodeError, match=r"(?s)trl\.reward_funcs\[0\].*reward_functions\.py.*1 / 0"):
        await scorer.score(request(), completions("a", "b"))
    await scorer.close()


async def test_a_function_that_does_not_exist_is_named_at_the_start(tmp_path):
    with pytest.raises(UserCodeError, match=r"trl\.reward_funcs\[0\].*lenght"):
        await started(tmp_path, "reward_functions.lenght")
