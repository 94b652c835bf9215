"""C7 and C8 in virtual time: what the scheduling alone reaches, exact and repeatable whatever else the machine does.

    python benchmarks/pipeline_simulation.py [--seeds N] [--first-seed N] [--only NAME ...]

Real: router, fleet, engines that replay a trace (`trace_engine.py`), and the learner's ledger. Here: an event loop whose
clock jumps to the next event, and a learner that dispatches, waits, gives up and publishes as `incoming/feed.py` does,
with 10 ms for a group's way and 30 ms for an update. The cases are `async_pipeline.py`'s and others, so that no rule is
fitted to one distribution. "of the limit" is as there.
"""

from __future__ import annotations

import argparse
import asyncio
import selectors
import statistics
import time
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from local_parts import spread
from service import print_versions
from trace_engine import FIRST_TICKET, Decode, Trace, TraceEngine, bounded_floor_s, floor_s

from rlx.config.sections import ServiceSection
from rlx.learner.incoming.feed import PATIENCE
from rlx.learner.incoming.ledger import Ledger, Rules, Taken
from rlx.rollout.engine_worker import EngineWorker
from rlx.rollout.fleet import Fleet
from rlx.rollout.router import Router
from rlx.wire import Sampling

WAY_S, PUBLISH_S, SWAP_S = 0.005, 0.03, 0.005
WARM_UP, MORE_STEPS = 4, 4


@dataclass(frozen=True)
class Case:
    """Seconds: `train_s` of a step, `generation_s` of its mean tokens with all batches full. Lengths are log-normal around
    200 tokens, `longest` times that at most. `evaluate`: groups of an evaluation, one every 6 steps."""

    name: str
    train_s: float = 1.0
    generation_s: float = 1.0
    max_staleness: int = 2
    workers: int = 4
    slots: int = 8
    groups: int = 16
    generations: int = 8
    sigma: float = 0.9
    longest: int = 4
    outliers: float = 0.0
    slow: float = 1.0
    steps: int = 24
    evaluate: int = 0
    seed: int = 0

    @property
    def trace(self) -> Trace:
        prompts = self.groups * (self.steps + MORE_STEPS) * 2
        return Trace(prompts, self.generations, 200, self.sigma, 200 * self.longest, self.outliers, self.seed)

    @property
    def decode(self) -> Decode:
        mean = float(replace(self.trace, outliers=0.0).lengths().mean())
        full = self.generation_s * self.slots * self.workers / (self.groups * self.generations * mean)
        return Decode(full / 2, full / 2 / self.slots)

    @property
    def speeds(self) -> tuple[float, ...]:
        return (self.slow, *(1.0,) * (self.workers - 1))


CASES = (
    Case("t/g 0.3", 0.3), Case("t/g 1"), Case("t/g 3", 3.0), Case("t/g 0.3, staleness 1", 0.3, max_staleness=1),
    Case("t/g 1, staleness 1", max_staleness=1), Case("t/g 1, staleness 4", max_staleness=4),
    Case("1 % x 20", 0.3, outliers=0.01, slots=2), Case("one 10 x slower", 0.3, slow=0.1), Case("t/g 0.8", 0.8),
    Case("sigma 0.5", sigma=0.5), Case("sigma 1.3, longest x 16", sigma=1.3, longest=16), Case("one worker", workers=1, groups=4),
    Case("8 workers x 4", workers=8, slots=4), Case("2 workers x 32", workers=2, slots=32, groups=32),
    Case("evaluations, t/g 0.3", 0.3, evaluate=32), Case("evaluations, t/g 1, staleness 1", max_staleness=1, evaluate=32),
    Case("8 groups of 16", groups=8, generations=16), Case("64 groups", groups=64),
)  # fmt: skip


