"""A rollout service without Ray and vLLM, for benchmarks of what lies around the engines, and how they are run."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rlx.episode import Episode
from rlx.rollout.manifest import WeightManifest, fingerprint
from rlx.rollout.worker import EngineLoad, Taken
from rlx.wire import Completion, GroupRequest, RewardOutcome, Sampling

BENCHMARKS = Path(__file__).parent


class ConstantScorer:
    """One reward of 0 or 1 per completion, by its place in the group."""

    async def start(self) -> None: ...

    async def score(
        self, request: GroupRequest, episodes: list[Episode]
    ) -> tuple[list[RewardOutcome], dict[str, float]]:
        return [RewardOutcome("constant", np.arange(len(episodes), dtype=np.float32) % 2, 0.0)], {}

    async def close(self) -> None: ...


class SleepEngine:
    """Answers every request after `seconds` with `tokens` tokens a completion, whatever else it does."""

    def __init__(self, seconds: float, tokens: int):
        self._seconds, self._version, self._running = seconds, 0, 0
        self._ids, self._logprobs = np.full(tokens, 7, np.int32), np.full(tokens, -1.0, np.float32)

    async def start(self) -> None: ...

    async def generate(self, request_id: str, prompt_ids: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        self._running += n
        try:
            await asyncio.sleep(self._seconds)
        finally:
            self._running -= n
        versions = ((self._version, self._ids.size),)
        return [Completion(self._ids, self._logprobs, versions, "stop", "") for _ in range(n)]

    async def prompt_logprobs(self, ids: np.ndarray) -> np.ndarray:
        return np.full(ids.size - 1, -1.0, np.float32)

    async def announce(self, manifest: WeightManifest) -> None: ...

    async def commit(self, manifest: WeightManifest, path: str) -> Taken:
        self._version = manifest.version
        return Taken(fingerprint(await asyncio.to_thread(Path(path).read_bytes)))

    def weight_version(self) -> int:
        return self._version

    def seconds_since_token(self) -> float:
        return 0.0

    def load(self) -> EngineLoad:
        return EngineLoad(running=self._running)

    async def openai(self, route: str, body: dict[str, Any]) -> dict[str, Any] | AsyncIterator[str]:
        return {"error": {"code": 404, "message": "not served here"}}

    async def close(self) -> None: ...


class LoopLag:
    """How late this event loop wakes up from a sleep of 10 ms, in seconds, since the last look."""

    def __init__(self) -> None:
        self._late: list[float] = []
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            due = time.perf_counter() + 0.01
            await asyncio.sleep(0.01)
            self._late.append(time.perf_counter() - due)

    def take(self) -> dict[str, float]:
        """Seconds; `cpu_s` of this process since it began."""
        late, self._late = sorted(self._late), []
        found = {"p50": late[len(late) // 2], "p99": late[int(len(late) * 0.99)], "max": late[-1]} if late else {}
        return {**found, "cpu_s": time.process_time()}


# --- running ----------------------------------------------------------------------------------------------------------


@contextmanager
def child(program: Path, settings: dict[str, Any], *environment: tuple[str, str]) -> Iterator[str]:
    """`python PROGRAM FD SETTINGS_JSON` with a listening socket; gives its URL. The program ends with this process."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(4096)
    port = listener.getsockname()[1]
    command = [sys.executable, str(program), str(listener.fileno()), json.dumps(settings)]
    paths = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    given = dict(environment)
    paths = [given.pop("PYTHONPATH", ""), *paths]
    variables = {**os.environ, **given, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = subprocess.Popen(command, pass_fds=[listener.fileno()], env=variables)
    listener.close()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:  # what was measured counts all the same
            process.kill()
            process.wait()


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats and sizes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    return parser


def spread(values: list[float], digits: int = 2) -> str:
    """`median (min to max)`."""
    middle, low, high = (f"{v:.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def machine() -> str:
    return f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores"


def write_json(path: Path | None, numbers: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps({**numbers, "load_average": os.getloadavg()[0]}, indent=1) + "\n")
