"""A rollout worker whose engine lives in this process: for tests, benchmarks, and inside an actor of the cluster."""

from __future__ import annotations

import os
import platform
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from rlx.rollout.engine import Engine
from rlx.rollout.manifest import WeightManifest
from rlx.rollout.worker import Taken, WorkerStatus
from rlx.wire import Completion, Sampling


class EngineWorker:
    """`engine` under the name `name`; keeps the Worker protocol."""

    def __init__(self, name: str, engine: Engine):
        self.name = name
        self._engine = engine
        self._state = "loading"
        self._in_flight = 0

    async def start(self) -> None:
        await self._engine.start()
        self._state = "ready"

    async def status(self) -> WorkerStatus:
        return WorkerStatus(
            name=self.name,
            state=self._state,
            weight_version=self._engine.weight_version(),
            token_age_s=self._engine.seconds_since_token(),
            in_flight=self._in_flight,
            node=platform.node(),
            pid=os.getpid(),
            load=self._engine.load(),
        )

    async def generate(self, request_id: str, prompt_ids: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        self._in_flight += n
        try:
            return await self._engine.generate(request_id, prompt_ids, n, sampling)
        finally:
            self._in_flight -= n

    async def prompt_logprobs(self, ids: np.ndarray) -> np.ndarray:
        return await self._engine.prompt_logprobs(ids)

    async def announce(self, manifest: WeightManifest) -> None:
        await self._engine.announce(manifest)

    async def commit(self, manifest: WeightManifest, path: str) -> Taken:
        return await self._engine.commit(manifest, path)

    async def openai(self, route: str, body: dict[str, Any]) -> dict[str, Any] | AsyncIterator[str]:
        return await self._engine.openai(route, body)

    async def close(self) -> None:
        self._state = "down"
        await self._engine.close()