class _Clock(selectors.SelectSelector):
    """Instead of waiting, the time jumps."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("nothing will ever happen")
        self.now += max(timeout, 0.0)
        return []


class _Run:
    def __init__(self, case: Case):
        self.case = case
        self._lengths = case.trace.lengths()
        self._engines = [TraceEngine(self._lengths, case.decode, case.slots, speed=speed) for speed in case.speeds]
        self._fleet = Fleet([EngineWorker(f"w{i}", e) for i, e in enumerate(self._engines)], ServiceSection())
        for member in self._fleet.members:
            for event in ("loaded", "caught_up", "verified"):
                self._fleet.move(member, event)
        self._router = Router(self._fleet)
        self._ledger = Ledger(Rules(case.groups, case.steps + MORE_STEPS, case.max_staleness))
        self._tasks: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._sent: dict[tuple[int, int], float] = {}
        self._held: dict[tuple[int, int], float] = {}
        self._lengths_of: dict[int, list[int]] = {}
        self._changed, self._sent_step, self._publishing = asyncio.Event(), -1, False
        self._failed: BaseException | None = None
        self.put_back, self.evaluation_s, self.ends = 0, [], []  # type: int, list[float], list[float]
        self.trained: list[list[int]] = []

    async def run(self) -> None:
        for step in range(self.case.steps + MORE_STEPS):
            taken = await self._batch(step)
            for key in taken.cancelled:
                self._tasks.pop(key).cancel()
            self.put_back += len(taken.cancelled) + len(taken.dropped)
            self._pump()
            self.trained.append([n for number in taken.consumed for n in self._lengths_of.pop(number)])
            await asyncio.sleep(self.case.train_s)
            self.ends.append(time.monotonic())
        await self._router.close()

    def of_limit(self) -> tuple[float, float]:
        """And of the limit that its staleness leaves."""
        case, first, last = self.case, WARM_UP - 1, self.case.steps
        step_s = (self.ends[last - 1] - self.ends[first]) / (last - WARM_UP)
        tokens, longest = [sum(step) for step in self.trained[first:last]], [max(s) for s in self.trained[first:last]]
        floor = max(floor_s(sum(tokens[1:]), case.decode, case.slots, case.speeds) / (last - WARM_UP), case.train_s)
        bound = bounded_floor_s(tokens, longest, case.max_staleness, case.train_s, case.decode, case.slots, case.speeds)
        return floor / step_s, max(floor, bound / (last - WARM_UP)) / step_s

    # --- the learner ----------------------------------------------------------------------------------------------

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._failed = task.exception()
        self._changed.set()

    async def _batch(self, step: int) -> Taken:
        while True:
            if self._failed is not None:
                raise self._failed
            is_sent = self._sent_step >= step
            if is_sent or self._publishing:
                may_take = is_sent or not self._evaluates(step)
                if may_take and (taken := self._ledger.take()) is not None:
                    return taken
                await self._wait(self._give_up() if may_take else None)
                continue
            self._sent_step, self._publishing = step, True
            self._start(self._publish(step))

    async def _wait(self, until: float | None) -> None:
        self._changed.clear()
        try:
            async with asyncio.timeout_at(until):
                await self._changed.wait()
        except TimeoutError:
            pass  # somebody is to be given up

    def _give_up(self) -> float | None:
        now, held = time.monotonic(), {(ticket.number, ticket.attempt) for ticket in self._ledger.held_up_by()}
        self._held = {key: self._held.get(key, now) for key in held}
        ends = {key: since + PATIENCE * (since - self._sent[key]) for key, since in self._held.items()}
        for (number, _), end in ends.items():
            if end <= now + 1e-9:
                self._ledger.give_up(number)
        return min(ends.values(), default=None)

    def _pump(self) -> None:
        for ticket in self._ledger.dispatch():
            key = (ticket.number, ticket.attempt)
            self._sent[key] = time.monotonic()
            self._tasks[key] = self._start(self._group(*key))

    async def _group(self, number: int, attempt: int) -> None:
        await asyncio.sleep(WAY_S)
        lengths, oldest = await self._sample(number)
        await asyncio.sleep(WAY_S)
        del self._tasks[number, attempt]
        if self._ledger.arrived(number, attempt, oldest) == "kept":
            self._lengths_of[number] = lengths
        self._pump()

    async def _sample(self, number: int) -> tuple[list[int], int]:
        """Tokens of the group's completions, and the policy of the oldest."""
        n, most = self.case.generations, 200 * self.case.longest
        with await self._router.place(n, n * most) as member:
            prompt = np.array([1, FIRST_TICKET + number], np.int32)
            found = await member.worker.generate("", prompt, n, Sampling(max_tokens=most))
        return [c.ids.size for c in found], min(version for c in found for version, _ in c.versions) - 1

    # --- its courier ----------------------------------------------------------------------------------------------

    async def _publish(self, step: int) -> None:
        await asyncio.sleep(PUBLISH_S)
        with self._fleet.moving_to(step + 1):
            for engine in self._engines:
                await engine.pause()
            await asyncio.sleep(SWAP_S)
            for engine, member in zip(self._engines, self._fleet.members, strict=True):
                engine.resume(step + 1)
                self._fleet.took(member, step + 1)
        due, evaluation = self._evaluates(step), None
        if due and self.case.max_staleness:
            evaluation = self._start(self._evaluate(step))
            await asyncio.sleep(2 * WAY_S)  # its groups are in the queue
        loads = [member.load for member in self._fleet.members]
        waiting = sum(load.waiting for load in loads) + self._router.waiting_completions
        self._ledger.serve(step)
        self._ledger.fit(self.case.workers, sum(load.running for load in loads), waiting)
        self._pump()
        self._changed.set()
        if due:
            await (evaluation or self._evaluate(step))
        self._publishing = False

    def _evaluates(self, step: int) -> bool:
        return bool(self.case.evaluate and step and step % 6 == 0)

    async def _evaluate(self, step: int) -> None:
        began, last = time.monotonic(), len(self._lengths) - 1
        await asyncio.sleep(WAY_S)
        await asyncio.gather(*(self._sample(last - i) for i in range(self.case.evaluate)))
        self.evaluation_s.append(time.monotonic() - began)


