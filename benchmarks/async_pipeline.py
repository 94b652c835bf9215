"""End to end with engines that only sleep: how close the learner's feed and the service come to what is possible.

Real: feed, ledger, publishing, HTTP, gateway, router, supervisor, and the learner's stream up to its micro-batches.
Fake: engines that replay a trace of lengths in the time that decoding would take (`trace_engine.py`), rewards, and
training, which sleeps `t`. Two processes, as in a run. Per step, g is the generation of the consumed tokens with every
batch full; S, what a synchronous step needs: generation with its tail, then t; A = max(g, t), what no run goes below.
"of the limit" is A ÷ measured step. "at its staleness" is beside the same for the limit that max_staleness leaves
(`trace_engine.bounded_floor_s`, which says why it is one): at 0 about g + t, at 2 hardly above A. TRL's AsyncGRPOTrainer (CPU port, `trl_async_port/`) has the same engines behind
the same trace, the same t and as many samples a step; its limit is of the tokens that it consumed.

C7: t/g 0.3, 1, 3 and max_staleness 0, 1, 2, 4. C8: one worker ten times slower; one completion in a hundred 20 times
as long; a worker that dies in the middle: speed against that of what is left, samples lost and doubled.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from local_parts import BENCHMARKS, ConstantScorer, arguments, child, machine, spread, write_json
from service import print_versions
from trace_engine import FIRST_TICKET, Decode, Trace, TraceEngine, bounded_floor_s, floor_s, makespan_s

from rlx.config import Config, make_plan
from rlx.envs.single_turn import SingleTurn
from rlx.errors import ServiceUnavailable
from rlx.learner.incoming.courier import Waits
from rlx.learner.incoming.data import Prompt
from rlx.learner.incoming.feed import Feed
from rlx.learner.incoming.ledger import Ledger, Rules
from rlx.learner.incoming.requests import prompt_order, ticket_request
from rlx.learner.incoming.scored_groups import has_spread
from rlx.learner.incoming.stream import RolloutStream, StepBatch
from rlx.learner.ranks import Ranks
from rlx.learner.weights.publish import Publisher
from rlx.rollout.app import create_app
from rlx.rollout.client import RolloutClient
from rlx.rollout.engine_worker import EngineWorker
from rlx.rollout.gateway import serving
from rlx.rollout.service import RolloutService

TOKEN = "benchmark"
PORT = BENCHMARKS / "trl_async_port"
WORKERS, SLOTS, GROUPS, GENERATIONS, MEAN = 4, 8, 16, 8, 200
SAMPLES = GROUPS * GENERATIONS
SWAP_S = 0.005
MORE_STEPS = 4
"""Steps after the last measured one, so that the pipeline does not run dry before; with the last of them every prompt
must have been consumed once."""


@dataclass(frozen=True)
class Case:
    """One run. `generation_s`: seconds of generating a step's mean tokens with full batches; `train_s`: t."""

    name: str
    generation_s: float
    train_s: float
    steps: int
    warm_up: int = 4
    outliers: float = 0.0
    slots: int = SLOTS
    speeds: tuple[float, ...] = (1.0,) * WORKERS
    kill_at: int | None = None
    """Step at which the first worker dies, not to come back."""
    seed: int = 0

    @property
    def is_one_short(self) -> bool:
        """Whether the limit is that of the other workers: 1 − 1/W."""
        return self.kill_at is not None or self.speeds[0] < 1

    @property
    def trace(self) -> Trace:
        prompts = GROUPS * (self.steps + MORE_STEPS) * 3  # TRL draws more than it trains
        return Trace(prompts, GENERATIONS, MEAN, 0.9, 4 * MEAN, self.outliers, self.seed)

    @property
    def decode(self) -> Decode:
        """A step of a full batch costs twice that of an almost empty one."""
        mean = float(replace(self.trace, outliers=0.0).lengths().mean())
        full = self.generation_s * self.slots * WORKERS / (SAMPLES * mean)
        return Decode(full / 2, full / 2 / self.slots)

    def settings(self) -> dict[str, Any]:
        return {
            "trace": asdict(self.trace), "decode": asdict(self.decode), "slots": self.slots, "speeds": self.speeds,
            "swap_s": SWAP_S, "kill_at": self.kill_at,
        }  # fmt: skip


