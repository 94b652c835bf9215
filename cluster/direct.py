"""The endpoint of a rollout worker (`service.direct`), in the worker's process: whole groups, with reward processes of
its own beside it."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from dataclasses import dataclass

import ray

from rlx.cluster.ray_scorer import RayScorer
from rlx.config import Config
from rlx.envs.single_turn import SingleTurn
from rlx.errors import ConfigError
from rlx.rollout.direct import WorkerGroups
from rlx.rollout.direct_app import worker_app
from rlx.rollout.gateway import bind, serving
from rlx.rollout.group_runner import GroupRunner
from rlx.rollout.worker import Worker


@dataclass(frozen=True)
class DirectSettings:
    """What a worker needs to serve."""

    config: Config
    token: str


class DirectEndpoint:
    """`start` → groups over HTTP → `close`."""

    def __init__(self, worker: Worker, settings: DirectSettings):
        self._settings = settings
        self._scorer = RayScorer(settings.config, of=worker.name)
        runner = GroupRunner(SingleTurn(), self._scorer, settings.config.group_deadline_s)
        self._groups = WorkerGroups(worker, runner)
        self._open = AsyncExitStack()

    async def start(self, gateway_node: str) -> str:
        """Load the reward functions and serve, on any free port; the URL. `gateway_node`: Ray's id of the node that the
        gateway runs on."""
        vllm = self._settings.config.vllm
        listener = bind(self._host(gateway_node), 0)
        self._open.callback(listener.close)
        self._open.push_async_callback(self._scorer.close)
        await self._scorer.start()
        app = worker_app(self._groups, self._settings.token, vllm.needs_token)
        return await self._open.enter_async_context(serving(app, listener))

    def cancel(self, keys: list[str]) -> None:
        """Stop these groups."""
        self._groups.cancel(keys)

    async def close(self) -> None:
        await self._open.aclose()

    def _host(self, gateway_node: str) -> str:
        """Loopback where the gateway listens there; else the address that the other nodes know this one by."""
        vllm = self._settings.config.vllm
        if vllm.needs_token:
            return ray.util.get_node_ip_address()
        if ray.get_runtime_context().get_node_id() != gateway_node:
            raise ConfigError(
                f"service.direct: a worker runs on another node than the gateway (process {os.getpid()} on "
                f"{ray.util.get_node_ip_address()}), which a learner cannot reach through vllm.host: {vllm.host}. Write "
                "vllm.host: 0.0.0.0, or run all workers on the gateway's node."
            )
        return vllm.host
