"""The Ray actor of one rollout worker: an engine in a process of its own, `rlx-rollout-0` and so on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rlx.cluster import watchdog
from rlx.cluster.output import write_output_to
from rlx.rollout.engine import Engine
from rlx.rollout.worker import WorkerStatus
from rlx.wire import Completion, Sampling, WeightManifest


@dataclass(frozen=True)
class Place:
    """Where an actor runs: Ray's id of the node, its address, and the actor's process."""

    node_id: str
    node: str
    pid: int


class RolloutActor:
    """Every method runs in the actor's event loop; `ray_worker.RayWorker` is its other end."""

    _name = "rlx-rollout"  # for Ray's messages about an actor that could not be made

    def __init__(self, name: str, build_engine: Callable[[], Engine], log: str):
        self._name = name
        self._build_engine = build_engine
        self._engine: Engine | None = None
        self._in_flight = 0
        write_output_to(Path(log))
        watchdog.guard()

    def __repr__(self) -> str:
        return self._name

    async def place(self) -> Place:
        context = ray.get_runtime_context()
        return Place(context.get_node_id(), ray.util.get_node_ip_address(), os.getpid())

    async def start(self) -> None:
        engine = self._build_engine()
        await engine.start()
        self._engine = engine

    async def status(self) -> WorkerStatus:
        node, pid = ray.util.get_node_ip_address(), os.getpid()
        if self._engine is None:
            return WorkerStatus(self._name, "loading", 0, 0.0, 0, node, pid)
        engine = self._engine
        age = engine.seconds_since_token()
        return WorkerStatus(self._name, "ready", engine.weight_version(), age, self._in_flight, node, pid)

    async def generate(self, request_id: str, prompt_ids: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        self._in_flight += n
        try:
            return await self._ready().generate(request_id, prompt_ids, n, sampling)
        finally:
            self._in_flight -= n

    async def prompt_logprobs(self, ids: np.ndarray) -> np.ndarray:
        return await self._ready().prompt_logprobs(ids)

    async def announce(self, manifest: WeightManifest) -> None:
        await self._ready().announce(manifest)

    async def commit(self, manifest: WeightManifest, path: str) -> str:
        return await self._ready().commit(manifest, path)

    async def commit_bytes(self, manifest: WeightManifest, weights: np.ndarray) -> str:
        """The same on another node than the gateway's: `weights` uint8 [nbytes], a view on Ray's object store."""
        with tempfile.NamedTemporaryFile(prefix=f"{self._name}-", suffix=".safetensors", dir="/dev/shm") as file:
            weights.tofile(file)
            file.flush()
            return await self._ready().commit(manifest, file.name)

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

    async def close(self) -> None:
        if self._engine is not None:
            await self._engine.close()

    def _ready(self) -> Engine:
        assert self._engine is not None, "the gateway sends nothing before `start` came back"
        return self._engine
