"""Workers that die, hang and lie: who is restarted, from what it catches up, when it serves, and who stays out."""

from __future__ import annotations

import asyncio
import re
import tempfile
from pathlib import Path

import pytest
from faulty_workers import LATE_S, START_S, FaultyWorker, content, crew, manifest_of, pieces, virtually
from hypothesis import given, settings
from hypothesis import strategies as st

from rlx.errors import DeadlineExceeded, ParityError, RlxError, ServiceUnavailable, WeightSyncError
from rlx.rollout import weights_store


@pytest.fixture(autouse=True)
def own_memory(monkeypatch):
    with tempfile.TemporaryDirectory(dir=weights_store.SHARED_MEMORY) as folder:
        monkeypatch.setattr(weights_store, "SHARED_MEMORY", Path(folder))
        yield
        assert list(Path(folder).iterdir()) == [], "an update's file was left behind"


def pair():
    return FaultyWorker("good"), FaultyWorker("bad")


# --- a worker dies, one at a time ---


def test_a_worker_killed_idle_is_restarted_caught_up_and_verified_before_it_serves():
    async def main():
        good, bad = pair()
        async with crew(good, bad) as c:
            await c.publish(3)
            bad.dead = "killed"
            await c.until("good")
            await c.until("good", "bad", version=3)
            assert (bad.process, bad.version, bad.data, bad.verified) == (2, 3, content(3), 3)
            assert c.events == [
                "bad: down: worker bad died: killed",
                "bad: restarting, 1 of 3",
                "bad: ready with weights 3, log p is off by 0 nats in the mean",
            ]

    virtually(main())


def test_a_worker_killed_mid_generation_is_named_and_comes_back():
    async def main():
        good, bad = pair()
        async with crew(good, bad) as c:
            member = c.fleet.members[1]
            bad.faults["generate"] = ["die"]
            with pytest.raises(ServiceUnavailable, match="bad died: killed in generate"), c.fleet.charging(member, 4):
                await bad.generate("g", None, 4, None)
            assert (member.state, member.in_flight) == ("down", 0)
            await c.until("good", "bad")
            assert member.cause == ""

    virtually(main())


def test_a_worker_killed_mid_transfer_does_not_stop_the_update():
    async def main():
        good, bad = pair()
        async with crew(good, bad) as c:
            await c.weights.announce(manifest_of(1))

            async def with_a_murder():
                yield content(1)[:50]
                bad.dead = "killed"
                c.fleet.mark_down(c.fleet.members[1], "killed")
                yield content(1)[50:]

            await c.weights.receive(1, with_a_murder())
            outcome = await c.weights.commit(1)
            assert outcome.workers["good"] == 1
            assert [late["name"] for late in outcome.behind] == ["bad"]
            await c.until("good", "bad", version=1)

    virtually(main())


def test_a_worker_that_came_back_between_announce_and_commit_takes_the_update_too():
    async def main():
        good, bad = pair()
        async with crew(good, bad) as c:
            await c.weights.announce(manifest_of(1))
            c.fleet.mark_down(c.fleet.members[1], "killed")
            await c.weights.receive(1, pieces(content(1)))
            await c.until("good", "bad")
            outcome = await c.weights.commit(1)
            assert (outcome.workers, outcome.behind) == ({"good": 1, "bad": 1}, [])
            assert bad.calls.count("announce") == 2

    virtually(main())


@pytest.mark.parametrize("publish", ["together", "rolling"])
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("die", "bad died: killed in commit"),
        ("hang", "worker bad did not answer within 120 s"),
        ("late", "worker bad did not answer within 120 s"),
        ("refuse", "commit is refused"),
        ("other_bytes", "it loaded bytes with the fingerprint"),
        ("bug", "worker bad: KeyError: 'commit'"),
    ],
)
def test_a_worker_that_fails_in_the_swap_is_quarantined_named_and_comes_back_verified(fault, cause, publish):
    async def main():
        good, bad = pair()
        async with crew(good, bad, publish=publish) as c:
            bad.faults["commit"] = [fault]
            outcome = await c.publish(1)
            assert outcome.workers == {"good": 1, "bad": 0}
            [late] = outcome.behind
            assert late["name"] == "bad"
            assert "did not take weights 1" in late["cause"]
            assert cause in late["cause"]
            assert c.ready() == ["good"]
            await c.until("good", "bad", version=1)
            await asyncio.sleep(2 * LATE_S)
            assert (bad.version, bad.data, bad.verified) == (1, content(1), 1)
            assert c.ready() == ["good", "bad"]

    virtually(main())


