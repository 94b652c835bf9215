"""8 to 4,096 workers behind the real control plane, all in one process: where does it saturate?

Real: service, group store, router, fleet, weight updates. Simulated: workers, which sleep. Three questions at each size:

- routing alone: processor time to find a worker for a group and to give it back, the fleet half busy, beside a plain
  round robin; and of a whole group through the service (store, deadline, router, episodes, scorer), workers instant.
- load: every worker gets 8 groups of 8 samples that take 4 to 12 s, so that an ideal fleet of W finishes W groups a
  second; what share of that is reached, and how busy the process is with it.
- publish: seconds from the announcement of 1 MB to the last commit, and the pause of a worker, where every worker takes
  20 ms for its swap. Its bytes are written once; Ray's transfer to other nodes is not in it.

Not in it: HTTP (see gateway_ceiling.py) and the network.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import xxhash
from local_parts import ConstantScorer, SleepEngine, arguments, machine, spread, write_json
from service import print_versions

from rlx.config.sections import AsyncSection, ServiceSection
from rlx.envs.single_turn import SingleTurn
from rlx.rollout.engine_worker import EngineWorker
from rlx.rollout.gateway import quiet_collector
from rlx.rollout.manifest import WeightManifest
from rlx.rollout.service import RolloutService
from rlx.rollout.worker import Taken
from rlx.wire import Completion, GroupRequest, Sampling

SIZES = (8, 64, 256, 1024, 4096)
GENERATIONS, TOKENS, GROUPS_EACH = 8, 16, 8
SHORTEST_S, LONGEST_S = 4.0, 12.0
SWAP_S = 0.02
PAYLOAD = b"w" * 2**20


class SlowEngine(SleepEngine):
    """Groups take `shortest` to `longest` seconds, an update SWAP_S."""

    def __init__(self, shortest: float, longest: float):
        super().__init__(0.0, TOKENS)
        self._range = shortest, longest

    async def generate(self, request_id: str, prompt_ids: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        self._seconds = random.uniform(*self._range)
        return await super().generate(request_id, prompt_ids, n, sampling)

    async def commit(self, manifest: WeightManifest, path: str) -> Taken:
        began = time.perf_counter()
        await asyncio.sleep(SWAP_S)
        self._version = manifest.version
        return Taken(manifest.fingerprint, time.perf_counter() - began)


def fleet(size: int, shortest: float, longest: float) -> RolloutService:
    workers = [EngineWorker(f"worker-{i:04}", SlowEngine(shortest, longest)) for i in range(size)]
    return RolloutService(
        list(workers), ConstantScorer(), SingleTurn(), ServiceSection(), async_settings=AsyncSection(), model="none",
        start_timeout_s=60,
    )  # fmt: skip


async def started(service: RolloutService) -> None:
    """With Python's collector set as in the gateway."""
    await service.start()
    gc.unfreeze()
    quiet_collector()


def request(number: int) -> GroupRequest:
    return GroupRequest(f"k/{number}", "p", np.arange(1, 65, dtype=np.int32), GENERATIONS, Sampling(TOKENS))


# --- routing ----------------------------------------------------------------------------------------------------------


