"""A rollout worker as the service knows it: its methods, what it says of its load, and why there may be none.

`cluster/ray_worker.py` is one over Ray, `engine_worker.py` one in this process, for tests and inside the actor.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from rlx.errors import ServiceUnavailable
from rlx.rollout.manifest import WeightManifest
from rlx.wire import Completion, Sampling


@dataclass(frozen=True)
class EngineLoad:
    """How busy an engine is. `running`, `waiting`: sequences; `kv_cache_usage`: share of the key-value cache in use;
    `preemptions` and `generated_tokens` count since the start, `busy_s` the seconds with at least one sequence."""

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    preemptions: int = 0
    generated_tokens: int = 0
    busy_s: float = 0.0


@dataclass(frozen=True)
class WorkerStatus:
    """`state`: of a worker itself loading, ready or down, of a member of the fleet those of `fleet.State`; `cause` says
    why it is not ready. `token_age_s`: seconds since it generated a token. `restarts`: since it last worked; `limit`:
    sequences that the router gives it at most; `load_age_s`: seconds since `load` was found."""

    name: str
    state: str
    weight_version: int
    token_age_s: float
    in_flight: int
    node: str = ""
    pid: int = 0
    cause: str = ""
    load: EngineLoad = EngineLoad()
    restarts: int = 0
    limit: int = 0
    load_age_s: float = 0.0


class Taken(NamedTuple):
    """New weights that a worker generates with: xxh3-128 of the bytes it loaded, in hex, and the seconds in which it
    generated nothing."""

    fingerprint: str
    pause_s: float = 0.0


class NoDevices(ServiceUnavailable):
    """There is nothing that a worker could run on, for now."""


class Worker(Protocol):
    """A rollout worker: an `rlx.rollout.engine.Engine` behind a name, possibly in another process or on another node.

    A worker that died raises ServiceUnavailable with its name from every method.
    """

    name: str

    async def start(self) -> None:
        """NoDevices once it has waited for them for a while; then it may be asked again."""

    async def status(self) -> WorkerStatus: ...

    async def generate(
        self, request_id: str, prompt_ids: np.ndarray, n: int, sampling: Sampling
    ) -> list[Completion]: ...

    async def prompt_logprobs(self, ids: np.ndarray) -> np.ndarray: ...

    async def announce(self, manifest: WeightManifest) -> None: ...

    async def commit(self, manifest: WeightManifest, path: str) -> Taken:
        """Take the weights in the safetensors file `path` on the gateway's node."""

    async def openai(self, route: str, body: dict[str, Any]) -> dict[str, Any] | AsyncIterator[str]: ...

    async def close(self) -> None: ...