def test_a_worker_that_cannot_take_what_the_others_can_is_restarted_and_the_update_goes_on():
    async def main():
        good, bad = pair()
        async with crew(good, bad) as c:
            bad.faults["announce"] = ["refuse"]
            outcome = await c.publish(1)
            assert outcome.behind == [{"name": "bad", "cause": "cannot take weights 1: announce is refused"}]
            await c.until("good", "bad", version=1)

    virtually(main())


# --- probes ---


async def probe_hangs(c, worker):
    worker.faults["generate"] = ["hang"]
    while worker.faults["generate"]:  # noqa: ASYNC110 - on a clock that jumps
        await asyncio.sleep(0.5)


def test_a_worker_that_is_asked_for_a_token_and_gives_none_is_restarted():
    async def main():
        good, bad = pair()
        async with crew(good, bad) as c:
            await probe_hangs(c, bad)
            await c.until("good")
            assert c.fleet.members[1].cause == "worker bad generated no token within 60 s"
            await c.until("good", "bad")
            assert bad.process == 2

    virtually(main())


def test_a_probe_that_met_an_update_does_not_count():
    async def main():
        good, bad = pair()
        async with crew(good, bad) as c:
            await probe_hangs(c, bad)
            await c.publish(1)
            await asyncio.sleep(300)
            assert (c.ready(), bad.process) == (["good", "bad"], 1)

    virtually(main())


def test_nobody_is_asked_for_a_token_while_generation_pauses():
    async def main():
        worker = FaultyWorker()
        async with crew(worker, publish_timeout=2 * LATE_S) as c:
            worker.faults["commit"] = ["late"]
            task = asyncio.create_task(c.publish(1))
            await asyncio.sleep(LATE_S / 10)
            asked = worker.calls.count("generate")
            await asyncio.sleep(LATE_S / 2)
            assert worker.calls.count("generate") == asked
            await task
            await asyncio.sleep(100)
            assert worker.calls.count("generate") > asked

    virtually(main())


# --- restarts that fail ---


@pytest.mark.parametrize(
    ("method", "fault", "last"),
    [
        ("start", "refuse", "it did not start: start is refused"),
        ("start", "hang", "it did not start: worker bad did not start within 300 s"),
        ("start", "die", "it did not start: worker bad died: killed in start"),
        ("announce", "refuse", "it did not come back to weights 1: announce is refused"),
        ("commit", "hang", "it did not come back to weights 1: worker bad did not answer within 120 s"),
        ("commit", "other_bytes", "it did not come back to weights 1: it loaded bytes with the fingerprint"),
        ("commit", "skew", "it did not come back to weights 1: worker bad does not compute what the learner computes"),
        ("prompt_logprobs", "hang", "it did not come back to weights 1: worker bad did not answer within 120 s"),
    ],
)
def test_a_restart_that_fails_is_repeated_and_after_the_last_one_it_stays_out_with_first_and_last_cause(
    method, fault, last
):
    async def main():
        good, bad = pair()
        async with crew(good, bad) as c:
            await c.publish(1)
            bad.faults[method] = [fault] * 3
            bad.dead = "out of memory"
            while c.states()[1] != "gone":
                assert c.ready() in (["good"], ["good", "bad"])
                await asyncio.sleep(1)
            assert bad.process == 1 + 3
            cause = c.fleet.members[1].cause
            assert cause.startswith("worker bad died: out of memory; restarted 3 times, the last time: ")
            assert last in cause
            assert c.events[-1] == f"bad: given up after 3 restarts: {cause}"
            await asyncio.sleep(10_000)
            assert bad.process == 1 + 3
            assert (await c.publish(2)).behind == []
            assert c.ready() == ["good"]

    virtually(main())


