"""Sessions with OpenEnv servers, for the episodes of one process: leased, reset, with a deadline on each request.

    session = await environments.open("chess", seed=7, deadline=...)     leased, connected, reset
    result = await session.step(move="e2e4")                             observation, reward, done
    await session.close()                                                the lease is free for the next episode

A session that did not answer, answered nonsense or was cut off is lost for good: every further call raises EnvLost,
nothing reconnects, and whoever began the episode may begin it anew. One loss cannot be seen: a server with a
`session_timeout` closes an environment that idles longer, and openenv 0.10 goes on answering from what is left of it.
Not here: the protocol (`openenv_wire`), starting servers (`openenv_server`), playing (`play`).
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlx.config import Config
from rlx.config.sections import OpenEnvSection
from rlx.envs.errors import ActionError, EnvLost
from rlx.envs.openenv_actions import fit
from rlx.envs.openenv_leases import Leases
from rlx.envs.openenv_wire import Address, Connection, Full, Unreachable, seconds_until
from rlx.errors import UserCodeError

_RECONNECT_S = 0.25
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """What a reset or a step gave: `observation` as the server sent it, a dict of JSON values."""

    observation: Any
    reward: float | None
    done: bool


class OpenEnvs:
    """All environments of `envs:`. `urls` are those of the servers that were started here, by name. For one event
    loop."""

    def __init__(self, config: Config, urls: Mapping[str, str] | None = None):
        urls = urls or {}
        self._environments = [
            _Environment(env.name, env.openenv, urls.get(env.name), key=f"envs[{index}].openenv")
            for index, env in enumerate(config.envs)
        ]

    async def open(self, ref: str | int | None, *, seed: int, deadline: float, **reset: Any) -> Session:
        """A session of the environment `ref`, by its number or name, or of the first; reset with `seed` and `reset`.

        Waits up to `lease_timeout` for a free one. Raises EnvLost; UserCodeError when there is no such environment.
        `deadline` is on time.monotonic().
        """
        return await self._find(ref).open(seed, deadline, reset)

    async def close(self) -> None:
        """Close all sessions that are still open."""
        await asyncio.gather(*[session.close() for env in self._environments for session in list(env.sessions)])

    def _find(self, ref: str | int | None) -> _Environment:
        names = [environment.name for environment in self._environments]
        index = names.index(ref) if ref in names else ref or 0
        if isinstance(index, int) and 0 <= index < len(names):
            return self._environments[index]
        close = difflib.get_close_matches(str(ref), names, n=1)
        offer = f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(map(repr, names)) or 'none'}."
        raise UserCodeError(f"envs: there is no environment {ref!r}. {offer}")


class Session:
    """One environment in the hands of one episode. `observation`, `reward` and `done` are of the last reset or step."""

    def __init__(self, environment: _Environment, connection: Connection, first: StepResult):
        self.name = environment.name
        self.action_schema: dict[str, Any] = environment.schemas["action"]
        self.observation_schema: dict[str, Any] = environment.schemas["observation"]
        self.observation: Any = first.observation
        self.reward: float | None = first.reward
        self.done: bool = first.done
        self._environment, self._connection = environment, connection
        self._settings = environment.settings

    async def step(self, action: Mapping[str, Any] | None = None, **fields: Any) -> StepResult:
        """One step with the fields of `action` and `fields`. Raises ActionError where they do not fit, after which the
        session goes on, and EnvLost, after which it does not: also when the environment raised, as nobody knows what
        it left undone."""
        given = {**(action or {}), **fields}
        is_mcp = given.get("type") in ("call_tool", "list_tools")  # not in the schema where the class is the base class
        return await self._step(given if is_mcp else fit(given, self.action_schema))

    async def list_tools(self) -> list[dict[str, Any]]:
        """The tools of an MCP environment, as `ctx.start(tools=...)` takes them. Raises EnvLost; ActionError when the
        environment has none."""
        result = await self._rpc("tools/list", {})
        return [
            {
                "type": "function",
                "function": {
                    "name": tool["name"],
                    "description": tool.get("description") or "",
                    "parameters": tool.get("input_schema") or tool.get("inputSchema") or {"type": "object"},
                },
            }
            for tool in result.get("tools", ())
        ]

    async def call_tool(self, name: str, arguments: dict[str, Any]) -> Any:
        """What a tool of an MCP environment returned: a step, whose reward is `self.reward`. Where the environment has
        actions of its own the tool is called beside them, and the reward is None. Raises EnvLost; ActionError when the
        tool failed."""
        fields = set(self.action_schema.get("properties", ())) - {"metadata"}
        if fields and "tool_name" not in fields:
            result = await self._rpc("tools/call", {"name": name, "arguments": arguments})
            self.reward = None
        else:
            step = await self._step({"type": "call_tool", "tool_name": name, "arguments": arguments})
            if error := step.observation.get("error"):
                raise ActionError(f"{name}: {error.get('message', error) if isinstance(error, dict) else error}")
            result = step.observation.get("result")
        if isinstance(result, dict) and (result.get("is_error") or result.get("isError")):
            raise ActionError(f"{name}: {_text(result)}")
        return _returned(result)

    async def close(self) -> None:
        """Give the session back. Idempotent; what goes wrong is logged, as the episode no longer needs it."""
        if self not in self._environment.sessions:
            return
        self._environment.sessions.discard(self)
        try:
            if said := await self._connection.close(self._settings.close_timeout):
                _log.warning("%s", said)
        finally:
            self._environment.leases.give()

    async def _step(self, action: dict[str, Any]) -> StepResult:
        data = await self._connection.ask("step", action, self._settings.step_timeout, "a step")
        return self._take(_result(data, self._connection, "a step"))

    async def _rpc(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        call = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        answer = await self._connection.ask("mcp", call, self._settings.step_timeout, method)
        if isinstance(error := answer.get("error"), dict):
            raise ActionError(f"{method}: {error.get('message')}")
        result = answer.get("result")
        if not isinstance(result, dict):
            raise self._connection.lose(f"the answer to {method} has no result: {str(answer)[:200]}")
        return result

    def _take(self, result: StepResult) -> StepResult:
        self.observation, self.reward, self.done = result.observation, result.reward, result.done
        return result


class _Environment:
    """One entry of `envs:` for this process."""

    def __init__(self, name: str, settings: OpenEnvSection, started_url: str | None, key: str):
        self.name, self.settings, self.key = name, settings, key
        self.leases = Leases(settings.max_sessions)
        self.sessions: set[Session] = set()
        self.schemas: dict[str, dict[str, Any]] = {}
        url = started_url or settings.url
        self._address = Address(name, url) if url else None
        self._restarts = settings.command is not None

    async def open(self, seed: int, deadline: float, reset: Mapping[str, Any]) -> Session:
        if self._address is None:
            raise EnvLost(f"environment {self.name!r}: the server of {self.key}.command was not started")
        give_up = min(deadline, time.monotonic() + self.settings.lease_timeout)
        refusal = "all sessions of this process are in use"
        while True:
            try:
                await self.leases.take(seconds_until(give_up, math.inf))
            except TimeoutError as error:
                waited = f"{self._address}: no free session within {self.settings.lease_timeout:g} s"
                raise EnvLost(f"{waited} ({refusal}). Raise {self.key}.lease_timeout or the server's limit.") from error
            try:
                session = await self._session(self._address, {**self.settings.reset, "seed": seed, **reset}, deadline)
            except Full as full:
                self.leases.refused()
                if full.code != "CAPACITY_REACHED" and not self.leases.open:
                    raise
                refusal = str(full)
            except BaseException:  # cancelled or failed, the lease goes back
                self.leases.give()
                raise
            else:
                self.leases.accepted()
                self.sessions.add(session)
                return session

    async def _session(self, address: Address, reset: dict[str, Any], deadline: float) -> Session:
        connection = await self._connection(address, deadline)
        try:
            first = await _reset(connection, reset, seconds_until(deadline, self.settings.reset_timeout))
            if not self.schemas:
                self.schemas = await _schemas(address, seconds_until(deadline, self.settings.reset_timeout))
        except BaseException:  # cancelled or failed, nobody will close it later
            connection.lose("the session was not opened")
            raise
        return Session(self, connection, first)

    async def _connection(self, address: Address, deadline: float) -> Connection:
        """A server of ours that is being restarted refuses for a while."""
        until = min(deadline, time.monotonic() + (self.settings.start_timeout if self._restarts else 0))
        while True:
            try:
                return await Connection.open(address, seconds_until(deadline, self.settings.reset_timeout))
            except Unreachable:
                if time.monotonic() >= until:
                    raise
            await asyncio.sleep(_RECONNECT_S)


async def try_session(address: Address, reset: dict[str, Any], seconds: float) -> None:
    """Open a session, reset it, close it. Raises EnvLost, of which Unreachable and Full."""
    connection = await Connection.open(address, seconds)
    try:
        await _reset(connection, reset, seconds)
        if said := await connection.close(seconds):
            raise EnvLost(said)
    finally:
        connection.lose("the trial is over")


async def _reset(connection: Connection, reset: dict[str, Any], seconds: float) -> StepResult:
    try:
        data = await connection.ask("reset", reset, seconds, "reset")
    except ActionError as error:
        raise connection.lose(str(error)) from error
    return _result(data, connection, "reset")


async def _schemas(address: Address, seconds: float) -> dict[str, dict[str, Any]]:
    schemas = await address.get("/schema", seconds)
    if not isinstance(schemas, dict) or not all(isinstance(schemas.get(k), dict) for k in ("action", "observation")):
        raise EnvLost(f"{address}: GET /schema gave no schemas of action and observation: {str(schemas)[:200]}")
    return schemas


def _result(data: dict[str, Any], connection: Connection, what: str) -> StepResult:
    observation, reward, done = data.get("observation"), data.get("reward"), data.get("done")
    number = isinstance(reward, int | float) and math.isfinite(reward)
    if not isinstance(observation, dict) or not (reward is None or number) or not isinstance(done, bool):
        raise connection.lose(f"the answer to {what} is no observation, reward and done: {str(data)[:200]}")
    return StepResult(observation, None if reward is None else float(reward), done)


def _returned(result: Any) -> Any:
    """What a tool returned, out of what MCP wraps around it."""
    if not isinstance(result, dict) or "content" not in result:
        return result
    if result.get("data") is not None:
        return result["data"]
    structured = result.get("structured_content") or result.get("structuredContent")
    if isinstance(structured, dict):
        return structured.get("result", structured)
    return _text(result)


def _text(result: dict[str, Any]) -> str:
    parts = result.get("content")
    return (
        "\n".join(str(part.get("text", part)) for part in parts if isinstance(part, dict))
        if isinstance(parts, list)
        else str(parts)
    )
