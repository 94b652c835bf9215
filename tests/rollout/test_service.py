"""The rollout service without HTTP: groups, deadlines, the fleet, weight updates, stopping."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest
from service_parts import (
    QUICK,
    LocalScorer,
    LocalWorker,
    chunks,
    eventually,
    group,
    make_service,
    started,
    weights,
)

from rlx.errors import (
    DeadlineExceeded,
    ModelError,
    RequestRefused,
    RequestTooLong,
    ServiceError,
    ServiceUnavailable,
    UserCodeError,
    WireError,
)
from rlx.rollout.groups import GroupStore, KeyConflict
from rlx.wire import Completion, GroupResult


async def publish(service, version, data, sent=None):
    await service.weights.announce(weights(version, data))
    await service.weights.receive(version, chunks(data if sent is None else sent))
    return await service.weights.commit(version)


def rollouts_of(worker):
    return [request for request in worker.generated if not request.startswith("probe-")]


# --- groups ---


async def test_a_group_carries_its_completions_rewards_and_worker():
    before = time.time()
    async with started(make_service([LocalWorker("w")])) as service:
        result = await service.rollout(group(n=3))
    assert result.worker == "w"
    assert result.times is not None
    times = [before - 1, *vars(result.times).values(), time.time() + 1]
    assert times == sorted(times)
    assert [e.rows[0].ids.tolist() for e in result.episodes] == [[7, 8, 9]] * 3
    assert [e.rows[0].versions for e in result.episodes] == [((0, 3),)] * 3
    assert result.rewards[0].values[1:].tolist() == [1.0, 2.0]
    assert result.metrics == {"length": 3.0}


async def test_the_same_key_rolls_out_once_however_often_it_comes():
    worker = LocalWorker()
    async with started(make_service([worker])) as service:
        worker.open.clear()
        waiting = [asyncio.create_task(service.rollout(group())) for _ in range(5)]
        await eventually(lambda: rollouts_of(worker))
        worker.open.set()
        results = [*await asyncio.gather(*waiting), await service.rollout(group(deadline_s=1))]
    assert rollouts_of(worker) == ["g-1"]
    assert all(result is results[0] for result in results)


async def test_the_same_key_with_another_request_is_a_conflict():
    async with started(make_service([LocalWorker()])) as service:
        await service.rollout(group())
        with pytest.raises(KeyConflict, match="'g-1'"):
            await service.rollout(group(prompt="2 + 2 ="))


async def test_a_group_goes_on_when_its_caller_goes_away():
    worker = LocalWorker()
    async with started(make_service([worker])) as service:
        worker.open.clear()
        caller = asyncio.create_task(service.rollout(group()))
        await eventually(lambda: rollouts_of(worker))
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        worker.open.set()
        assert (await service.rollout(group())).key == "g-1"
    assert rollouts_of(worker) == ["g-1"]


async def test_a_failed_key_may_be_tried_again():
    scorer = LocalScorer()
    async with started(make_service([LocalWorker()], scorer)) as service:
        scorer.error = UserCodeError("trl.reward_funcs: rewards.f raised")
        with pytest.raises(UserCodeError, match=r"rewards\.f raised"):
            await service.rollout(group())
        scorer.error = None
        assert (await service.rollout(group())).key == "g-1"


async def ran_keys(store, keys, results):
    """Ask for the keys one after the other while the group `slow` runs; which of them really ran."""
    gate, ran = asyncio.Event(), []

    async def run(request):
        ran.append(request.key)
        if request.key == "slow":
            await gate.wait()
        return results

    slow = asyncio.create_task(store.get(group("slow"), run))
    await asyncio.sleep(0)
    for key in keys:
        await store.get(group(key), run)
    gate.set()
    await slow
    return ran


async def one_result():
    async with started(make_service([LocalWorker()])) as service:
        return await service.rollout(group())


async def test_only_the_newest_results_are_kept_and_running_groups_always():
    store = GroupStore(max_groups=2, max_bytes=2**20)
    ran = await ran_keys(store, ["a", "b", "a", "c", "a", "b"], await one_result())
    assert sorted(ran) == sorted(["slow", "a", "b", "c", "b"])
    assert len(store) == 2


async def test_kept_results_are_bounded_in_bytes_too():
    result = await one_result()
    nbytes = sum(e.rows[0].ids.nbytes + e.rows[0].logprobs.nbytes + len(e.text) for e in result.episodes)
    ran = await ran_keys(GroupStore(max_groups=100, max_bytes=3 * nbytes - 1), ["a", "b", "b", "c", "b", "a"], result)
    assert sorted(ran) == sorted(["slow", "a", "b", "c", "a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": np.array([], np.int32)}, "prompt_ids"),
        ({"prompt_ids": np.array([-1], np.int32)}, "prompt_ids"),
        ({"num_generations": 0}, "n must be"),
        ({"key": ""}, "key must"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"prompt": 3}, "prompt must"),
    ],
)
async def test_a_request_that_cannot_be_served_is_refused_with_the_field(change, message):
    async with started(make_service([LocalWorker()])) as service:
        with pytest.raises(WireError, match=message):
            await service.rollout(replace(group(), **change))


# --- deadlines and workers ---


async def test_the_deadline_names_the_worker_that_was_waited_for():
    worker = LocalWorker("w-7")
    async with started(make_service([worker])) as service:
        worker.open.clear()
        with pytest.raises(DeadlineExceeded, match=r"worker w-7 did not answer within the 0\.2 s"):
            await service.rollout(group(deadline_s=0.2))
        assert service.workers()[0].in_flight == 0


async def test_the_deadline_names_the_rewards_that_were_waited_for():
    scorer = LocalScorer()
    async with started(make_service([LocalWorker()], scorer)) as service:
        scorer.open.clear()
        with pytest.raises(DeadlineExceeded, match=r"trl\.reward_funcs"):
            await service.rollout(group(deadline_s=0.2))


async def test_the_service_deadline_bounds_the_requests_own():
    worker = LocalWorker()
    async with started(make_service([worker], settings=QUICK.model_copy(update={"group_timeout": 0.2}))) as service:
        worker.open.clear()
        with pytest.raises(DeadlineExceeded, match=r"0\.2 s"):
            await service.rollout(group(deadline_s=100))


async def test_groups_go_to_the_worker_with_the_least_completions_in_flight():
    workers = [LocalWorker("a"), LocalWorker("b")]
    async with started(make_service(workers)) as service:
        for worker in workers:
            worker.open.clear()
        tasks = []
        for key, n in (("big", 8), ("one", 2), ("two", 2), ("three", 6)):
            tasks.append(asyncio.create_task(service.rollout(group(key, n))))
            await eventually(lambda: sum(len(rollouts_of(worker)) for worker in workers) == len(tasks))
        assert [rollouts_of(worker) for worker in workers] == [["big"], ["one", "two", "three"]]
        for worker in workers:
            worker.open.set()
        await asyncio.gather(*tasks)
        assert [status.in_flight for status in service.workers()] == [0, 0]


async def test_a_dead_worker_is_named_with_its_cause_and_its_group_moves_to_another():
    dead, alive = LocalWorker("dead"), LocalWorker("alive")
    async with started(make_service([dead, alive])) as service:
        dead.dead = "out of memory"
        dead.open.clear()  # its new process does not come up
        assert (await service.rollout(group("first"))).worker == "alive"
        await eventually(lambda: service.fleet.members[0].state == "restarting")
        ok, body = service.health()
        assert ok
        assert body["status"] == "degraded"
        assert "dead is restarting (worker dead died: out of memory)" in body["cause"]


async def test_a_group_waits_for_the_only_worker_to_come_back_and_is_generated_once():
    worker = LocalWorker("w")
    async with started(make_service([worker], settings=QUICK.model_copy(update={"max_restarts": 10}))) as service:
        worker.open.clear()
        running = asyncio.create_task(service.rollout(group()))
        await eventually(lambda: rollouts_of(worker))
        worker.dead = "killed"
        worker.open.set()
        await eventually(lambda: service.health()[1]["status"] == "down")
        worker.dead = ""
        result = await running
        assert rollouts_of(worker) == ["g-1", "g-1"]
        assert len(result.episodes) == 2
        await eventually(lambda: service.health()[0])


async def test_a_group_that_loses_every_worker_that_it_gets_ends_with_all_causes():
    class Fragile(LocalWorker):
        async def generate(self, request_id, *rest):
            if request_id.startswith("probe"):
                return await super().generate(request_id, *rest)
            self.generated.append(request_id)
            raise ServiceUnavailable(f"worker {self.name} died: reason {self.name}")

    workers = [Fragile(name) for name in "abcd"]
    async with started(make_service(workers)) as service:
        with pytest.raises(ServiceUnavailable) as caught:
            await service.rollout(group())
    assert sum(len(rollouts_of(worker)) for worker in workers) == 3
    assert str(caught.value) == (
        "worker c died: reason c; before that: worker a died: reason a; worker b died: reason b"
    )


async def test_a_group_whose_deadline_passes_while_workers_restart_says_so():
    worker = LocalWorker("w")
    async with started(make_service([worker])) as service:
        worker.dead = "killed"
        worker.open.clear()
        with pytest.raises(DeadlineExceeded, match=r"a worker \(w is restarting \(worker w died: killed\)\) did not"):
            await service.rollout(group(deadline_s=0.4))


async def test_when_no_worker_can_come_back_groups_are_refused_at_once_with_the_causes():
    workers = [LocalWorker("a"), LocalWorker("b")]
    settings = QUICK.model_copy(update={"max_restarts": 0})
    async with started(make_service(workers, settings=settings)) as service:
        for worker in workers:
            worker.open.clear()
        waiting = [asyncio.create_task(service.rollout(group(f"g{i}", deadline_s=60))) for i in range(3)]
        await eventually(lambda: all(rollouts_of(worker) for worker in workers))
        for worker in workers:
            worker.dead = f"reason {worker.name}"
            worker.open.set()
        for error in await asyncio.gather(*waiting, service.rollout(group("late")), return_exceptions=True):
            assert isinstance(error, ServiceUnavailable)
            assert "worker a died: reason a" in str(error)
            assert "worker b died: reason b" in str(error)


async def test_workers_join_and_leave_while_groups_run():
    first, made = LocalWorker("first"), []

    def make_worker():
        made.append(LocalWorker(f"new-{len(made)}"))
        return made[-1]

    service = make_service([first], make_worker=make_worker)
    async with started(service):
        await publish(service, 1, b"abcd")
        first.open.clear()
        running = asyncio.create_task(service.rollout(group("running")))
        await eventually(lambda: rollouts_of(first))
        assert service.add_workers(2) == ["new-0", "new-1"]
        await eventually(lambda: len(service.fleet.ready()) == 3)
        assert [worker.committed for worker in made] == [[b"abcd"], [b"abcd"]], "they caught up before they served"
        assert (await service.rollout(group("next"))).worker in ("new-0", "new-1")
        service.remove_worker("first")
        assert service.workers()[0].state == "draining"
        first.open.set()
        assert (await running).worker == "first", "it finishes what it has"
        await eventually(lambda: [w.name for w in service.workers()] == ["new-0", "new-1"])
        assert first.closed
        with pytest.raises(RequestRefused, match="no worker 'first'; the workers are: new-0, new-1"):
            service.remove_worker("first")
        service.remove_worker("new-1")
        await eventually(lambda: len(service.workers()) == 1)
        with pytest.raises(RequestRefused, match="the only worker"):
            service.remove_worker("new-0")


async def test_of_two_workers_that_are_removed_at_once_the_last_one_stays_and_twice_the_same_is_once():
    workers = [LocalWorker(name) for name in "abc"]
    async with started(make_service(workers)) as service:
        service.remove_worker("a")
        service.remove_worker("a")
        service.remove_worker("b")
        with pytest.raises(RequestRefused, match="c is the only worker"):
            service.remove_worker("c")
        await eventually(lambda: [w.name for w in service.workers()] == ["c"])
        assert [worker.closed for worker in workers] == [True, True, False]
        assert service.fleet.events.counts["worker_removed"] == 2
        assert (await service.rollout(group())).worker == "c"


async def test_workers_beyond_those_at_the_start_join_when_they_can_and_nothing_is_amiss_until_then():
    made = []

    def make_worker():
        made.append(LocalWorker(f"new-{len(made)}"))
        made[-1].open.clear()
        return made[-1]

    service = make_service(
        [LocalWorker("first")], settings=QUICK.model_copy(update={"max_workers": 3}), make_worker=make_worker
    )
    async with started(service):
        await publish(service, 1, b"abcd")
        assert [(w.name, w.state) for w in service.workers()] == [
            ("first", "ready"),
            ("new-0", "loading"),
            ("new-1", "loading"),
        ]
        assert service.health()[1]["status"] == "ok"
        made[0].open.set()
        await eventually(lambda: [m.name for m in service.fleet.ready()] == ["first", "new-0"])
        assert made[0].committed == [b"abcd"]


async def test_what_a_leaving_worker_does_not_finish_is_generated_anew_on_another():
    class Leaving(LocalWorker):
        async def close(self):
            self.dead = "it was closed"
            self.open.set()
            await super().close()

    workers = [Leaving("a"), LocalWorker("b")]
    async with started(make_service(workers, settings=QUICK.model_copy(update={"drain_timeout": 0.1}))) as service:
        workers[0].open.clear()
        running = asyncio.create_task(service.rollout(group()))
        await eventually(lambda: rollouts_of(workers[0]))
        service.remove_worker("a")
        assert (await running).worker == "b"
        assert rollouts_of(workers[0]) == rollouts_of(workers[1]) == ["g-1"]


async def test_a_prompt_without_room_in_the_context_is_refused_at_once():
    worker = LocalWorker()
    async with started(make_service([worker], max_model_len=8)) as service:
        with pytest.raises(RequestTooLong, match=r"'g-1': a prompt of 8 tokens .* context of 8.*vllm\.max_model_len"):
            await service.rollout(replace(group(), prompt_ids=np.arange(8, dtype=np.int32)))
        assert (await service.rollout(replace(group(), prompt_ids=np.arange(7, dtype=np.int32)))).key == "g-1"
    assert rollouts_of(worker) == ["g-1"]


async def test_health_wants_a_real_token_not_only_an_answer():
    worker = LocalWorker("w")
    settings = QUICK.model_copy(update={"probe_timeout": 0.4})
    async with started(make_service([worker], settings=settings)) as service:
        await eventually(lambda: len(worker.generated) > 1 and service.health()[0])
        worker.silent = True
        await eventually(lambda: not service.health()[0])
        assert "w" in service.health()[1]["cause"]
        assert "no token" in service.health()[1]["cause"]


async def test_a_worker_whose_newest_token_is_too_old_is_not_healthy_whatever_the_probe_does():
    settings = QUICK.model_copy(update={"probe_interval": 100.0, "probe_timeout": 0.1})
    async with started(make_service([LocalWorker("w")], settings=settings)) as service:
        await asyncio.sleep(0.15)
        assert service.health()[1]["status"] == "down"
        assert service.health()[1]["cause"].startswith("w generated no token for")
        await service.rollout(group())


async def test_a_stream_that_nobody_reads_frees_its_worker():
    async with started(make_service([LocalWorker()])) as service:
        lines = await service.openai("completions", {"stream": True})
        assert service.workers()[0].in_flight == 1
        del lines
        await eventually(lambda: service.workers()[0].in_flight == 0)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda c: [], "0 completions"),
        (lambda c: [replace(c, logprobs=c.logprobs[:2])] * 2, "3 token ids with 2 log-prob"),
        (lambda c: [replace(c, versions=((0, 2),))] * 2, "do not partition"),
        (lambda c: [replace(c, ids=c.ids.astype(np.int64) + 2**31)] * 2, "int32"),
        (lambda c: [replace(c, logprobs=c.logprobs * 0 + 1)] * 2, "is above 0"),
        (lambda c: [replace(c, finish_reason="abort")] * 2, "abort"),
    ],
)
async def test_an_engine_that_breaks_the_contract_is_named(broken, message):
    class Broken(LocalWorker):
        async def generate(self, *args) -> list[Completion]:
            return broken((await super().generate(*args))[0])

    async with started(make_service([Broken("w-3")])) as service:
        with pytest.raises(ServiceError, match=f"w-3.*{message}"):
            await service.rollout(group())


async def test_a_log_probability_that_is_no_number_reaches_the_learner_which_leaves_it_out():
    class Broken(LocalWorker):
        async def generate(self, *args) -> list[Completion]:
            good, bad = await super().generate(*args)
            return [good, replace(bad, logprobs=bad.logprobs * np.nan)]

    async with started(make_service([Broken()])) as service:
        result = GroupResult.decode((await service.rollout(group())).encode())
    assert [np.isnan(e.rows[0].logprobs).all() for e in result.episodes] == [False, True]


# --- start and stop ---


async def test_a_worker_that_does_not_start_is_named_and_the_progress_is_told():
    workers = [LocalWorker("good"), LocalWorker("bad")]
    workers[1].start_error = ModelError("no such folder")
    service = make_service(workers)
    with pytest.raises(ModelError, match="worker bad: no such folder"):
        await service.start()
    await service.drain(0)
    assert service.health()[1]["status"] == "failed"
    assert service.health()[1]["cause"] == "worker bad: no such folder"
    assert [worker.closed for worker in workers] == [True, True]


async def test_a_start_that_takes_too_long_names_who_is_waited_for():
    worker = LocalWorker("slow")
    worker.open.clear()
    service, seen = make_service([LocalWorker("quick"), worker]), []
    service._start_timeout_s = 0.2
    with pytest.raises(DeadlineExceeded, match=r"^slow did not start within vllm\.start_timeout = 0\.2 s"):
        await service.start(seen.append)
    assert [progress.ready for progress in seen] == [1, 2]
    assert seen[-1].waiting_for == ("slow",)
    await service.drain(0)


async def test_draining_refuses_new_groups_and_lets_running_ones_finish():
    worker, scorer = LocalWorker(), LocalScorer()
    service = make_service([worker], scorer)
    await service.start()
    worker.open.clear()
    running = asyncio.create_task(service.rollout(group("running")))
    await eventually(lambda: rollouts_of(worker))
    drain = asyncio.create_task(service.drain(5))
    await asyncio.sleep(0)
    with pytest.raises(ServiceUnavailable, match="the service is stopping"):
        await service.rollout(group("late"))
    worker.open.set()
    assert (await running).key == "running"
    await drain
    assert worker.closed
    assert scorer.closed


async def test_draining_cancels_what_does_not_finish_in_time():
    worker = LocalWorker()
    service = make_service([worker])
    await service.start()
    worker.open.clear()
    running = asyncio.create_task(service.rollout(group()))
    await eventually(lambda: rollouts_of(worker))
    await service.drain(0.1)
    with pytest.raises(ServiceUnavailable, match="the service is stopping"):
        await running
    assert worker.closed