def test_a_restart_that_fails_once_is_followed_by_one_that_succeeds():
    async def main():
        good, bad = pair()
        async with crew(good, bad) as c:
            await c.publish(1)
            bad.faults["commit"] = ["skew"]
            bad.dead = "killed"
            await c.until("good")
            await c.until("good", "bad", version=1)
            assert (bad.process, bad.skew) == (3, 0.0)

    virtually(main())


def test_restarts_count_in_a_row_and_an_answer_ends_the_row():
    async def main():
        good, bad = pair()
        async with crew(good, bad, max_restarts=2) as c:
            member = c.fleet.members[1]
            for _ in range(5):
                bad.dead = "killed"
                await c.until("good")
                await c.until("good", "bad")
                with c.fleet.charging(member, 1):
                    await bad.generate("g", None, 1, None)
            for _ in range(2):
                bad.dead = "killed"
                await c.until("good")
                await c.until("good", "bad")
            bad.dead = "killed"
            await c.until("good")
            await asyncio.sleep(100)
            assert member.state == "gone"

    virtually(main())


def test_a_worker_without_devices_waits_for_them_however_long_and_that_is_no_restart():
    async def main():
        good, bad = pair()
        async with crew(good, bad, max_restarts=1) as c:
            await c.publish(1)
            bad.faults["start"] = ["no devices"] * 50
            c.fleet.mark_down(c.fleet.members[1], "its node died")
            await asyncio.sleep(40 * START_S)
            assert (c.states(), c.fleet.members[1].restarts) == (["ready", "restarting"], 1)
            assert c.fleet.members[1].explanation == "its node died"
            await c.until("good", "bad", version=1)
            assert (bad.process, bad.verified) == (52, 1)

    virtually(main())


def test_without_restarts_a_dead_worker_stays_out_at_once():
    async def main():
        good, bad = pair()
        async with crew(good, bad, max_restarts=0) as c:
            bad.dead = "killed"
            await c.until("good")
            await asyncio.sleep(10)
            assert (bad.process, c.fleet.members[1].cause) == (1, "worker bad died: killed")

    virtually(main())


def test_waiting_for_a_worker_ends_at_once_when_none_can_come_back():
    async def main():
        worker = FaultyWorker()
        async with crew(worker) as c:
            worker.faults["start"] = ["refuse"] * 3
            c.fleet.mark_down(c.fleet.members[0], "killed")
            with pytest.raises(ServiceUnavailable, match=r"none comes back: w-0 is gone \(killed; restarted 3 times"):
                await c.fleet.wait_ready()
            with pytest.raises(ServiceUnavailable, match="w-0 is gone"):
                await c.publish(1)

    virtually(main())


# --- when nobody took an update ---


def test_a_commit_that_nobody_took_waits_for_the_supervisor_to_bring_one_back():
    async def main():
        good, bad = pair()
        async with crew(good, bad) as c:
            good.faults["commit"], bad.faults["commit"] = ["die"], ["other_bytes"]
            outcome = await c.publish(1)
            assert 1 in outcome.workers.values()
            assert outcome.workers.keys() - {late["name"] for late in outcome.behind} == set(c.ready())
            await c.until("good", "bad", version=1)
            assert await c.weights.commit(1) == await c.weights.commit(1)

    virtually(main())


def test_a_commit_that_nobody_takes_in_time_names_every_worker_and_cause():
    async def main():
        good, bad = pair()
        async with crew(good, bad) as c:
            good.faults["commit"], bad.faults["commit"] = ["die"], ["other_bytes"]
            good.faults["start"], bad.faults["start"] = ["hang"], ["hang"]
            named = r"weights 1 were not taken: good is .*killed in commit.*; bad is .*it loaded.*none came back within 120 s"
            with pytest.raises(WeightSyncError, match=named):
                await c.publish(1)
            await c.until("good", "bad", version=1)

    virtually(main())