def simulate(case: Case) -> _Run:
    clock, real = _Clock(), time.monotonic
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = time.monotonic = lambda: clock.now  # type: ignore[method-assign]
    try:
        run = _Run(case)
        loop.run_until_complete(run.run())
        return run
    finally:
        time.monotonic = real
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def _evaluation(runs: list[_Run]) -> str:
    """What each evaluation added to a run."""
    added = [(run.ends[-1] - simulate(replace(run.case, evaluate=0)).ends[-1]) / len(run.evaluation_s) for run in runs]
    lasted = statistics.mean(seconds for run in runs for seconds in run.evaluation_s)
    return f"{statistics.median(added):.2f} ({min(added):.2f} to {max(added):.2f}) s, and lasts {lasted:.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases whose name begins so")
    given = parser.parse_args()
    print_versions()
    for case in CASES:
        if given.only and not case.name.startswith(tuple(given.only)):
            continue
        runs = [simulate(replace(case, seed=given.first_seed + i)) for i in range(given.seeds)]
        if case.evaluate:
            work_s = case.generation_s * case.evaluate / case.groups
            print(
                f"  {case.name:34} an evaluation of {work_s:.1f} s of generation adds {_evaluation(runs)}", flush=True
            )
            continue
        plain, bounded = (spread(list(ratios), 3) for ratios in zip(*(run.of_limit() for run in runs), strict=True))
        put_back = statistics.mean(run.put_back for run in runs)
        print(
            f"  {case.name:34} of the limit {plain}, at its staleness {bounded}, {put_back:.1f} groups put back",
            flush=True,
        )


if __name__ == "__main__":
    main()