@dataclass
class Run:
    """What a run did: times in seconds, per step; `consumed` counts by ticket (rlx: groups, TRL: samples)."""

    ends: list[float]
    tokens: list[int]
    samples: list[int]
    staleness: list[float]
    consumed: Counter[int]
    first: int
    longest: list[int] = field(default_factory=list)
    """Tokens of the longest completion of each step; not known of TRL's"""
    discarded: float = 0.0
    lost: int = 0
    """Groups: prompts of which not every sample was trained, though later ones were"""
    doubled: int = 0

    def cut(self, steps: int) -> None:
        """Measure no more than the first `steps`."""
        self.ends, self.tokens, self.samples, self.staleness = (
            values[:steps] for values in (self.ends, self.tokens, self.samples, self.staleness)
        )

    def limit_s(self, case: Case, max_staleness: int) -> float:
        """Of a measured step, at this `max_staleness`: A where that is more than what the batches' order demands."""
        speeds = case.speeds[1:] if case.is_one_short else case.speeds
        tokens, longest = self.tokens[self.first - 1 :], self.longest[self.first - 1 : len(self.tokens)]
        bound = bounded_floor_s(tokens, longest, max_staleness, case.train_s, case.decode, case.slots, speeds)
        plain = limit_s(case, self.tokens_per_step(), sum(speeds))
        return max(bound / (len(tokens) - 1), plain)

    def step_s(self) -> float:
        return (self.ends[-1] - self.ends[self.first - 1]) / (len(self.ends) - self.first)

    def tokens_per_step(self) -> float:
        return sum(self.tokens[self.first :]) / (len(self.tokens) - self.first)

    def samples_per_step(self) -> float:
        return sum(self.samples[self.first :]) / (len(self.samples) - self.first)


# --- the service, in a process of its own -----------------------------------------------------------------------------


class MortalWorker(EngineWorker):
    """A worker whose process can die; starting another one takes forever."""

    def __init__(self, name: str, engine: TraceEngine):
        super().__init__(name, engine)
        self._trace_engine, self._is_dead = engine, False

    async def start(self) -> None:
        if self._is_dead:
            await asyncio.Event().wait()
        await super().start()

    async def status(self) -> Any:
        self._trace_engine._check_alive()
        return await super().status()

    def die(self) -> None:
        self._is_dead = True
        self._trace_engine.kill(ServiceUnavailable(f"worker {self.name} died"))


async def serve(listener: socket.socket, given: dict[str, Any]) -> None:
    lengths, decode = Trace(**given["trace"]).lengths(), Decode(**given["decode"])
    engines = [
        TraceEngine(lengths, decode, given["slots"], speed=speed, swap_s=given["swap_s"]) for speed in given["speeds"]
    ]
    workers = [MortalWorker(f"worker-{i}", engine) for i, engine in enumerate(engines)]
    config = configuration(0)
    service = RolloutService(
        list(workers), ConstantScorer(), SingleTurn(), config.service, async_settings=config.async_, model="trace",
        start_timeout_s=600,
    )  # fmt: skip
    app = create_app(service, TOKEN, require_token_for_data=False)

    async def kill() -> dict[str, str]:
        workers[0].die()
        return {}

    app.add_api_route("/kill", kill, methods=["POST"])
    async with serving(app, listener):
        await service.start()
        await asyncio.Event().wait()


# --- rlx's learner, in this process -----------------------------------------------------------------------------------


