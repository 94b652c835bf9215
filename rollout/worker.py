"""What the service needs of its parts: rollout workers, episodes and a scorer, wherever they run.

`cluster/` implements both over Ray; tests use local ones around the fake engine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from rlx.episode import Episode
from rlx.errors import ServiceUnavailable
from rlx.rollout.manifest import WeightManifest
from rlx.wire import Completion, GroupRequest, RewardOutcome, Sampling


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


class Episodes(Protocol):
    """Makes the episodes of a group: one plain reply each, or what a rollout function and its environments do."""

    own_reward: bool
    """Whether episodes may bring a reward of their own, which becomes one more column of rewards, `episode`."""

    async def start(self) -> None:
        """Load the user's function and reach its environments; UserCodeError or ConfigError with the key."""

    async def run(self, worker: Worker, request: GroupRequest) -> list[Episode]:
        """`request.num_generations` episodes on `worker`. What goes wrong within an episode is its status; raises
        ServiceError when the worker breaks its contract, UserCodeError when too many episodes fail."""

    async def close(self) -> None: ...


class Scorer(Protocol):
    """Runs every reward function on one whole group, once."""

    async def start(self) -> None:
        """Resolve and load every reward function; UserCodeError with the config key when one does not load."""

    async def score(
        self, request: GroupRequest, episodes: list[Episode]
    ) -> tuple[list[RewardOutcome], dict[str, float]]:
        """Outcomes in the order of `trl.reward_funcs`, and what the functions logged with `log_metric`.

        Only the scorable episodes are given to the functions; the others get NaN. A function that fails gives NaN
        and says so in its outcome; UserCodeError with the first traceback once it failed too often
        (`rewards.reward_failure_budget`).
        """

    async def close(self) -> None: ...
