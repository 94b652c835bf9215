"""A rollout worker as the gateway sees it: `rlx.rollout.worker.Worker` over the Ray actor of `rollout_actor`."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from rlx.cluster.calls import call, create, stream
from rlx.cluster.packed import ask, unpack
from rlx.cluster.ray_runtime import PLACEMENT_TIMEOUT_S, RayRuntime
from rlx.cluster.reservation import Reservation
from rlx.cluster.rollout_actor import Place, RolloutActor
from rlx.errors import DeadlineExceeded, ServiceUnavailable
from rlx.rollout.engine import Engine
from rlx.rollout.manifest import WeightManifest
from rlx.rollout.worker import NoDevices, Taken, WorkerStatus
from rlx.wire import Completion, Sampling

if TYPE_CHECKING:
    from rlx.cluster.direct import DirectSettings

STATUS_TIMEOUT_S = 15.0
CREATE_TIMEOUT_S = 90.0
CLOSE_TIMEOUT_S = 15.0
_CONCURRENCY = 1024


class WeightParcel:
    """The newest weights, made ready once for all workers: in Ray's object store for those of other nodes; and their
    manifest as bytes, which Ray would pickle anew for each."""

    def __init__(self) -> None:
        self._fingerprint = ""
        self._ref: ray.ObjectRef[np.ndarray] | None = None
        self._described: tuple[WeightManifest | None, bytes] = (None, b"")

    def described(self, manifest: WeightManifest) -> bytes:
        """JSON."""
        if self._described[0] is not manifest:
            self._described = manifest, json.dumps(manifest.to_json()).encode()
        return self._described[1]

    def of(self, manifest: WeightManifest, path: str) -> ray.ObjectRef[np.ndarray]:
        if self._ref is None or self._fingerprint != manifest.fingerprint:
            self._ref = ray.put(np.memmap(path, dtype=np.uint8, mode="r"))
            self._fingerprint = manifest.fingerprint
        return self._ref


class RayWorker:
    """Engine `index`, on devices of its own. `start` makes its actor, also again after its process or its node died: on
    the same devices, or, when their node is gone, on others as soon as Ray has some. The log goes on in one file.
    `on_phase` hears its name and what it does."""

    def __init__(
        self,
        index: int,
        build_engine: Callable[[], Engine],
        *,
        runtime: RayRuntime,
        log_dir: Path,
        parcel: WeightParcel,
        reserve_timeout_s: float = PLACEMENT_TIMEOUT_S,
        direct: DirectSettings | None = None,
        on_phase: Callable[[str, str], None] = lambda name, phase: None,
    ):
        self.name = f"rlx-rollout-{index}"
        self.phase = "waiting"
        self.url = ""
        """Of its own endpoint (`service.direct`), once it has started."""
        self.log = log_dir / f"{self.name}.log"
        self._index = index
        self._build_engine = build_engine
        self._runtime = runtime
        self._parcel = parcel
        self._reserve_timeout_s = reserve_timeout_s
        self._direct = direct
        self._on_phase = on_phase
        self._actor: Any = None
        self._place: Place | None = None
        self._last_place: Place | None = None
        """Of the process before, also when one after it never came up"""
        self._phase_since = time.monotonic()

    @property
    def handle(self) -> Any:
        """Of the actor, for the episodes' processes, which sample there without a detour through the gateway.
        ServiceUnavailable while it is replaced."""
        return self._alive()

    async def start(self) -> None:
        """Reserve the devices unless they are, make the actor, load the engine. The caller bounds the loading;
        NoDevices after `reserve_timeout_s` seconds without any."""
        before = self._last_place = self._place or self._last_place
        self._kill()
        await self._make_actor()
        self._enter("loading the model")
        self.url = await self._call("start", before, _this_node())
        self._enter("ready")

    async def _make_actor(self) -> None:
        reservation = self._runtime.reservation(self._index)
        while self._place is None:
            await self._reserve(reservation)
            self._enter("starting its process")
            self._actor = await create(
                RolloutActor,
                self.name,
                self.name,
                self._build_engine,
                str(self.log.absolute()),
                self._direct,
                num_cpus=reservation.bundle.get("CPU", 0),
                num_gpus=reservation.bundle.get("GPU", 0),
                max_concurrency=_CONCURRENCY,
                scheduling_strategy=reservation.strategy,
            )
            try:
                self._place = await call(self._actor.place.remote(), self._who, CREATE_TIMEOUT_S)
            except (DeadlineExceeded, ServiceUnavailable):
                if await reservation.held():
                    raise
                self._kill()  # its node died meanwhile

    async def _reserve(self, reservation: Reservation) -> None:
        self._enter("reserving its devices")
        try:
            await reservation.wait(self._reserve_timeout_s, self._waits)
        except ServiceUnavailable as error:
            raise NoDevices(f"{self._who} has {error}") from None

    def _waits(self, missing: str) -> None:
        self.phase = f"waiting for {missing}"
        self._on_phase(self.name, self.phase)

    async def status(self) -> WorkerStatus:
        return await self._call("status", timeout_s=STATUS_TIMEOUT_S)

    async def generate(self, request_id: str, prompt_ids: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        asked = ask(self._alive(), request_id, prompt_ids, n, sampling)
        return unpack(await call(asked, self._who, hint=self._hint))

    async def prompt_logprobs(self, ids: np.ndarray) -> np.ndarray:
        return await self._call("prompt_logprobs", ids)

    async def announce(self, manifest: WeightManifest) -> None:
        await self._call("announce", self._parcel.described(manifest))

    async def commit(self, manifest: WeightManifest, path: str) -> Taken:
        """On the gateway's node the file is read in place; to other nodes its bytes travel through Ray."""
        if self.node_id != _this_node():
            return await self._call("commit_bytes", self._parcel.described(manifest), self._parcel.of(manifest, path))
        return await self._call("commit", self._parcel.described(manifest), path)

    async def openai(self, route: str, body: dict[str, Any]) -> dict[str, Any] | AsyncIterator[str]:
        if not body.get("stream"):
            return await self._call("openai", route, body)
        items = self._alive().openai_stream.options(num_returns="streaming").remote(route, body)
        lines = stream(items, self._who, self._hint)
        first = await anext(lines, None)
        if isinstance(first, dict):
            await lines.aclose()
            return first
        return _lines(first, lines)

    async def cancel_group(self, key: str) -> None:
        """Stop a group that its endpoint generates."""
        await self._call("cancel_groups", [key], timeout_s=STATUS_TIMEOUT_S)

    async def close(self) -> None:
        """Close the engine, end the actor's process, give the devices back; idempotent."""
        try:
            if self._place is not None:
                await self._call("close", timeout_s=CLOSE_TIMEOUT_S)
        except ServiceUnavailable:
            pass  # it is dead already
        finally:
            self._kill()
            if self._runtime.layout is not None:
                self._runtime.reservation(self._index).release()
            self._enter("closed")

    def _kill(self) -> None:
        """End the actor's process, whatever it is doing; a dead one's name becomes free."""
        actor, self._actor, self._place = self._actor, None, None
        if actor is not None:
            ray.kill(actor)

    @property
    def node_id(self) -> str:
        """Ray's id of the node that the actor runs on; empty before `start`."""
        return self._place.node_id if self._place is not None else ""

    @property
    def seconds_in_phase(self) -> float:
        return time.monotonic() - self._phase_since

    def _enter(self, phase: str) -> None:
        self.phase, self._phase_since = phase, time.monotonic()
        self._on_phase(self.name, phase)

    async def _call(self, method: str, *arguments: Any, timeout_s: float | None = None) -> Any:
        """Without `timeout_s` the caller bounds the wait."""
        return await call(getattr(self._alive(), method).remote(*arguments), self._who, timeout_s, self._hint)

    def _alive(self) -> Any:
        if self._actor is None:
            raise ServiceUnavailable(f"{self._who} is not running")
        return self._actor

    @property
    def _who(self) -> str:
        return f"rollout worker {self.name}"

    @property
    def _hint(self) -> str:
        node = f" on {self._place.node}" if self._place is not None else ""
        return f"; its log{node}: {self.log}"


def _this_node() -> str:
    return ray.get_runtime_context().get_node_id()


async def _lines(first: str | None, rest: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    async with aclosing(rest):
        if first is not None:
            yield first
        async for line in rest:
            yield line
