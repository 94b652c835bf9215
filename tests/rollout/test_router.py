"""Who gets a group and when: limits from the engines' load, the queue, workers that go and come."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from types import SimpleNamespace

import numpy as np
import pytest
from faulty_workers import virtually
from service_parts import QUICK, LocalWorker, eventually, group

from rlx.errors import ServiceUnavailable
from rlx.rollout import fake_engine
from rlx.rollout import router as router_module
from rlx.rollout.engine_worker import EngineWorker
from rlx.rollout.fake_engine import FakeEngine
from rlx.rollout.fleet import Fleet
from rlx.rollout.router import FIRST_LIMIT, Limit, Router
from rlx.rollout.worker import EngineLoad
from rlx.wire import Sampling

PROMPT = np.arange(1, 9, dtype=np.int32)


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch):
    monkeypatch.setattr(router_module, "POLL_S", 0.02)


def ready_fleet(*workers):
    fleet = Fleet(list(workers), QUICK)
    for member in fleet.members:
        for event in ("loaded", "caught_up", "verified"):
            fleet.move(member, event)
    return fleet


def set_limit(router, sequences):
    """For good: whatever the polls find, which come when they can."""
    for member in router._fleet.members:
        limit = router.limit(member)
        limit.sequences, limit.learn = sequences, lambda load, in_flight: None


async def hold(router, stack, key, n):
    return stack.enter_context(await router.assign(group(key, n)))


# --- limits ---


def test_a_limit_doubles_until_something_waits_and_then_grows_step_by_step():
    limit = Limit()
    limit.learn(EngineLoad(running=FIRST_LIMIT), in_flight=FIRST_LIMIT)
    assert limit.sequences == 2 * FIRST_LIMIT
    limit.learn(EngineLoad(running=100, waiting=20), in_flight=120)
    assert limit.sequences == 2 * FIRST_LIMIT
    limit.learn(EngineLoad(running=120), in_flight=120)
    assert limit.sequences == 2 * FIRST_LIMIT + 8


def test_a_limit_that_is_not_used_does_not_grow():
    limit = Limit()
    limit.learn(EngineLoad(running=FIRST_LIMIT // 2), in_flight=FIRST_LIMIT // 2)
    assert limit.sequences == FIRST_LIMIT


def test_a_full_cache_holds_the_limit_and_a_preemption_lowers_it():
    limit = Limit()
    limit.learn(EngineLoad(running=64, kv_cache_usage=0.97), in_flight=64)
    assert limit.sequences == 64
    limit.learn(EngineLoad(running=50, waiting=14, kv_cache_usage=1.0, preemptions=3), in_flight=64)
    assert limit.sequences == 51
    limit.learn(EngineLoad(running=40, kv_cache_usage=0.8, preemptions=3), in_flight=40)
    assert limit.sequences == 51 + 3
    for preemptions in range(4, 40):
        limit.learn(EngineLoad(running=1, preemptions=preemptions), in_flight=1)
    assert limit.sequences == 1


def test_the_counts_of_a_new_process_are_no_preemptions():
    limit = Limit()
    limit.learn(EngineLoad(running=10, preemptions=7), in_flight=10)
    now = limit.sequences
    limit.learn(EngineLoad(running=10, preemptions=0), in_flight=10)
    assert limit.sequences >= now


async def run_groups(engine, limit):
    """60 groups of 4 on one engine: preemptions, and the most that ran and waited in it."""
    fleet = ready_fleet(EngineWorker("w", engine))
    router = Router(fleet)
    if limit is not None:
        set_limit(router, limit)

    async def one(i):
        with await router.assign(group(f"g{i}", 4)) as member:
            return await member.worker.generate(f"g{i}", PROMPT, 4, Sampling(max_tokens=60))

    results = await asyncio.gather(*(one(i) for i in range(60)))
    await router.close()
    assert all(c.ids.size == 40 for completions in results for c in completions)
    return engine.load().preemptions


def test_the_limit_spares_an_engine_with_a_small_cache_most_preemptions(monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: asyncio.get_running_loop().time())
    monkeypatch.setattr(fake_engine, "time", clock)

    async def preemptions(limit):
        # 20 sequences fit at their full length of 48 tokens
        engine = FakeEngine(seconds_per_token=0.002, length_of=lambda *_: 40, kv_tokens=960)
        await engine.start()
        return await run_groups(engine, limit)

    counts = [virtually(preemptions(limit)) for limit in (10_000, None)]
    assert counts[0] > 40
    assert counts[1] < counts[0] / 2


# --- placing ---


async def test_a_whole_group_goes_to_the_worker_with_the_fewest_tokens_in_flight():
    fleet = ready_fleet(*(LocalWorker(name) for name in "ab"))
    router = Router(fleet)
    async with AsyncExitStack() as stack:
        names = [(await hold(router, stack, key, n)).name for key, n in (("1", 8), ("2", 2), ("3", 2), ("4", 6))]
        assert names == ["a", "b", "b", "b"]
        assert [m.in_flight for m in fleet.members] == [8, 10]
        assert [m.tokens_in_flight for m in fleet.members] == [8 * 6, 10 * 6]
    assert [(m.in_flight, m.tokens_in_flight) for m in fleet.members] == [(0, 0), (0, 0)]
    await router.close()


async def test_groups_beyond_the_limit_wait_in_their_order_and_an_idle_worker_takes_any():
    fleet = ready_fleet(LocalWorker("a"))
    router, order = Router(fleet), []
    set_limit(router, 4)

    async def one(key, n):
        with await router.assign(group(key, n)):
            order.append(key)
            await gates[key].wait()

    sizes = {"huge": 9, "two": 2, "three": 3, "one": 1}
    gates = {key: asyncio.Event() for key in sizes}
    tasks = [asyncio.create_task(one(key, n)) for key, n in sizes.items()]
    await eventually(lambda: order == ["huge"] and router.waiting == 3)
    gates["huge"].set()
    await eventually(lambda: len(order) == 2)
    await asyncio.sleep(0.05)
    assert order == ["huge", "two"], "three do not fit beside two, and one does not overtake them"
    gates["two"].set()
    await eventually(lambda: order == ["huge", "two", "three", "one"])
    gates["three"].set()
    gates["one"].set()
    await asyncio.gather(*tasks)
    assert fleet.members[0].in_flight == router.waiting == 0


async def test_a_waiter_that_is_cancelled_leaves_the_queue_and_lets_the_next_through():
    fleet = ready_fleet(LocalWorker("a"))
    router = Router(fleet)
    set_limit(router, 4)
    async with AsyncExitStack() as stack:
        await hold(router, stack, "first", 3)
        big = asyncio.create_task(hold(router, stack, "big", 4))
        small = asyncio.create_task(hold(router, stack, "small", 1))
        await eventually(lambda: router.waiting == 2)
        big.cancel()
        assert (await small).name == "a"
        assert fleet.members[0].in_flight == 4
    await router.close()


async def test_a_waiter_that_is_cancelled_just_as_it_gets_its_place_gives_it_back():
    fleet = ready_fleet(LocalWorker("a"))
    router = Router(fleet)
    set_limit(router, 4)
    stack = AsyncExitStack()
    await hold(router, stack, "first", 4)
    late = asyncio.create_task(router.place(2, 2))
    await eventually(lambda: router.waiting == 1)
    await stack.aclose()
    assert router.waiting == 0
    late.cancel()
    await asyncio.gather(late, return_exceptions=True)
    assert late.cancelled()
    assert fleet.members[0].in_flight == 0
    await router.close()


async def test_waiting_groups_go_to_a_worker_that_comes_back_and_fail_at_once_when_none_can():
    fleet = ready_fleet(LocalWorker("a"))
    [member] = fleet.members
    router = Router(fleet)
    fleet.mark_down(member, "killed")
    async with AsyncExitStack() as stack:
        waiting = asyncio.create_task(hold(router, stack, "g", 2))
        await eventually(lambda: router.waiting == 1)
        for event in ("restart", "loaded", "caught_up", "verified"):
            fleet.move(member, event)
        assert (await asyncio.wait_for(waiting, 60)) is member
        set_limit(router, 2)
        full = asyncio.create_task(hold(router, stack, "h", 2))
        await eventually(lambda: router.waiting == 1)
        fleet.mark_down(member, "killed again")
        fleet.move(member, "give_up")
        with pytest.raises(ServiceUnavailable, match="killed again"):
            await asyncio.wait_for(full, 60)
        with pytest.raises(ServiceUnavailable, match="killed again"):
            await asyncio.wait_for(router.place(1, 1), 60)
    await router.close()


async def test_a_busy_worker_that_is_gone_is_found_by_the_poll():
    worker = LocalWorker("a")
    fleet = ready_fleet(worker, LocalWorker("b"))
    router = Router(fleet)
    async with AsyncExitStack() as stack:
        await hold(router, stack, "g", 2)
        worker.dead = "killed"
        await eventually(lambda: fleet.members[0].state == "down")
        assert "killed" in fleet.members[0].cause
        assert (await hold(router, stack, "h", 2)).name == "b"
    await router.close()


async def test_nothing_is_polled_while_nothing_runs():
    class Counting(LocalWorker):
        asked = 0

        async def status(self):
            self.asked += 1
            return await super().status()

    worker = Counting("a")
    router = Router(ready_fleet(worker))
    async with AsyncExitStack() as stack:
        await hold(router, stack, "g", 2)
        await eventually(lambda: worker.asked >= 2)
    await eventually(lambda: router._minding.done())
    asked = worker.asked
    await asyncio.sleep(0.1)
    assert worker.asked == asked
