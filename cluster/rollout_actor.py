"""The Ray actor of one rollout worker: an engine in a process of its own, `rlx-rollout-0` and so on."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from rlx.cluster import watchdog
from rlx.cluster.packed import Packed, pack, unpack_request
from rlx.errors import ServiceUnavailable
from rlx.processes import alive, import_nothing_from_here, start_of, write_output_to
from rlx.rollout.engine import Engine
from rlx.rollout.engine_worker import EngineWorker
from rlx.rollout.gateway import quiet_collector
from rlx.rollout.manifest import WeightManifest
from rlx.rollout.worker import Taken, WorkerStatus

if TYPE_CHECKING:
    from rlx.cluster.direct import DirectEndpoint, DirectSettings

_LEFTOVERS_S = 60.0


@dataclass(frozen=True)
class Place:
    """Where an actor runs: Ray's id of the node, its address, and the actor's process. `watchdog`: process id and start
    time of what ends the processes that the actor leaves behind; it ends after them."""

    node_id: str
    node: str
    pid: int
    watchdog: tuple[int, int]


class RolloutActor:
    """Every method runs in the actor's event loop; `ray_worker.RayWorker` is its other end."""

    _name = "rlx-rollout"  # for Ray's messages about an actor that could not be made

    def __init__(self, name: str, build_engine: Callable[[], Engine], log: str, direct: DirectSettings | None = None):
        self._name = name
        self._build_engine = build_engine
        self._direct = direct
        self._worker: EngineWorker | None = None
        self._endpoint: DirectEndpoint | None = None
        write_output_to(Path(log))
        import_nothing_from_here()
        watchdog_pid = watchdog.guard().pid
        context = ray.get_runtime_context()
        self._place = Place(
            context.get_node_id(),
            ray.util.get_node_ip_address(),
            os.getpid(),
            (watchdog_pid, start_of(watchdog_pid) or 0),
        )

    def __repr__(self) -> str:
        return self._name

    async def place(self) -> Place:
        return self._place

    async def start(self, before: Place | None, gateway_node: str) -> str:
        """Load the engine, once nothing is left of the actor that was `before` this one on the same node: its
        processes hold memory and devices. The URL of the endpoint, empty without one."""
        if before is not None and before.node_id == self._place.node_id:
            await _gone(before)
        worker = EngineWorker(self._name, self._build_engine())
        await worker.start()
        quiet_collector()
        self._worker = worker
        if self._direct is None:
            return ""
        from rlx.cluster.direct import DirectEndpoint

        self._endpoint = DirectEndpoint(worker, self._direct)
        return await self._endpoint.start(gateway_node)

    async def status(self) -> WorkerStatus:
        node, pid = self._place.node, self._place.pid
        if self._worker is None:
            return WorkerStatus(self._name, "loading", 0, 0.0, 0, node, pid)
        return replace(await self._worker.status(), node=node, pid=pid)

    async def generate(self, request_id: str, prompt: bytes, n: int, sampling: dict[str, Any]) -> Packed:
        """For `packed.ask`."""
        prompt_ids, how = unpack_request(prompt, sampling)
        return pack(await self._ready().generate(request_id, prompt_ids, n, how))

    async def prompt_logprobs(self, ids: np.ndarray) -> np.ndarray:
        return await self._ready().prompt_logprobs(ids)

    async def announce(self, manifest: bytes) -> None:
        """`manifest`: as JSON, here and below."""
        await self._ready().announce(_manifest(manifest))

    async def commit(self, manifest: bytes, path: str) -> Taken:
        return await self._ready().commit(_manifest(manifest), path)

    async def commit_bytes(self, manifest: bytes, weights: np.ndarray) -> Taken:
        """The same on another node than the gateway's: `weights` uint8 [nbytes], a view on Ray's object store."""
        with tempfile.NamedTemporaryFile(prefix=f"{self._name}-", suffix=".safetensors", dir="/dev/shm") as file:
            weights.tofile(file)
            file.flush()
            return await self._ready().commit(_manifest(manifest), file.name)

    async def openai(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._ready().openai(route, body)
        assert isinstance(answer, dict), "the engine streams although the request does not ask for it"
        return answer

    async def openai_stream(self, route: str, body: dict[str, Any]) -> AsyncIterator[str | dict[str, Any]]:
        """Lines; or one dict, when the engine refuses the request."""
        answer = await self._ready().openai(route, body)
        if isinstance(answer, dict):
            yield answer
            return
        async for line in answer:
            yield line

    async def cancel_groups(self, keys: list[str]) -> None:
        """Stop groups that the endpoint generates."""
        assert self._endpoint is not None, "there is no endpoint"
        self._endpoint.cancel(keys)

    async def close(self) -> None:
        if self._endpoint is not None:
            await self._endpoint.close()
        if self._worker is not None:
            await self._worker.close()

    def _ready(self) -> EngineWorker:
        assert self._worker is not None, "the gateway sends nothing before `start` came back"
        return self._worker


def _manifest(text: bytes) -> WeightManifest:
    return WeightManifest.from_json(json.loads(text))


async def _gone(before: Place) -> None:
    """Until the process of `before` has ended, and all that it started."""
    end = time.monotonic() + _LEFTOVERS_S
    while alive(*before.watchdog):
        if time.monotonic() >= end:
            raise ServiceUnavailable(
                f"what process {before.pid} on {before.node} left behind did not end within {_LEFTOVERS_S:g} s"
            )
        await asyncio.sleep(0.05)
