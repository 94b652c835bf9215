"""Workers that die, hang and lie when told to, a crew of them under a supervisor, and a loop whose clock jumps.

`virtually(main())` runs a coroutine in no time: where nothing is left to do the clock moves to the next deadline.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from rlx.config.sections import AsyncSection, ServiceSection
from rlx.errors import ModelError, ServiceUnavailable, WeightSyncError
from rlx.rollout.fleet import Fleet
from rlx.rollout.manifest import Probe, WeightManifest
from rlx.rollout.supervisor import Supervisor
from rlx.rollout.weight_updates import UpdateTimes, WeightUpdates
from rlx.rollout.worker import NoDevices, Taken, WorkerStatus
from rlx.safetensors_layout import TensorSpec
from rlx.wire import Completion, Sampling

T = TypeVar("T")
FAULTS = ("die", "hang", "late", "refuse", "other_bytes", "skew")
LATE_S = 1000.0
START_S = 30.0
SEQUENCE = (1, 2, 3, 4)


class JumpingLoop(asyncio.SelectorEventLoop):
    """`watch` is called between any two steps of what runs; what it raises ends the loop."""

    def __init__(self) -> None:
        self.now = 0.0
        self.watch: Callable[[], None] = lambda: None
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.now


class _Selector(selectors.DefaultSelector):
    """Where the loop would wait for a deadline, it is that late at once."""

    def __init__(self, loop: JumpingLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._loop.watch()
        self._loop.now += timeout or 0.0
        return super().select(None if timeout is None else 0)


def virtually(main: Coroutine[Any, Any, T], seconds: float = 100_000.0) -> T:
    """TimeoutError when it does not end within `seconds` of the jumping clock: it hangs."""

    async def bounded() -> T:
        async with asyncio.timeout(seconds):
            return await main

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(bounded())


class FaultyWorker:
    """`faults[method]` are what the next calls of it do, one each; "ok" does nothing bad. `start` makes a new process.

    die: the process is gone. hang: no answer. late: the answer, and what it does, come LATE_S later. refuse: an
    error. other_bytes (commit): takes other bytes. skew (commit): takes the bytes, but computes something else. no devices
    (start): there are none yet.
    """

    def __init__(self, name: str = "w-0"):
        self.name = name
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.calls: list[str] = []
        self.dead = ""
        self.version, self.data, self.skew = 0, b"", 0.0
        self.verified = 0
        """The version whose log-probs were asked for since it was loaded."""
        self.process = 0
        self.closed = False
        self._token_at = 0.0

    async def start(self) -> None:
        self.process += 1
        self.dead = ""
        self.version, self.data, self.skew, self.verified = 0, b"", 0.0, 0
        if await self._do("start") == "no devices":
            await asyncio.sleep(START_S)
            raise NoDevices(f"worker {self.name} has no GPU")
        await asyncio.sleep(START_S)
        self._check_alive(self.process)
        self._token_at = asyncio.get_running_loop().time()

    async def status(self) -> WorkerStatus:
        await self._do("status")
        age = asyncio.get_running_loop().time() - self._token_at
        return WorkerStatus(self.name, "ready", self.version, age, 0, "here", 1)

    async def generate(self, request_id: str, prompt_ids: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        await self._do("generate")
        self._token_at = asyncio.get_running_loop().time()
        ids = np.array([7], np.int32)
        return [Completion(ids, np.full(1, -0.5, np.float32), ((self.version, 1),), "stop", "7")] * n

    async def prompt_logprobs(self, ids: np.ndarray) -> np.ndarray:
        await self._do("prompt_logprobs")
        self.verified = self.version
        return np.full(ids.size - 1, -0.5 - self.skew, np.float32)

    async def announce(self, manifest: WeightManifest) -> None:
        await self._do("announce")
        if manifest.version <= self.version:
            raise WeightSyncError(f"version {self.version} is already serving")

    async def commit(self, manifest: WeightManifest, path: str) -> Taken:
        fault = await self._do("commit")
        data = Path(path).read_bytes()  # noqa: ASYNC240 - a thread would not wait for the clock that jumps
        if fault == "other_bytes":
            data += b"!"
        self.version, self.data, self.skew = manifest.version, data, 1.0 if fault == "skew" else 0.0
        return Taken(xxhash.xxh3_128_hexdigest(data))

    async def openai(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        return {}

    async def close(self) -> None:
        if self.faults["close"]:
            await self._do("close")
        self.closed = True

    async def _do(self, method: str) -> str:
        self.calls.append(method)
        process = self.process
        self._check_alive(process)
        fault = self.faults[method].pop(0) if self.faults[method] else "ok"
        if fault == "die":
            self.dead = f"killed in {method}"
        elif fault == "hang":
            await asyncio.Event().wait()
        elif fault == "late":
            await asyncio.shield(asyncio.sleep(LATE_S))
        elif fault == "refuse":
            raise (ModelError if method == "start" else WeightSyncError)(f"{method} is refused")
        elif fault == "bug":
            raise KeyError(method)
        self._check_alive(process)
        return fault

    def _check_alive(self, process: int) -> None:
        if self.dead or process != self.process:
            raise ServiceUnavailable(f"worker {self.name} died: {self.dead or 'its process was replaced'}")


class Crew:
    def __init__(self, workers: list[FaultyWorker], service: ServiceSection, async_settings: AsyncSection):
        self.workers, self.settings = workers, service
        self.fleet = Fleet(list(workers), service)
        self.weights = WeightUpdates(self.fleet, service, async_settings)
        self.supervisor = Supervisor(self.fleet, self.weights, service, start_timeout_s=300)
        self.events: list[str] = []
        self.fleet.on_event = self.events.append

    def states(self) -> list[str]:
        return [member.state for member in self.fleet.members]

    def ready(self) -> list[str]:
        return [member.name for member in self.fleet.ready()]

    async def publish(self, version: int, gate: bool = False, probe: bool = True) -> UpdateTimes:
        data = content(version)
        await self.weights.announce(manifest_of(version, gate, probe))
        await self.weights.receive(version, pieces(data))
        return await self.weights.commit(version)

    async def until(self, *names: str, version: int | None = None) -> None:
        """Until exactly these are ready, with these weights."""
        while sorted(self.ready()) != sorted(names) or any(  # noqa: ASYNC110 - on a clock that jumps
            version not in (None, m.weight_version) for m in self.fleet.ready()
        ):
            await asyncio.sleep(0.5)


@asynccontextmanager
async def crew(*workers: FaultyWorker, publish: str = "together", **service: Any) -> AsyncIterator[Crew]:
    made = Crew(list(workers), ServiceSection(**service), AsyncSection(publish=publish))
    for member in made.fleet.members:
        await made.supervisor.bring_up(member)
    made.supervisor.start()
    try:
        yield made
    finally:
        await made.supervisor.close()
        made.weights.close()


def content(version: int) -> bytes:
    return b"%08d" % version * 16


def manifest_of(version: int, gate: bool = False, probe: bool = True) -> WeightManifest:
    data = content(version)
    return WeightManifest(
        version, len(data), xxhash.xxh3_128_hexdigest(data), (TensorSpec("w", "F32", (len(data) // 4,)),),
        probe=Probe((SEQUENCE,), ((-0.5,) * (len(SEQUENCE) - 1),)) if probe else None, gate=gate,
    )  # fmt: skip


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    yield data[:50]
    yield data[50:]