def test_an_update_that_every_worker_refuses_is_an_error_at_once_and_nothing_changes():
    async def main():
        good, bad = pair()
        async with crew(good, bad) as c:
            good.faults["announce"], bad.faults["announce"] = ["refuse"], ["refuse"]
            with pytest.raises(
                WeightSyncError, match="weights 1 were refused: good: announce is refused; bad: announce"
            ):
                await c.publish(1)
            assert c.ready() == ["good", "bad"]
            assert (await c.publish(1)).behind == []

    virtually(main())


def test_an_announcement_waits_for_a_worker_and_names_those_that_do_not_come_back():
    async def main():
        worker = FaultyWorker()
        async with crew(worker) as c:
            worker.dead = "killed"
            await c.until()
            assert (await c.publish(1)).workers == {"w-0": 1}
            worker.dead, worker.faults["start"] = "killed", ["hang"]
            await c.until()
            with pytest.raises(ServiceUnavailable, match="w-0 is restarting"):
                await c.publish(2)

    virtually(main())


# --- the gate ---


def test_the_gate_names_the_worker_how_far_it_is_and_the_threshold_and_keeps_it_out_without_a_restart():
    async def main():
        good, bad = pair()
        async with crew(good, bad) as c:
            bad.faults["commit"] = ["skew"]
            with pytest.raises(
                ParityError,
                match=r"worker bad .* weights 1: .* by 1 nats .*async.parity_threshold is 0\.05.*base_model",
            ):
                await c.publish(1, gate=True)
            await asyncio.sleep(1000)
            assert (c.states(), bad.process) == (["ready", "quarantined"], 1)
            outcome = await c.publish(2, gate=True)
            assert (outcome.workers, outcome.behind) == ({"good": 2, "bad": 2}, [])
            assert c.ready() == ["good", "bad"]

    virtually(main())


def test_no_worker_serves_gated_weights_before_it_was_verified():
    async def main():
        good, bad = pair()
        async with crew(good, bad) as c:
            good.faults["prompt_logprobs"] = ["late"]
            task = asyncio.create_task(c.publish(1, gate=True))
            await asyncio.sleep(10)
            assert (c.states(), c.ready()) == (["verifying", "ready"], ["bad"])
            assert (await task).behind[0]["cause"] == "worker good did not answer within 120 s"
            await c.until("good", "bad", version=1)

    virtually(main())


def test_a_gate_that_nobody_passes_fails_at_once_and_the_next_learner_is_served():
    async def main():
        worker = FaultyWorker()
        async with crew(worker) as c:
            worker.faults["commit"] = ["skew"]
            with pytest.raises(ParityError, match="w-0"):
                await c.publish(1, gate=True)
            with pytest.raises(ServiceUnavailable, match="none comes back: w-0 is quarantined"):
                await c.fleet.wait_ready()
            assert (await c.publish(2, gate=True)).workers == {"w-0": 2}

    virtually(main())


def test_a_gate_that_several_fail_names_each_and_the_usual_causes_once():
    async def main():
        workers = pair()
        async with crew(*workers) as c:
            for worker in workers:
                worker.faults["commit"] = ["skew"]
            with pytest.raises(ParityError) as caught:
                await c.publish(1, gate=True)
            message = str(caught.value)
            assert [message.count(part) for part in ("worker good", "worker bad", "Usual causes")] == [1, 1, 1]

    virtually(main())


def test_a_kept_worker_that_dies_is_restarted():
    async def main():
        good, bad = pair()
        async with crew(good, bad) as c:
            bad.faults["commit"] = ["skew"]
            with pytest.raises(ParityError):
                await c.publish(1, gate=True)
            bad.dead = "killed"
            await c.publish(2, gate=True)
            await c.until("good", "bad", version=2)
            assert bad.process == 2

    virtually(main())


@pytest.mark.parametrize("leaves_in_the_swap", [True, False])
def test_a_worker_that_failed_the_gate_and_leaves_does_not_stop_the_next_update(leaves_in_the_swap):
    async def main():
        good, bad = pair()
        async with crew(good, bad, publish_timeout=2 * LATE_S) as c:
            bad.faults["commit"] = ["skew", "late"]
            with pytest.raises(ParityError):
                await c.publish(1, gate=True)
            with c.fleet.charging(c.fleet.members[1], 1):  # which it has to finish before it has left
                publish = asyncio.create_task(c.publish(2, gate=True)) if leaves_in_the_swap else None
                await asyncio.sleep(LATE_S / 2)
                leaving = c.supervisor.retire("bad")
                await asyncio.sleep(1)
                assert c.states() == ["ready", "draining"]
                outcome = await (publish or c.publish(2, gate=True))
                assert (outcome.workers, outcome.behind) == ({"good": 2}, [])
            await leaving
            assert c.states() == ["ready"]

    virtually(main())


