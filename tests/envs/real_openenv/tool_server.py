"""A real OpenEnv server of an MCP environment with one tool, `add`.    python tool_server.py PORT"""

from __future__ import annotations

import sys
from typing import Any

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server import Action, Observation, State, create_fastapi_app
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation


class Adder(MCPEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        server = FastMCP("adder")

        @server.tool()
        def add(a: int, b: int) -> int:
            """Add two numbers."""
            return a + b

        super().__init__(server)

    def reset(self, seed: int | None = None, episode_id: str | None = None, **arguments: Any) -> Observation:
        return Observation(metadata={"seed": seed})

    async def step_async(self, action: Action, timeout_s: float | None = None, **arguments: Any) -> Observation:
        observation = await super().step_async(action, timeout_s, **arguments)
        if isinstance(action, CallToolAction):
            observation.reward = 0.5
        return observation

    def _step_impl(self, action: Action, timeout_s: float | None = None, **arguments: Any) -> Observation:
        raise ValueError(f"not an action of this environment: {action}")

    @property
    def state(self) -> State:
        return State()


if __name__ == "__main__":
    app = create_fastapi_app(Adder, CallToolAction, CallToolObservation, max_concurrent_envs=8)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
