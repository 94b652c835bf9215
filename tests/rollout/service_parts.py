"""Workers and a scorer that keep the protocols of `rlx.rollout.worker` without a model, and a service around them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from rlx.config.sections import ServiceSection
from rlx.envs.single_turn import SingleTurn
from rlx.episode import Episode
from rlx.errors import ServiceUnavailable, WeightSyncError
from rlx.rollout.app import create_app
from rlx.rollout.gateway import bind, serving
from rlx.rollout.manifest import WeightManifest
from rlx.rollout.service import RolloutService
from rlx.rollout.worker import Taken, WorkerStatus
from rlx.safetensors_layout import TensorSpec
from rlx.wire import Completion, GroupRequest, RewardOutcome, Sampling

TOKEN = "a-token-of-the-tests"
PATIENCE_S = 60.0
"""For what takes a moment on an idle machine."""
QUICK = ServiceSection(
    group_timeout=PATIENCE_S,
    publish_timeout=PATIENCE_S,
    probe_interval=0.1,
    probe_timeout=PATIENCE_S,
    drain_timeout=PATIENCE_S,
)
"""Looks often and waits long: nobody is late because the machine is busy."""


class LocalWorker:
    """Says "7 8 9" to everything. `dead` is why it died; `open` lets generation go on; the rest counts and misbehaves."""

    def __init__(self, name: str = "worker-0"):
        self.name = name
        self.version, self.dead = 0, ""
        self.open = asyncio.Event()
        self.open.set()
        self.generated: list[str] = []
        self.committed: list[bytes] = []
        self.refuses, self.takes_other_bytes, self.silent = "", False, False
        self.start_error: Exception | None = None
        self.closed = False
        self.pause_s = 0.0
        self._token_at = time.monotonic()

    def _alive(self) -> None:
        if self.dead:
            raise ServiceUnavailable(f"worker {self.name} died: {self.dead}")

    async def start(self) -> None:
        await self.open.wait()
        if self.start_error:
            raise self.start_error

    async def status(self) -> WorkerStatus:
        self._alive()
        return WorkerStatus(self.name, "ready", self.version, time.monotonic() - self._token_at, 0, "here", 1)

    async def generate(self, request_id: str, prompt_ids: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        self._alive()
        self.generated.append(request_id)
        await self.open.wait()
        if self.silent:
            await asyncio.Event().wait()
        self._alive()
        self._token_at = time.monotonic()
        ids = np.array([7, 8, 9][: sampling.max_tokens], dtype=np.int32)
        return [
            Completion(ids, np.full(ids.size, -0.5, np.float32), ((self.version, ids.size),), "stop", "7 8 9")
            for _ in range(n)
        ]

    async def prompt_logprobs(self, ids: np.ndarray) -> np.ndarray:
        self._alive()
        return -np.arange(1, ids.size, dtype=np.float32) - self.version

    async def announce(self, manifest: WeightManifest) -> None:
        self._alive()
        if self.refuses:
            raise WeightSyncError(self.refuses)

    async def commit(self, manifest: WeightManifest, path: str) -> Taken:
        self._alive()
        await self.open.wait()
        data = await asyncio.to_thread(Path(path).read_bytes)
        self.committed.append(data)
        self.version = manifest.version
        return Taken(xxhash.xxh3_128_hexdigest(data + b"!" if self.takes_other_bytes else data), self.pause_s)

    async def openai(self, route: str, body: dict[str, Any]) -> dict[str, Any] | AsyncIterator[str]:
        self._alive()
        if body.get("model") == "nobody":
            return {"error": {"code": 404, "message": "no such model"}}
        if body.get("stream"):
            return self._stream()
        return {"object": route, "choices": [{"text": "7 8 9"}]}

    async def _stream(self) -> AsyncIterator[str]:
        for word in ("7", "8", "[DONE]"):
            yield f"data: {word}\n\n"

    async def close(self) -> None:
        self.closed = True


class LocalScorer:
    """Rewards the position in the group; `error` is raised instead; `open` lets it go on."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.error: Exception | None = None
        self.closed = False
        self.pause_s = 0.0

    async def start(self) -> None:
        pass

    async def score(
        self, request: GroupRequest, episodes: list[Episode]
    ) -> tuple[list[RewardOutcome], dict[str, float]]:
        await self.open.wait()
        if self.error:
            raise self.error
        values = np.arange(len(episodes), dtype=np.float32)
        values[0] = np.nan
        return [RewardOutcome("rewards.position", values, 0.001)], {"length": 3.0}

    async def close(self) -> None:
        self.closed = True


def group(key: str = "g-1", n: int = 2, deadline_s: float = PATIENCE_S, prompt: str = "1 + 1 =") -> GroupRequest:
    return GroupRequest(
        key=key,
        prompt=prompt,
        prompt_ids=np.array([1, 2, 3], dtype=np.int32),
        num_generations=n,
        sampling=Sampling(max_tokens=3),
        columns={"answer": "2"},
        deadline_s=deadline_s,
    )


def weights(version: int, data: bytes) -> WeightManifest:
    specs = (TensorSpec("w", "F32", (len(data) // 4,)),)
    return WeightManifest(version, len(data), xxhash.xxh3_128_hexdigest(data), specs)


def make_service(
    workers: list[Any], scorer: LocalScorer | None = None, settings: ServiceSection = QUICK, **more: Any
) -> RolloutService:
    return RolloutService(
        workers, scorer or LocalScorer(), SingleTurn(), settings, model="tiny-model", start_timeout_s=PATIENCE_S, **more
    )


@asynccontextmanager
async def started(service: RolloutService) -> AsyncIterator[RolloutService]:
    await service.start()
    try:
        yield service
    finally:
        await service.drain(0)


@asynccontextmanager
async def on_http(
    service: RolloutService, token: str | None = TOKEN, require_token_for_data: bool = False
) -> AsyncIterator[str]:
    """The service behind a real port; gives the URL."""
    async with serving(create_app(service, token, require_token_for_data), bind("127.0.0.1", 0)) as url:
        yield url


async def eventually(condition: Any, seconds: float = PATIENCE_S) -> None:
    """Wait until `condition()` holds."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - the conditions are of many kinds, and most are nobody's event
            await asyncio.sleep(0.01)


async def chunks(data: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]