# --- what an earlier process, or one that is out, says late ---


def test_the_late_failure_of_an_earlier_process_does_not_take_out_the_one_that_came_back():
    async def main():
        good, bad = pair()
        async with crew(good, bad, publish_timeout=LATE_S) as c:
            bad.faults["commit"] = ["hang"]
            task = asyncio.create_task(c.publish(1))
            await asyncio.sleep(10)
            c.fleet.mark_down(c.fleet.members[1], "killed")
            assert (await task).workers == {"good": 1, "bad": 1}
            assert (c.states(), bad.process) == (["ready", "ready"], 2)

    virtually(main())


def test_who_could_not_be_announced_to_and_came_back_meanwhile_serves():
    async def main():
        good, bad = pair()
        async with crew(good, bad, publish_timeout=2 * LATE_S) as c:
            good.faults["announce"], bad.faults["announce"] = ["late"], ["die"]
            task = asyncio.create_task(c.publish(1))
            await asyncio.sleep(1)
            c.fleet.mark_down(c.fleet.members[1], "killed")
            await asyncio.sleep(LATE_S / 2)
            assert (c.states(), bad.process) == (["ready", "ready"], 2)
            outcome = await task
            assert (outcome.workers, outcome.behind) == ({"good": 1, "bad": 1}, [])
            assert bad.process == 2

    virtually(main())


def test_a_worker_that_is_given_up_while_it_swaps_stays_out_whatever_it_says():
    async def main():
        good, bad = pair()
        async with crew(good, bad, publish_timeout=2 * LATE_S, max_restarts=0) as c:
            bad.faults["commit"] = ["late"]
            task = asyncio.create_task(c.publish(1, gate=True))
            await asyncio.sleep(10)
            c.fleet.mark_down(c.fleet.members[1], "killed")
            assert (await task).workers == {"good": 1}
            assert c.states() == ["ready", "gone"]

    virtually(main())


# --- joining and leaving ---


def test_a_new_worker_catches_up_and_is_verified_before_it_serves():
    async def main():
        async with crew(FaultyWorker("old")) as c:
            await c.publish(5)
            new = FaultyWorker("new")
            assert c.supervisor.admit(new).state == "loading"
            await c.until("old", "new", version=5)
            assert (new.data, new.verified) == (content(5), 5)
            with pytest.raises(ValueError, match="'new' already"):
                c.supervisor.admit(FaultyWorker("new"))

    virtually(main())


def test_a_new_worker_that_missed_an_update_while_it_caught_up_catches_up_again():
    async def main():
        async with crew(FaultyWorker("old")) as c:
            await c.publish(1)
            new = FaultyWorker("new")
            new.faults["commit"] = ["ok"]
            new.faults["prompt_logprobs"] = ["late"]
            c.weights._timeout = 2 * LATE_S
            c.supervisor.admit(new)
            await asyncio.sleep(LATE_S / 2)
            assert c.states() == ["ready", "verifying"]
            await c.publish(2)
            await c.until("old", "new", version=2)
            assert (new.process, new.data, new.verified) == (1, content(2), 2)

    virtually(main())


def test_a_worker_that_leaves_finishes_its_work_and_gets_no_more():
    async def main():
        good, bad = pair()
        async with crew(good, bad) as c:
            with c.fleet.charging(c.fleet.members[1], 4):
                leaving = c.supervisor.retire("bad")
                await asyncio.sleep(5)
                assert (c.ready(), c.states(), bad.closed) == (["good"], ["ready", "draining"], False)
                assert (await c.publish(1)).workers == {"good": 1}
            await leaving
            assert (bad.closed, c.states()) == (True, ["ready"])
            with pytest.raises(ServiceUnavailable, match="no worker 'bad'; the workers are: good"):
                await c.supervisor.retire("bad")

    virtually(main())


