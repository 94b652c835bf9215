"""The whole service over Ray inside the test's process, with engines that need no model, and a learner's client."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from fakes import PATIENCE_S, steady_engine
from safetensors.numpy import save

from rlx.cluster.ray_runtime import RayRuntime
from rlx.cluster.ray_scorer import RayScorer
from rlx.cluster.ray_worker import RayWorker
from rlx.cluster.serve import gateway_app, worker_factory
from rlx.config import Config
from rlx.envs.single_turn import SingleTurn
from rlx.rollout.client import PhaseTimes, RolloutClient
from rlx.rollout.fake_engine import FakeEngine
from rlx.rollout.gateway import bind, serving
from rlx.rollout.manifest import Probe, WeightManifest, fingerprint
from rlx.rollout.service import RolloutService
from rlx.wire import GroupRequest, GroupResult, Sampling

TOKEN = "a-token-of-the-tests"


class Counted:
    """An ASGI app in front of another: requests and bytes of the answers, by path."""

    def __init__(self, app: Any):
        self._app = app
        self.requests: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        self.requests[path] += 1

        async def counting(message: Any) -> None:
            self.answered[path] += len(message.get("body", b""))
            await send(message)

        await self._app(scope, receive, counting)


@dataclass
class Stage:
    """A service that runs, and its client."""

    config: Config
    service: RolloutService
    client: RolloutClient
    gateway: Counted
    events: list[str]

    def worker(self, name: str) -> RayWorker:
        [worker] = [m.worker for m in self.service.fleet.members if m.name == name]
        assert isinstance(worker, RayWorker)
        return worker

    async def rollouts(self, requests: list[GroupRequest]) -> list[GroupResult]:
        return await asyncio.to_thread(self.client.rollouts, requests)

    async def publish(self, version: int) -> PhaseTimes:
        return await asyncio.to_thread(self.client.publish, *await update(version))

    def kill(self, name: str) -> None:
        """kill -9 of the worker's process, before anything else happens."""
        [pid] = [m.pid for m in self.service.fleet.members if m.name == name]
        os.kill(pid, signal.SIGKILL)

    async def engines_end(self) -> None:
        """Until no worker's engine generates, as a cancellation takes its way to it."""
        async with asyncio.timeout(PATIENCE_S):
            for member in self.service.fleet.members:
                while (await self.worker(member.name).openai("in_flight", {}))["in_flight"]:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)

    def state(self, name: str) -> tuple[str, int]:
        """State and weight version."""
        [member] = [m for m in self.service.fleet.members if m.name == name]
        return member.state, member.weight_version

    async def comes_true(self, condition: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not condition():  # noqa: ASYNC110 - of many kinds, most are nobody's event
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{self.service.fleet.describe()}\n{self.events}") from None


@asynccontextmanager
async def service_on_ray(config: Config, runtime: RayRuntime, engine: Any = steady_engine) -> AsyncIterator[Stage]:
    """With `config.vllm.data_parallel_size` workers, behind `config.base_url`."""
    make_worker = worker_factory(config, runtime, engine, TOKEN, lambda name, doing: service.fleet.note(name, doing))
    events: list[str] = []
    service = RolloutService(
        [make_worker() for _ in range(config.vllm.data_parallel_size)],
        RayScorer(config),
        SingleTurn(),
        config.service,
        config.async_,
        model="fake",
        start_timeout_s=config.vllm.start_timeout,
        make_worker=make_worker,
    )
    service.fleet.on_event = events.append
    gateway = Counted(gateway_app(config, service, TOKEN))
    async with serving(gateway, bind("127.0.0.1", config.vllm.port)) as url:  # type: ignore[arg-type]
        client = RolloutClient(url, TOKEN, direct=config.service.direct)
        try:
            await service.start()
            yield Stage(config, service, client, gateway, events)
        finally:
            await asyncio.to_thread(client.close)
            await service.drain(0)


def group(key: str, n: int = 2, max_tokens: int = 50, deadline_s: float = PATIENCE_S) -> GroupRequest:
    return GroupRequest(key, "x", np.array([1, 2, 3], np.int32), n, Sampling(max_tokens), deadline_s=deadline_s)


async def update(version: int) -> tuple[WeightManifest, bytes]:
    """Weights that the fake engine takes, with the log-probabilities that they give it, to be verified."""
    data = save({}, metadata={"version": str(version)})
    print_of_it = fingerprint(data)
    engine = FakeEngine()
    engine._load_weights(version, print_of_it)
    ids = np.arange(1, 9, dtype=np.int32)
    logprobs = await engine.prompt_logprobs(ids)
    probe = Probe((tuple(ids.tolist()),), (tuple(logprobs.tolist()),))
    return WeightManifest(version, len(data), print_of_it, (), probe=probe), data


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data
