"""An environment in the hands of one episode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlx.envs.errors import EnvLost
from rlx.envs.session import EnvSession, StepResult
from rlx.envs.state import EpisodeState, finite
from rlx.episode import StepReward


class Leased:
    """A session whose rewards and losses the episode hears of."""

    def __init__(self, session: EnvSession, state: EpisodeState):
        self._session, self._state = session, state

    @property
    def name(self) -> str:
        return self._session.name

    @property
    def observation(self) -> Any:
        return self._session.observation

    @property
    def reward(self) -> float | None:
        return self._session.reward

    @property
    def done(self) -> bool:
        return self._session.done

    @property
    def action_schema(self) -> dict[str, Any]:
        return self._session.action_schema

    @property
    def observation_schema(self) -> dict[str, Any]:
        return self._session.observation_schema

    async def step(self, action: Mapping[str, Any] | None = None, **fields: Any) -> StepResult:
        """One step; its reward is recorded for the turn that was sampled last."""
        try:
            result = await self._session.step(action, **fields)
        except EnvLost as error:
            raise self._state.lose(error) from error.__cause__
        self._record(result.reward)
        return result

    async def call_tool(self, name: str, arguments: dict[str, Any]) -> Any:
        """What the tool returned; a reward that the environment gave for it is recorded like that of a step."""
        try:
            result = await self._session.call_tool(name, arguments)
        except EnvLost as error:
            raise self._state.lose(error) from error.__cause__
        self._record(self._session.reward)
        return result

    async def list_tools(self) -> list[dict[str, Any]]:
        try:
            return await self._session.list_tools()
        except EnvLost as error:
            raise self._state.lose(error) from error.__cause__

    async def close(self) -> None:
        await self._session.close()

    def _record(self, reward: float | None) -> None:
        if reward is not None:
            turn = self._state.turns - 1 if self._state.turns else None
            self._state.record(StepReward(finite("reward", reward), self.name, turn))
