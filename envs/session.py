"""What an episode needs of environments, whoever serves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class StepResult(Protocol):
    """What a step of an environment gave."""

    @property
    def observation(self) -> Any: ...
    @property
    def reward(self) -> float | None: ...
    @property
    def done(self) -> bool: ...


class EnvSession(Protocol):
    """One environment, leased to one episode. `observation`, `reward` and `done` are of the last reset or step."""

    @property
    def name(self) -> str: ...
    @property
    def observation(self) -> Any: ...
    @property
    def reward(self) -> float | None: ...
    @property
    def done(self) -> bool: ...
    @property
    def action_schema(self) -> dict[str, Any]: ...
    @property
    def observation_schema(self) -> dict[str, Any]: ...

    async def step(self, action: Mapping[str, Any] | None = None, **fields: Any) -> StepResult: ...
    async def call_tool(self, name: str, arguments: dict[str, Any]) -> Any: ...
    async def list_tools(self) -> list[dict[str, Any]]: ...
    async def close(self) -> None: ...


class Environments(Protocol):
    """Where the environments of this process come from."""

    async def open(self, ref: str | int | None, *, seed: int, deadline: float, **reset: Any) -> EnvSession:
        """A session of the environment `ref`, reset with `seed`. Raises EnvLost; `deadline` is on time.monotonic()."""
