"""`cluster/ray_scorer.py`: reward functions that work, fail, and misbehave, in real processes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from fakes import seen_by_watchdog, write_config

from rlx.cluster import reward_pool
from rlx.cluster.calls import call
from rlx.cluster.ray_scorer import RayScorer
from rlx.episode import Episode, Row
from rlx.errors import UserCodeError
from rlx.processes import LOG_BYTES, alive, descendants, start_of
from rlx.wire import GroupRequest, RewardOutcome, Sampling

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("runtime"), pytest.mark.asyncio(loop_scope="module")]
SECONDS = 300.0
"""For what takes a moment on an idle machine."""
WITHOUT_WATCHDOG_S = 1.0
"""The watchdog of a process ends what is left 2 s after it; nothing is to be left for it."""


def request(step: int = 0, n: int = 2) -> GroupRequest:
    return GroupRequest("key", "prompt", np.array([1], np.int32), n, Sampling(8), step=step)


def episode(text: str, status: str = "ok") -> Episode:
    row = Row(np.array([1], np.int32), np.zeros(1, np.float32), ((0, 1),))
    return Episode((row,), text, status=status)  # type: ignore[arg-type]


def episodes(*texts: str) -> list[Episode]:
    return [episode(text) for text in texts]


async def started(folder: Path, rewards: str, **settings: object) -> RayScorer:
    options = {"timeout": 30, "reward_failure_budget": 1, **settings}
    text = "rewards: {" + ", ".join(f"{key}: {value}" for key, value in options.items()) + "}"
    scorer = RayScorer(write_config(folder, text, rewards))
    await scorer.start()
    return scorer


async def score(scorer: RayScorer, *texts: str, step: int = 0) -> tuple[RewardOutcome, dict[str, float]]:
    outcomes, metrics = await scorer.score(request(step, len(texts)), episodes(*texts))
    return outcomes[-1], metrics


async def comes_true(condition: Callable[[], bool], seconds: float = SECONDS) -> bool:
    for _ in range(int(seconds / 0.02)):
        if condition():
            return True
        await asyncio.sleep(0.02)
    return False


def gone(*pids: float) -> Callable[[], bool]:
    return lambda: all(start_of(int(pid)) is None for pid in pids)


def floats(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


# --- scoring --------------------------------------------------------------------------------------------------------


async def test_every_function_scores_the_group_in_the_main_thread_of_its_own_process(tmp_path):
    scorer = await started(tmp_path, "reward_functions.length, reward_functions.in_main_thread")
    outcomes, metrics = await scorer.score(request(), episodes("a", "bcd"))
    assert [outcome.name for outcome in outcomes] == ["reward_functions.length", "reward_functions.in_main_thread"]
    assert [outcome.values.tolist() for outcome in outcomes] == [[1.0, 3.0], [1.0, 1.0]]
    assert [outcome.process for outcome in outcomes] == [
        "rlx-reward-0-reward_functions.length", "rlx-reward-1-reward_functions.in_main_thread"
    ]  # fmt: skip
    assert all(abs(outcome.began_at - time.time()) < 3600 for outcome in outcomes)
    assert [metrics["pid"]] == scorer.functions[1].pids
    pids = [pid for function in scorer.functions for pid in function.pids]
    assert len({os.getpid(), *pids}) == 3
    await scorer.close()
    assert await comes_true(gone(*pids))


async def test_only_scorable_episodes_are_given_and_only_what_is_wrong_has_no_value(tmp_path):
    scorer = await started(tmp_path, "reward_functions.only_lengths")
    group = [episode("a"), episode("bb", "timeout"), episode("none"), episode("nan"), episode("cc", "truncated")]
    (outcome,), metrics = await scorer.score(request(n=5), group)
    assert floats(outcome.values) == [1, None, None, None, 2]
    assert outcome.extra == {"seen": ["a", None, "none", "nan", "cc"]}
    assert (outcome.outcome, outcome.failed) == ("invalid", 1)
    assert "returned nan for completion 2." in outcome.error
    assert metrics == {"given": 4}
    assert scorer.functions[0].budget.counts == {"invalid": 1}

    (outcome,), metrics = await scorer.score(request(), [episode("a", "aborted"), episode("b", "env_lost")])
    assert floats(outcome.values) == [None, None]
    assert (outcome.outcome, outcome.failed, metrics) == ("ok", 0, {})
    await scorer.close()


async def test_groups_are_scored_side_by_side_by_the_workers_of_a_function(tmp_path):
    scorer = await started(
        tmp_path, "reward_functions.meets", functions="{reward_functions.meets: {workers: 2, timeout: 60}}"
    )
    both = await asyncio.gather(*(score(scorer, "2", step=step) for step in range(2)))
    assert [outcome.outcome for outcome, _ in both] == ["ok", "ok"]
    assert both[0][0].values != both[1][0].values
    assert (tmp_path / "out/logs/rlx-reward-0-reward_functions.meets.1.log").exists()
    await scorer.close()


async def test_groups_wait_for_their_turn_are_scored_once_and_to_the_end_when_nobody_waits_for_them(
    tmp_path, monkeypatch
):
    scorer, deadlines = await started(tmp_path, "reward_functions.notes"), []

    async def counting(ref, who, timeout_s):
        deadlines.append(timeout_s)
        return await call(ref, who, timeout_s)

    monkeypatch.setattr(reward_pool, "call", counting)
    calls = [asyncio.create_task(score(scorer, "a", step=step)) for step in range(4)]
    notes = tmp_path / "notes"
    assert await comes_true(lambda: notes.exists() and notes.read_text() == "begins 0\n")
    assert len(deadlines) == 1, "those of the others do not run before their turn"
    calls[0].cancel()
    calls[2].cancel()
    (tmp_path / "goes-on").touch()
    assert [(await calls[step])[0].outcome for step in (1, 3)] == ["ok", "ok"]
    assert notes.read_text() == "".join(f"begins {step}\nends {step}\n" for step in range(4))
    await scorer.close()


async def test_an_async_function_scores_many_groups_at_once_each_with_its_deadline(tmp_path):
    scorer = await started(tmp_path, "reward_functions.side_by_side", timeout=60)
    (function,) = scorer.functions
    pids = function.pids
    meeting = [asyncio.create_task(score(scorer, "meets")) for _ in range(3)]
    assert await comes_true(lambda: function._processes[0].in_flight == 3)
    function._timeout_s = 3  # of those that are asked from here on
    assert (await score(scorer, "waits"))[0].outcome == "timeout"
    assert [(await call)[0].outcome for call in meeting] == ["ok"] * 3
    assert (await meeting[0])[1] == {"peak": 4}
    assert function.pids == pids

    blocking, beside = await asyncio.gather(score(scorer, "blocks"), score(scorer, "waits"))
    assert blocking[0].error.endswith("did not answer within 3 s (rewards.timeout); its process was killed.")
    assert beside[0].outcome == "timeout"
    function._timeout_s = 60
    assert (await score(scorer, "a"))[0].outcome == "ok"
    assert function.pids != pids
    assert await comes_true(gone(*pids))
    await scorer.close()


# --- failures -------------------------------------------------------------------------------------------------------


async def test_a_function_that_hangs_is_killed_and_replaced_while_the_others_go_on(tmp_path, monkeypatch):
    scorer = await started(
        tmp_path,
        "reward_functions.length, reward_functions.hangs_on_odd_steps",
        functions="{reward_functions.hangs_on_odd_steps: {workers: 2, timeout: 60}}",
    )
    function = scorer.functions[1]
    before, asked, others_are_scored = function.pids, [], asyncio.Event()

    async def call_it(ref, who, timeout_s):
        if who == function._who and not asked:
            asked.append(who)
            await others_are_scored.wait()
            timeout_s = 0.1
        return await call(ref, who, timeout_s)

    monkeypatch.setattr(reward_pool, "call", call_it)
    hanging = asyncio.create_task(scorer.score(request(step=1), episodes("a", "bb")))
    assert await comes_true(lambda: bool(asked))
    assert (await score(scorer, "a", step=2))[0].values == [1]

    others_are_scored.set()
    (length, outcome), _ = await hanging
    assert length.values.tolist() == [1, 2]
    assert (outcome.outcome, outcome.failed, floats(outcome.values)) == ("timeout", 2, [None, None])
    assert outcome.error == (
        "trl.reward_funcs[1] (reward_functions.hangs_on_odd_steps) did not answer within 60 s (rewards.timeout); "
        "its process was killed."
    )
    assert await comes_true(lambda: len(function.pids) == 2)
    assert len({*before, *function.pids}) == 3
    assert await comes_true(gone(*set(before) - set(function.pids)))
    assert function.budget.counts == {"timeout": 2}
    await scorer.close()


async def test_a_function_that_ends_its_process_crashes_and_the_next_group_waits_for_a_fresh_one(tmp_path, caplog):
    scorer = await started(tmp_path, "reward_functions.ends_its_process")
    (pid,) = scorer.functions[0].pids
    with caplog.at_level(logging.WARNING):
        outcome, _ = await score(scorer, "a", "b")
        again, _ = await score(scorer, "a", "b")
    assert (outcome.outcome, again.outcome, outcome.failed) == ("crash", "crash", 2)
    assert "trl.reward_funcs[0] (reward_functions.ends_its_process) died: " in outcome.error
    assert "A reward function must return, and must not end its process." in outcome.error
    assert [record.message for record in caplog.records if record.name.startswith("rlx.")] == [outcome.error]
    assert await comes_true(gone(pid))
    await scorer.close()


async def test_too_many_failures_stop_the_run_with_the_first_traceback(tmp_path):
    scorer = await started(tmp_path, "reward_functions.raises", reward_failure_budget=0.1)
    outcome, _ = await score(scorer, *"abcdefgh")
    assert (outcome.outcome, outcome.failed) == ("exception", 8)
    assert 'reward_functions.py", line' in outcome.error
    with pytest.raises(UserCodeError, match=r"(?s)failed for 16 of the last 16 completions \(16 exception\).*1 / 0"):
        await score(scorer, *"abcdefgh")
    outcome, _ = await score(scorer, "a")
    assert outcome.outcome == "exception", "the next run on this service begins to count anew"
    await scorer.close()


async def test_a_budget_of_nothing_stops_at_the_first_failure(tmp_path):
    scorer = await started(tmp_path, "reward_functions.only_lengths", reward_failure_budget=0)
    assert (await score(scorer, "none", "a"))[0].outcome == "ok"
    with pytest.raises(UserCodeError, match=r"returned nan for completion 1\."):
        await score(scorer, "a", "nan", "a")
    await scorer.close()


async def test_what_no_other_call_will_do_better_stops_the_run_at_once(tmp_path):
    scorer = await started(tmp_path, "reward_functions.wants_gold")
    with pytest.raises(UserCodeError, match="asks for 'gold'"):
        await score(scorer, "a")
    await scorer.close()


async def test_a_function_that_does_not_exist_is_named_at_the_start(tmp_path):
    with pytest.raises(UserCodeError, match=r"trl\.reward_funcs\[0\].*lenght"):
        await started(tmp_path, "reward_functions.lenght")


# --- what user code does to its process -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bad")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def bad(runtime, folder) -> AsyncIterator[RayScorer]:
    """One function that does what the completion says. Whatever it does, the next group is scored."""
    scorer = await started(folder, "reward_functions.misbehaves", timeout=60)
    yield scorer
    await scorer.close()


LOG = "out/logs/rlx-reward-0-reward_functions.misbehaves.log"


def family(scorer: RayScorer) -> set[int]:
    """Below the reward process, without its watchdog."""
    (pid,) = scorer.functions[0].pids
    found = set()
    for child, start in descendants(pid).items():
        with contextlib.suppress(OSError):  # it has just ended
            if b"watchdog" not in Path(f"/proc/{child}/cmdline").read_bytes() and alive(child, start):
                found.add(child)
    return found


async def test_a_child_that_comes_back_from_the_function_does_not_go_on(bad):
    outcome, metrics = await score(bad, "fork", "b")
    assert outcome.values.tolist() == [1, 1]
    assert [metrics["pid"]] == bad.functions[0].pids
    assert await comes_true(lambda: not family(bad))


async def test_an_alarm_ends_with_the_call(bad):
    pids = bad.functions[0].pids
    assert (await score(bad, "alarm"))[1]["is default"] == 0
    outcome, metrics = await score(bad, "outlives an alarm")
    assert (outcome.outcome, metrics["is default"]) == ("ok", 1)
    assert bad.functions[0].pids == pids


async def test_a_process_that_dies_of_its_alarm_has_crashed_and_detached_children_end_with_it(bad):
    _, metrics = await score(bad, "leaves children")
    await asyncio.to_thread(seen_by_watchdog, bad.functions[0].pids[0])
    outcome, _ = await score(bad, "dies of an alarm")
    assert outcome.outcome == "crash"
    assert (await score(bad, "nothing"))[0].outcome == "ok"
    assert await comes_true(gone(metrics["child"], metrics["detached"]))


async def test_a_call_that_blocks_in_c_and_its_children_are_killed(bad, monkeypatch):
    (pid,) = bad.functions[0].pids
    _, metrics = await score(bad, "leaves children")
    monkeypatch.setattr(bad.functions[0], "_timeout_s", 2.0)
    outcome, _ = await score(bad, "blocks in C")
    monkeypatch.undo()
    assert outcome.outcome == "timeout"
    assert (await score(bad, "nothing"))[1]["pid"] != pid
    assert await comes_true(gone(pid, metrics["child"], metrics["detached"]), WITHOUT_WATCHDOG_S)


async def test_children_of_a_process_that_ended_by_itself_are_killed(bad, folder):
    outcome, _ = await score(bad, "leaves children and exits")
    assert outcome.outcome == "crash"
    child = int((folder / "child").read_text())
    assert (await score(bad, "nothing"))[0].outcome == "ok"
    assert await comes_true(gone(child), WITHOUT_WATCHDOG_S)


async def test_an_allocation_beyond_the_limit_is_a_memory_error(bad):
    pids = bad.functions[0].pids
    outcome, _ = await score(bad, "10 GB")
    assert outcome.outcome == "exception"
    assert "raised MemoryError.\n" in outcome.error
    assert (await score(bad, "nothing"))[0].outcome == "ok"
    assert bad.functions[0].pids == pids


async def test_what_is_printed_goes_to_a_log_that_stays_short(bad, folder, capfd):
    assert (await score(bad, "100 MB"))[0].outcome == "ok"
    log = folder / LOG
    assert 2**20 < log.stat().st_size <= LOG_BYTES
    text = log.read_bytes()
    assert text.startswith(b"[earlier output was removed]\n")
    assert text.endswith(b"x\nfrom a child\n")
    assert "x" * 100 not in "".join(capfd.readouterr())


async def test_the_log_of_a_call_that_prints_without_end_stays_short_too(bad, folder, monkeypatch):
    monkeypatch.setattr(bad.functions[0], "_timeout_s", 3.0)
    assert (await score(bad, "prints without end"))[0].outcome == "timeout"
    monkeypatch.undo()
    assert (await score(bad, "nothing"))[0].outcome == "ok"
    assert (folder / LOG).stat().st_size <= LOG_BYTES