@pytest.mark.parametrize("method", ["start", "announce", "commit"])
def test_a_worker_that_never_answers_can_leave(method):
    async def main():
        good, bad = pair()
        async with crew(good, bad) as c:
            await c.publish(1)
            bad.faults[method] = ["hang"]
            c.fleet.mark_down(c.fleet.members[1], "killed")
            await asyncio.sleep(1)
            with c.fleet.charging(c.fleet.members[1], 1):
                await c.supervisor.retire("bad")
            assert (c.states(), bad.closed) == (["ready"], True)
            assert "bad: leaves with 1 completions unfinished" in c.events

    virtually(main())


def test_a_worker_that_does_not_close_is_named_and_leaves_all_the_same():
    async def main():
        good, bad = pair()
        async with crew(good, bad) as c:
            bad.faults["close"] = ["hang"]
            with pytest.raises(DeadlineExceeded, match="worker bad did not close within 20 s"):
                await c.supervisor.retire("bad")
            assert [member.name for member in c.fleet.members] == ["good"]

    virtually(main())


# --- rolling ---


def test_rolling_swaps_one_after_the_other_and_the_others_go_on():
    async def main():
        workers = [FaultyWorker(f"w-{i}") for i in range(3)]
        async with crew(*workers, publish="rolling", publish_timeout=2 * LATE_S) as c:
            for worker in workers:
                worker.faults["commit"] = ["late"]
            task = asyncio.create_task(c.publish(1))
            for taken in range(3):
                await asyncio.sleep(LATE_S / 2)
                assert [worker.version for worker in workers] == [1] * taken + [0] * (3 - taken)
                assert len(c.ready()) == 3
                await asyncio.sleep(LATE_S / 2)
            assert (await task).workers == {"w-0": 1, "w-1": 1, "w-2": 1}

    virtually(main())


def test_a_worker_that_died_and_came_back_before_its_turn_has_had_it():
    async def main():
        workers = [FaultyWorker(f"w-{i}") for i in range(2)]
        async with crew(*workers, publish="rolling", publish_timeout=2 * LATE_S) as c:
            workers[0].faults["commit"] = ["late"]
            task = asyncio.create_task(c.publish(1))
            await asyncio.sleep(10)
            c.fleet.mark_down(c.fleet.members[1], "killed")
            outcome = await task
            assert (outcome.workers, outcome.behind) == ({"w-0": 1, "w-1": 1}, [])
            assert (workers[1].process, workers[1].calls.count("commit")) == (2, 1)

    virtually(main())


def test_gated_weights_are_swapped_at_once_also_where_updates_roll():
    async def main():
        workers = [FaultyWorker(f"w-{i}") for i in range(3)]
        async with crew(*workers, publish="rolling", publish_timeout=2 * LATE_S) as c:
            for worker in workers:
                worker.faults["commit"] = ["late"]
            assert (await c.publish(1, gate=True)).commit_s == LATE_S

    virtually(main())


def test_rolling_gives_up_on_taking_turns_when_the_learner_would_wait_too_long():
    async def main():
        workers = [FaultyWorker(f"w-{i}") for i in range(9)]
        async with crew(*workers, publish="rolling", publish_timeout=100.0, max_restarts=0) as c:
            for worker in workers[1:]:
                worker.faults["commit"] = ["hang"]
            begun = asyncio.get_running_loop().time()
            outcome = await c.publish(1)
            assert outcome.workers == {"w-0": 1}
            assert (outcome.commit_s, outcome.pause_s) == (200, 0), "the pause of those that took the update"
            assert asyncio.get_running_loop().time() - begun == 200

    virtually(main())


def test_together_swaps_all_at_once_and_once_one_has_swapped_the_others_wait_for_theirs():
    async def main():
        workers = [FaultyWorker(f"w-{i}") for i in range(3)]
        async with crew(*workers, publish_timeout=2 * LATE_S) as c:
            workers[0].faults["commit"] = ["late"]
            task = asyncio.create_task(c.publish(1))
            await asyncio.sleep(LATE_S / 2)
            assert c.ready() == ["w-1", "w-2"]
            await task
            assert c.ready() == ["w-0", "w-1", "w-2"]

    virtually(main())