def configuration(max_staleness: int) -> Config:
    return Config.model_validate({
        "base_model": "-", "rl": "grpo", "datasets": [{"path": "-"}], "output_dir": "outputs/benchmark",
        "micro_batch_size": SAMPLES, "async": {"max_staleness": max_staleness}, "service": {"probe_interval": 0.5},
        "trl": {"reward_funcs": ["constant"], "num_generations": GENERATIONS, "generation_batch_size": SAMPLES,
                "max_completion_length": 4 * MEAN, "max_prompt_length": 16, "shuffle_dataset": False},
    })  # fmt: skip


def learn(case: Case, max_staleness: int) -> Run:
    """One training run of rlx against a service of its own."""
    config, trace = configuration(max_staleness), case.trace
    plan, lengths = make_plan(config, 1), trace.lengths()
    prompts = [Prompt(str(n), np.array([1, FIRST_TICKET + n], np.int32), {}) for n in range(trace.prompts)]
    model = torch.nn.Linear(64, 64)
    rules = Rules(GROUPS, case.steps + MORE_STEPS, max_staleness, max_requeues=config.async_.max_requeues)
    run = Run([], [], [], [], Counter(), case.kill_at or case.warm_up)
    with (
        child(Path(__file__), case.settings()) as url,
        RolloutClient(url, TOKEN) as client,
    ):
        httpx.get(f"{url}/health", timeout=300)  # a loaded machine imports for longer than a call may take
        client.wait_until_ready(60)
        feed = Feed(
            client, Publisher(client, torch.float32), None, Ledger(rules), "benchmark", Waits(60, 60),
            request_of=partial(
                ticket_request, config, plan, prompts, prompt_order(config, len(prompts)), "benchmark"
            ),
            has_spread=partial(has_spread, config), evaluates=lambda step: False, on_evaluation=lambda *_: None,
            on_wait=lambda message: None, patience_s=120,
        )  # fmt: skip

        def on_step(batch: StepBatch) -> None:
            found = [[e.num_sampled for e in group.episodes] for group in batch.groups]
            assert found == lengths[list(batch.tickets)].tolist()
            run.consumed.update(batch.tickets)
            run.tokens.append(sum(map(sum, found)))
            run.longest.append(max(map(max, found)))
            run.samples.append(sum(map(len, found)))
            run.staleness.append(batch.times.staleness_mean)
            run.discarded += batch.times.discarded_tokens

        stream = RolloutStream(
            config,
            plan,
            Ranks(60),
            prompts,
            lambda: 0,
            rules.total_steps,
            lambda step: feed.batch(step, model),
            on_step,
        )
        feed.start()
        try:
            for step, _ in enumerate(stream):
                if step == case.kill_at:
                    httpx.post(f"{url}/kill").raise_for_status()
                time.sleep(case.train_s)
                with torch.no_grad():
                    model.weight += 1e-3
                run.ends.append(time.monotonic())
        finally:
            feed.close()
    run.lost = sum(run.consumed[n] < 1 for n in range(rules.total_steps * GROUPS))
    run.doubled = sum(count > 1 for count in run.consumed.values())
    run.cut(case.steps)
    return run


# --- TRL's trainer ----------------------------------------------------------------------------------------------------