async def routing(size: int, groups: int) -> dict[str, float]:
    """Microseconds of processor time per group: the router alone, a round robin, the whole service."""
    service = fleet(size, 0.0, 0.0)
    await started(service)
    try:
        router, held = service.router, []
        for _ in range(size * GROUPS_EACH // 2):
            held.append(await router.place(GENERATIONS, GENERATIONS * 80))
        random.shuffle(held)
        began = time.process_time()
        for turn in range(groups):
            charge = await router.place(GENERATIONS, GENERATIONS * 80)
            held[turn % len(held)].close()
            held[turn % len(held)] = charge
        router_us = 1e6 * (time.process_time() - began) / groups
        for charge in held:
            charge.close()

        cycle = itertools.cycle(service.fleet.members)
        began = time.process_time()
        for _ in range(groups):
            with service.fleet.charging(next(cycle), GENERATIONS):
                pass
        round_robin_us = 1e6 * (time.process_time() - began) / groups

        numbers = iter(range(groups))

        async def submit() -> None:
            for number in numbers:
                await service.rollout(request(number))

        began = time.process_time()
        await asyncio.gather(*(submit() for _ in range(min(size, 256))))
        return {
            "router_us": router_us,
            "round_robin_us": round_robin_us,
            "service_us": 1e6 * (time.process_time() - began) / groups,
        }
    finally:
        await service.drain(1)


# --- load -------------------------------------------------------------------------------------------------------------


async def load(size: int, seconds: float) -> dict[str, float]:
    """Share of the ideal W groups a second, after the first two durations; share of a core that it took."""
    service = fleet(size, SHORTEST_S, LONGEST_S)
    await started(service)
    numbers, done, late = itertools.count(), [0], [0.0]

    async def submit(delay: float) -> None:
        await asyncio.sleep(delay)
        while True:
            await service.rollout(request(next(numbers)))
            done[0] += 1

    async def watch() -> None:
        while True:
            due = time.perf_counter() + 0.1
            await asyncio.sleep(0.1)
            late.append(time.perf_counter() - due)

    count = size * GROUPS_EACH
    tasks = [asyncio.create_task(submit(LONGEST_S * i / count)) for i in range(count)]
    tasks.append(asyncio.create_task(watch()))
    try:
        await asyncio.sleep(2 * LONGEST_S)
        before, began, spent = done[0], time.perf_counter(), time.process_time()
        late.clear()
        await asyncio.sleep(seconds)
        passed = time.perf_counter() - began
        ideal = size * GROUPS_EACH / ((SHORTEST_S + LONGEST_S) / 2)
        return {
            "groups_s": (done[0] - before) / passed,
            "of_ideal": (done[0] - before) / passed / ideal,
            "core": (time.process_time() - spent) / passed,
            "loop_lag_p99_s": sorted(late)[int(len(late) * 0.99)] if late else passed,
        }
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await service.drain(1)


# --- publish ----------------------------------------------------------------------------------------------------------


async def publish(size: int, repeats: int) -> list[dict[str, float]]:
    """Seconds from announcement to the end of the commit, idle fleet."""
    service = fleet(size, 0.0, 0.0)
    await started(service)

    async def chunks() -> AsyncIterator[bytes]:
        yield PAYLOAD

    found = []
    try:
        for version in range(1, repeats + 2):
            manifest = WeightManifest(version, len(PAYLOAD), xxhash.xxh3_128_hexdigest(PAYLOAD), ())
            began = time.perf_counter()
            await service.weights.announce(manifest)
            await service.weights.receive(version, chunks())
            times = await service.weights.commit(version)
            assert not times.behind, times.behind
            found.append({"total_s": time.perf_counter() - began, "pause_s": times.pause_s})
        return found[1:]
    finally:
        await service.drain(1)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--only", choices=("routing", "load", "publish"))
    given = parser.parse_args()
    print_versions()
    repeats, groups = (1, 2000) if given.quick else (5, 5000)
    sizes = given.sizes or ((8, 1024, 4096) if given.quick else SIZES)
    print(f"one process, groups of {GENERATIONS}; {repeats} repeats, median (min to max); {machine()}", flush=True)
    tables: dict[str, Any] = {}
    if given.only in (None, "routing"):
        print("  workers    router µs/group          round robin µs           whole service µs/group")
        tables["routing"] = {size: _routing_line(size, groups, repeats) for size in sizes}
    if given.only in (None, "publish"):
        print(f"  workers    announce to committed, ms      longest pause, ms   (a swap takes {1000 * SWAP_S:.0f} ms)")
        tables["publish"] = {size: _publish_line(size, max(repeats, 3)) for size in (1, *sizes)}
    if given.only in (None, "load"):
        print("  workers    groups/s   of ideal   of a core   loop lag p99, ms")
        tables["load"] = {size: _load_line(size, 10.0 if given.quick else 20.0) for size in sizes}
    print(
        "Limit: linear, for as long as one core suffices. Routing and service: 1 s ÷ µs/group are the groups that one process "
        "ends at; then the event loop is late, and service.direct takes over. Publish: the swap, and then one process's time "
        "for two calls to each worker."
    )
    write_json(given.json, tables)


def _routing_line(size: int, groups: int, repeats: int) -> list[dict[str, float]]:
    found = [asyncio.run(routing(size, groups)) for _ in range(repeats)]
    told = [spread([run[key] for run in found], 1) for key in ("router_us", "round_robin_us", "service_us")]
    print(f"  {size:7}    {told[0]:24} {told[1]:24} {told[2]}", flush=True)
    return found


def _publish_line(size: int, repeats: int) -> list[dict[str, float]]:
    found = asyncio.run(publish(size, repeats))
    told = [spread([1000 * run[key] for run in found], 1) for key in ("total_s", "pause_s")]
    print(f"  {size:7}    {told[0]:30} {told[1]}", flush=True)
    return found


def _load_line(size: int, seconds: float) -> dict[str, float]:
    run = asyncio.run(load(size, seconds))
    print(
        f"  {size:7}    {run['groups_s']:8.1f}   {run['of_ideal']:8.3f}   {run['core']:9.2f}   {1000 * run['loop_lag_p99_s']:8.1f}",
        flush=True,
    )
    return run


if __name__ == "__main__":
    main()