# --- any sequence of faults ---

FAULT = st.sampled_from(["ok", "ok", "die", "hang", "late", "refuse", "other_bytes", "skew", "bug"])
METHOD = st.sampled_from(["start", "status", "generate", "prompt_logprobs", "announce", "commit"])
STEP = st.one_of(
    st.tuples(st.just("fault"), st.integers(0, 2), METHOD, FAULT),
    st.tuples(st.just("kill"), st.integers(0, 2)),
    st.tuples(st.just("publish"), st.booleans()),
    st.tuples(st.just("publish beside the rest"), st.booleans()),
    st.tuples(st.just("abandon"),),
    st.tuples(st.just("wait"), st.sampled_from([0.1, 3.0, 130.0, 1100.0])),
    st.tuples(st.just("admit"),),
    st.tuples(st.just("retire"), st.integers(0, 2)),
    st.tuples(st.just("retire beside the rest"), st.integers(0, 2)),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(STEP, max_size=25), publish=st.sampled_from(["together", "rolling"]))
def test_a_worker_that_missed_a_version_never_serves_until_it_has_it_and_was_verified(steps, publish):
    async def main():
        workers = [FaultyWorker(f"w-{i}") for i in range(3)]
        async with crew(*workers, publish=publish, max_restarts=2, probe_interval=40.0) as c:
            before, unnamed, beside = dict.fromkeys(c.fleet.members, "ready"), [], []

            def check():
                ready = c.fleet.ready()
                for member in c.fleet.members:
                    worker, was = member.worker, before.get(member, "loading")
                    before[member] = member.state
                    if worker.dead or worker.process != member.incarnation + 1:
                        continue  # what it would answer is an error
                    if member.state == "ready" != was and c.fleet.weight_version and not c.fleet.updating:
                        assert worker.verified == worker.version == c.fleet.weight_version
                    if member in ready and not c.fleet.updating:
                        assert worker.version == c.fleet.weight_version
                        assert worker.data == (content(worker.version) if worker.version else b"")
                        assert worker.skew == 0.0 or was == "ready"

            asyncio.get_running_loop().watch = check
            for kind, *rest in steps:
                kind, is_beside, _ = kind.partition(" beside")
                doing = asyncio.create_task(attempt(act(c, workers, kind, *rest), beside, unnamed))
                if is_beside:
                    beside.append(doing)
                else:
                    await doing
            await asyncio.gather(*beside)
            for worker in workers:
                worker.faults.clear()
            await asyncio.sleep(3000)
            assert unnamed == []
            assert not [event for event in c.events if "nobody looks after it" in event]
            assert all(m.state in ("ready", "gone") or m.kept for m in c.fleet.members)
            assert len(c.ready()) == c.states().count("ready")

    async def attempt(action, beside, unnamed):
        try:
            await action
        except RlxError as error:
            # What goes on beside it may be another update, or that the last worker leaves.
            if "w-" not in str(error) and not (beside and re.search("weights|there is no worker", str(error))):
                unnamed.append(error)

    async def act(c, workers, kind, *rest):
        if kind == "fault":
            workers[rest[0]].faults[rest[1]].append(rest[2])
        elif kind == "kill":
            workers[rest[0]].dead = "killed"
        elif kind == "wait":
            await asyncio.sleep(rest[0])
        elif kind == "admit" and len(workers) < 5:
            workers.append(FaultyWorker(f"w-{len(workers)}"))
            c.supervisor.admit(workers[-1])
        elif kind == "retire" and f"w-{rest[0]}" in [m.name for m in c.fleet.members]:
            await c.supervisor.retire(f"w-{rest[0]}")
        elif kind == "abandon" and c.fleet.members:
            await c.weights.announce(manifest_of(c.fleet.weight_version + 1))
        elif kind == "publish" and c.fleet.members:
            version = c.fleet.weight_version + 1
            outcome = await c.publish(version, gate=rest[0])
            assert version in outcome.workers.values()

    virtually(main())