def trl(case: Case, max_staleness: int, **more: int) -> Run:
    """One training run of TRL's AsyncGRPOTrainer (CPU port) against the fake server."""
    with fake_vllm() as path, child(PORT / "server.py", case.settings(), ("PYTHONPATH", path)) as url:
        given = case.settings() | more | {
            "url": url, "samples_per_step": SAMPLES, "max_staleness": max_staleness, "train_s": case.train_s,
            "steps": case.steps,
        }  # fmt: skip
        paths = os.pathsep.join([path, *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = {
            **os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "TRL_EXPERIMENTAL_SILENCE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error",
        }  # fmt: skip
        command = [sys.executable, str(PORT / "train.py"), json.dumps(given)]
        done = subprocess.run(command, env=variables, capture_output=True, timeout=600, check=False)
    if done.returncode:
        raise SystemExit(f"TRL's trainer failed:\n{done.stderr.decode()[-4000:]}")
    told = json.loads(done.stdout)
    consumed = Counter({int(group): count for group, count in told["trained"].items()})
    run = Run(
        told["ends"], told["tokens"], told["samples"], told["staleness"], consumed, case.kill_at or case.warm_up,
        discarded=told["dropped"],
    )  # fmt: skip
    settled = sum(consumed.values()) // GENERATIONS - (max_staleness + 1) * GROUPS
    run.lost = sum(consumed[n] < GENERATIONS for n in range(max(settled, 0)))
    run.doubled = sum(count > GENERATIONS for count in consumed.values())
    return run


@contextlib.contextmanager
def fake_vllm() -> Iterator[str]:
    """A path where a distribution named `vllm` can be found, for TRL's check of it."""
    with tempfile.TemporaryDirectory() as folder:
        info = Path(folder) / "vllm-0.31.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.31.0\n")
        yield os.pathsep.join([str(BENCHMARKS), folder])


# --- limits and tables ------------------------------------------------------------------------------------------------


def limit_s(case: Case, tokens: float, alive: float | None = None) -> float:
    """A of a step that consumes `tokens`, with engines of the speeds in `alive` together."""
    speed = sum(case.speeds) if alive is None else alive
    return max(floor_s(round(tokens), case.decode, case.slots, [speed]), case.train_s)


def synchronous_s(case: Case, steps: int = 20) -> float:
    """S: mean over the first steps of the trace."""
    lengths = case.trace.lengths()
    tails = [
        makespan_s(lengths[s * GROUPS : (s + 1) * GROUPS].reshape(-1), case.decode, case.slots, WORKERS)
        for s in range(steps)
    ]
    return statistics.mean(tails) + case.train_s + SWAP_S


def measure(case: Case, ways: dict[str, Way], repeats: int) -> dict[str, Any]:
    """Every way, interleaved; prints a line each."""
    found: dict[str, list[Run]] = {name: [] for name in ways}
    for repeat in range(repeats):
        this = replace(case, seed=repeat)
        for name in list(ways)[:: 1 if repeat % 2 == 0 else -1]:
            found[name].append(ways[name].run(this))
    rows = {}
    alive = sum(case.speeds[1:])
    for name, runs in found.items():
        of_limit = [
            limit_s(replace(case, seed=i), run.tokens_per_step(), alive if case.is_one_short else None) / run.step_s()
            for i, run in enumerate(runs)
        ]
        speed = [run.samples_per_step() / run.step_s() for run in runs]
        lost, doubled = sum(run.lost for run in runs), sum(run.doubled for run in runs)
        stale = statistics.mean(statistics.mean(run.staleness[case.warm_up :] or [math.nan]) for run in runs)
        at_staleness = [
            run.limit_s(replace(case, seed=i), ways[name].max_staleness) / run.step_s()
            for i, run in enumerate(runs)
            if run.longest
        ]
        rows[name] = {
            "samples_s": speed, "of_limit": of_limit, "of_limit_at_its_staleness": at_staleness, "step_s": [run.step_s() for run in runs], "staleness": stale,
            "lost": lost, "doubled": doubled, "discarded": [run.discarded for run in runs],
        }  # fmt: skip
        print(
            f"    {name:28} {spread(speed, 1):24} samples/s   of the limit {spread(of_limit):20}  at its staleness "
            f"{spread(at_staleness) if at_staleness else '':20}  staleness {stale:4.2f}  groups lost {lost}, doubled {doubled}", flush=True,
        )  # fmt: skip
    return {"case": case.name, "rows": rows}


@dataclass(frozen=True)
class Way:
    run: Callable[[Case], Run]
    max_staleness: int


def ours(*max_staleness: int) -> dict[str, Way]:
    return {f"rlx, max_staleness {k}": Way(partial(learn, max_staleness=k), k) for k in max_staleness}


def theirs(*max_staleness: int) -> dict[str, Way]:
    return {f"TRL async, staleness {k} ¹": Way(partial(trl, max_staleness=k), k) for k in max_staleness}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=("c7", "c8"))
    parser.add_argument("--case", help="only those whose name begins so: t/g 1, one worker 10, 1 %%, one worker dies")
    parser.add_argument("--staleness", type=int, nargs="+", metavar="K", help="only these")
    parser.add_argument("--no-trl", action="store_true", help="without TRL's trainer, which takes 20 s to start")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--generation-s", type=float, default=1.0, help="g of a step, before its tail")
    given = parser.parse_args()
    print_versions()
    repeats, steps = given.repeats or (1 if given.quick else 5), 12 if given.quick else 20
    print(
        f"{WORKERS} engines × {SLOTS} sequences, {GROUPS} × {GENERATIONS} samples a step, log-normal lengths (σ 0.9, "
        f"mean {MEAN}, at most {4 * MEAN} tokens); {repeats} runs of {steps} steps, 4 of them warm-up; median (min to max); "
        f"{machine()}", flush=True,
    )  # fmt: skip
    g, tables = given.generation_s, []
    asked = given.staleness
    against = {} if given.no_trl else theirs(*(k for k in asked or ((2,) if given.quick else (2, 4)) if k > 1))
    if given.only != "c8":
        for ratio in (1.0,) if given.quick and not given.case else (0.3, 1.0, 3.0):
            case = Case(f"t/g {ratio:g}", g, ratio * g, steps if ratio <= 1 else max(steps // 2, 10))
            if not case.name.startswith(given.case or ""):
                continue
            ways = ours(*(asked or ((0, 2) if given.quick else (0, 1, 2, 4))))
            tables.append(told(case, ways | against, repeats))
    if given.only != "c7":
        base = Case("", g, 0.3 * g, steps + 4)
        cases = [
            replace(base, name="one worker 10 times slower", speeds=(0.1, *(1.0,) * (WORKERS - 1))),
            replace(base, name="1 % of lengths × 20", outliers=0.01, slots=SLOTS // 4),
            replace(base, name="one worker dies, and stays away", kill_at=8),
        ]
        for case in cases:
            if not case.name.startswith(given.case or ""):
                continue
            ways = ours(*(asked or ((2,) if given.quick else (0, 2, 4))))
            # vLLM's server ends with any of its engines, and so would TRL's run.
            tables.append(told(case, ways if case.kill_at else ways | against, repeats))
    if against:
        print("¹ CPU port of trl.experimental.async_grpo, its forward and backward replaced by the same sleep")
    write_json(given.json, {"cases": tables})


def told(case: Case, ways: dict[str, Way], repeats: int) -> dict[str, Any]:
    tokens = float(case.trace.lengths()[: GROUPS * case.steps].sum()) / case.steps
    floor, whole = limit_s(case, tokens, sum(case.speeds[1:]) if case.is_one_short else None), synchronous_s(case)
    longest = case.trace.lengths()[: GROUPS * case.steps].max() * case.decode.step_s(case.slots)
    print(
        f"  {case.name}: t {case.train_s:.2f} s, A {floor:.2f} s"
        + (f" of the other {WORKERS - 1}" if case.is_one_short else f", S {whole:.2f} s, S/A {whole / floor:.2f}")
        + f"; the longest completion takes {longest:.1f} s",
        flush=True,
    )
    return measure(case, ways, repeats) | {"limit_s": floor, "synchronous_s": whole, "train_s": case.train_s}


def _server() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    listener.setblocking(False)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    asyncio.run(serve(listener, json.loads(sys.argv[2])))


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].isdigit():
        _server()
    else:
        main()
