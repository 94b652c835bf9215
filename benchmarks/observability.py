"""What watching a run costs: the quickstart's step with everything on, against the same run with nothing written or sent.

Real: the learner (`rlx.learner.main.train` on the quickstart's model and data), the gateway in a process of its own, and
everything that watches: files, samples, events, spans, the observer that sends them, tables for a tracker, TensorBoard.
Fake: engines that answer at once, rewards; so the step is shorter than a real one, and the share that watching takes of it
larger. One run; blocks of steps with all of it switched off lie between blocks with
all of it on, and the first step of each block, into which the one before may reach, is left out. CPU seconds are those
of the learner's process, all threads. Then, of the steps with everything on: CPU time per step of each writer, by the
thread that pays it (what the journal hands over is counted in both its lines); and what one scrape of /metrics costs and brings, by the number of workers.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from local_parts import ConstantScorer, SleepEngine, arguments, child, machine, spread, write_json
from service import QUICKSTART, print_versions

from rlx.config import load_config
from rlx.config.sections import AsyncSection, ServiceSection
from rlx.envs.single_turn import SingleTurn
from rlx.rollout.app import create_app
from rlx.rollout.engine_worker import EngineWorker
from rlx.rollout.gateway import serving
from rlx.rollout.service import RolloutService

TOKEN, BLOCK, WARM_UP, TOKENS = "benchmark", 5, 5, 8
SCRAPES = 20


async def serve(listener: socket.socket, workers: int) -> None:
    """The gateway and `workers` workers that answer at once."""
    members = [EngineWorker(f"worker-{i}", SleepEngine(0.0, TOKENS)) for i in range(workers)]
    service = RolloutService(
        list(members), ConstantScorer(), SingleTurn(), ServiceSection(), AsyncSection(parity_threshold=1e9), model="none",
        start_timeout_s=60,
    )  # fmt: skip
    async with serving(create_app(service, TOKEN, require_token_for_data=False), listener):
        await service.start()
        await asyncio.Event().wait()


class Switch:
    """Turns everything that watches off and on between steps, and counts what it costs while it is on."""

    def __init__(self) -> None:
        self.on = True
        self.cpu_s: dict[tuple[str, str], float] = defaultdict(float)
        self.steps: list[tuple[bool, float, float]] = []
        """Of each step: whether on, seconds, and CPU seconds of this process."""
        self._cpu = time.process_time()

    def install(self) -> None:
        from rlx.learner.watch.journal import Journal
        from rlx.learner.watch.observer import Observer
        from rlx.learner.watch.records import RecordFiles
        from rlx.learner.watch.report import RunFiles
        from rlx.learner.watch.trackers import Trackers

        for name in ("event", "took", "published", "saved", "flush", "add"):
            self._count(Journal, name, "training", f"journal.{name}", optional=True)
        self._count(RecordFiles, "put", "training", "hand over records", optional=True)
        self._count(RecordFiles, "_take", "records", lambda arguments: f"{arguments[1]}.jsonl and listeners")
        self._count(Observer, "_send", "observer", "send to the gateway")
        self._count(Trackers, "_each", "trackers", "tensorboard")
        metrics = RunFiles.metrics

        def counted(files: RunFiles, step: int, values: Any) -> None:
            metrics(files, step, values)
            cpu = time.process_time()
            self.steps.append((self.on, values["perf/step_s"], cpu - self._cpu))
            self._cpu, self.on = cpu, (step // BLOCK) % 2 == 0

        RunFiles.metrics = counted  # type: ignore[method-assign]

    def _count(
        self, owner: type, name: str, thread: str, what: str | Callable[[Any], str], optional: bool = False
    ) -> None:
        """Add up the CPU time of a method, each in the thread that calls it; `optional`: not called while off."""
        method = getattr(owner, name)

        def counted(*given: Any, **named: Any) -> Any:
            if optional and not self.on:
                return None
            began = time.thread_time()
            try:
                return method(*given, **named)
            finally:
                key = what if isinstance(what, str) else what(given)
                self.cpu_s[thread, key] += time.thread_time() - began

        setattr(owner, name, counted)

    def measured(self, on: bool) -> tuple[list[float], list[float]]:
        """Seconds and CPU seconds of the steps that count."""
        kept = [s for i, s in enumerate(self.steps) if i >= WARM_UP and i % BLOCK and s[0] == on]
        return [s[1] for s in kept], [s[2] for s in kept]


def train(steps: int) -> Switch:
    """A run of the quickstart of so many steps."""
    import torch

    from rlx.learner.main import train as train_run

    torch.set_num_threads(1)
    switch = Switch()
    switch.install()
    with tempfile.TemporaryDirectory() as folder, child(Path(__file__), {"workers": 1}) as url:
        keys = {
            "trl.vllm_server_base_url": url, "output_dir": folder, "max_steps": steps, "save_strategy": "no",
            "test_datasets": [], "eval_steps": None, "async.max_staleness": 0,
            "use_tensorboard": True, "trl.log_completions": True, "trl.num_completions_to_print": 0,
        }  # fmt: skip
        out, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115  the run's own lines
        try:
            train_run(load_config(QUICKSTART, {tuple(k.split(".")): (k, v) for k, v in keys.items()}), 1)
        finally:
            sys.stdout.close()
            sys.stdout = out
    return switch


def scrape(workers: int) -> dict[str, float]:
    """One look at /metrics of a service with so many workers."""
    with child(Path(__file__), {"workers": workers}) as url, httpx.Client(base_url=url, trust_env=False) as client:
        while client.get("/health").status_code != 200:
            time.sleep(0.1)
        seconds = []
        for _ in range(SCRAPES):
            began = time.perf_counter()
            text = client.get("/metrics").text
            seconds.append(time.perf_counter() - began)
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {
        "workers": workers, "series": len(lines), "bytes": len(text), "ms": 1e3 * statistics.median(seconds),
        "with_worker_label": sum('worker="' in line for line in lines),
    }  # fmt: skip


def main() -> None:
    options = arguments(__doc__).parse_args()
    os.environ["RLX_TOKEN"] = TOKEN
    print_versions()
    steps = 46 if options.quick else 206
    switch = train(steps)
    (on_s, on_cpu), (off_s, off_cpu) = switch.measured(True), switch.measured(False)
    slower, dearer = (
        100 * (statistics.median(a) / statistics.median(b) - 1) for a, b in ((on_s, off_s), (on_cpu, off_cpu))
    )
    print(
        f"{machine()}; the quickstart's step, {len(on_s)} with everything on and {len(off_s)} with nothing, in blocks of {BLOCK}"
    )
    print(f"  seconds:      on {spread(on_s, 4)}, off {spread(off_s, 4)}: {slower:+.1f} %")
    print(f"  CPU seconds:  on {spread(on_cpu, 4)}, off {spread(off_cpu, 4)}: {dearer:+.1f} %")
    watched = sum(on for on, _, _ in switch.steps)
    per_step = {f"{thread}: {what}": 1e6 * cpu / watched for (thread, what), cpu in switch.cpu_s.items()}
    print("CPU microseconds per step, by thread:")
    for name, cpu_us in sorted(per_step.items(), key=lambda item: -item[1]):
        print(f"  {cpu_us:8.0f}  {name}")
    scrapes = [scrape(workers) for workers in (1, 16)]
    per_worker = (scrapes[1]["series"] - scrapes[0]["series"]) / 15
    for found in scrapes:
        print("/metrics, {workers} workers: {series} series, {bytes} bytes, {ms:.1f} ms a scrape".format(**found))
    print(f"series per worker: {per_worker:g}")
    numbers = {
        "on_s": on_s,
        "off_s": off_s,
        "on_cpu_s": on_cpu,
        "off_cpu_s": off_cpu,
        "percent": slower,
        "cpu_percent": dearer,
    }
    write_json(options.json, {**numbers, "cpu_us": per_step, "scrapes": scrapes, "series_per_worker": per_worker})


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].isdigit():
        asyncio.run(serve(socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2])["workers"]))
    else:
        main()
