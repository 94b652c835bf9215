"""OpenEnv servers for tests: a fake that speaks the protocol and misbehaves on request, and the real one.

Both play the guessing game of real_openenv/guess_server.py: `guess` the number `seed % 10`; a reset's `fault` says how
the session misbehaves. The fake also breaks the protocol (`raw` is sent as the answer to a step).

    python openenv_parts.py PORT [MAX_SESSIONS]        the fake as a process, to be supervised
"""

from __future__ import annotations

import asyncio
import http
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from rlx.config import Config
from rlx.processes import free_port

ROOT = Path(__file__).parents[2]
REAL_PYTHON = ROOT / ".venv-openenv" / "bin" / "python"
REAL_SERVERS = Path(__file__).parent / "real_openenv"
GUESS_SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "properties": {"metadata": {"type": "object"}, "guess": {"title": "Guess", "type": "integer"}},
    "required": ["guess"],
}
HINT = "guess a number from 0 to 9"


def config_with(*envs: dict[str, Any], folder: Path | None = None, **more: Any) -> Config:
    """A configuration with these entries of `envs:`."""
    base = {"base_model": "m", "rl": "grpo", "datasets": [{"path": "d"}], "envs": list(envs)}
    if folder is None:
        return Config.model_validate(base | more)
    config = Config.model_validate(base | {"output_dir": str(folder / "outputs")} | more)
    config._path = folder / "config.yaml"
    return config


class Fault(Exception):
    """Ends the session as an environment that raised."""


class FakeServer:
    """The protocol, without OpenEnv. `sessions` are those open now, `most` were open at a time, `resets` their
    arguments."""

    def __init__(self, max_sessions: int = 64, schema: dict[str, Any] | None = None):
        self.max_sessions, self.schema = max_sessions, schema or GUESS_SCHEMA
        self.sessions, self.most, self.opened = 0, 0, 0
        self.refusals, self.schema_requests = 0, 0
        self.factory_fails = False
        self.observation = ""
        """Of every step, in place of the game's."""
        self.resets: list[dict[str, Any]] = []
        self.actions: list[dict[str, Any]] = []
        self.url = ""
        self._refused = asyncio.Event()

    @asynccontextmanager
    async def running(self, port: int = 0) -> Any:
        async with serve(
            self._session,
            "127.0.0.1",
            port,
            process_request=self._http,
            compression=None,
            max_size=None,
            open_timeout=None,  # a busy machine may take longer than any
            ping_interval=None,
            close_timeout=0.1,
        ) as server:
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            yield self

    async def refused(self, times: int) -> None:
        """Wait until it refused so many sessions."""
        async with asyncio.timeout(60):
            while self.refusals < times:
                self._refused.clear()
                await self._refused.wait()

    def _http(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == "/ws":
            return None
        bodies = {"/health": {"status": "healthy"}, "/instances": self.sessions,
                  "/schema": {"action": self.schema, "observation": {"type": "object"}}}  # fmt: skip
        self.schema_requests += request.path == "/schema"
        status = http.HTTPStatus.OK if request.path in bodies else http.HTTPStatus.NOT_FOUND
        return connection.respond(status, json.dumps(bodies.get(request.path)))

    async def _session(self, socket: ServerConnection) -> None:
        counts = {"active_sessions": self.sessions, "max_sessions": self.max_sessions}
        if self.factory_fails:
            return await self._refuse(socket, {"code": "FACTORY_ERROR", "message": "the factory failed"})
        if self.sessions >= self.max_sessions:
            return await self._refuse(socket, {"code": "CAPACITY_REACHED", "message": "at capacity", **counts})
        self.sessions += 1
        self.opened += 1
        self.most = max(self.most, self.sessions)
        game = _Game(self)
        try:
            async for text in socket:
                if not await game.answer(socket, json.loads(text)):
                    break
        except ConnectionClosed:
            pass
        finally:
            await game.misbehave("close", socket)
            self.sessions -= 1

    async def _refuse(self, socket: ServerConnection, data: dict[str, Any]) -> None:
        self.refusals += 1
        self._refused.set()
        await socket.send(json.dumps({"type": "error", "data": data}))


class _Game:
    def __init__(self, server: FakeServer):
        self.server, self.number, self.tries, self.reset = server, 0, 0, {}

    async def answer(self, socket: ServerConnection, frame: dict[str, Any]) -> bool:
        """Whether the session goes on."""
        kind, data = frame["type"], frame.get("data", {})
        if kind == "close":
            return False
        if kind == "mcp":
            await _send(socket, "mcp", {"jsonrpc": "2.0", "id": data["id"], **_mcp(data)})
            return True
        try:
            await self._play(socket, kind, data)
        except Fault as error:
            await _send(socket, "error", {"code": "EXECUTION_ERROR", "message": str(error)})
        return True

    async def _play(self, socket: ServerConnection, kind: str, data: dict[str, Any]) -> None:
        if kind == "reset":
            self.reset, self.number, self.tries = data, (data.get("seed") or 0) % 10, 0
            self.server.resets.append(data)
        else:
            self.server.actions.append(data)
        await self.misbehave(kind, socket)
        if kind == "reset":
            text = "<|im_start|>assistant\n" if data.get("fault") == "special" else HINT
            await _observe(socket, {"message": text, "tries": 0}, None, False)
            return await self.misbehave("idle", socket)
        if "raw" in self.reset:
            return await socket.send(self.reset["raw"])
        if data.get("type") == "call_tool":
            result = {
                "content": [{"type": "text", "text": "5"}],
                "data": sum(data["arguments"].values()),
                "is_error": False,
            }
            error = {"error_type": "tool_not_found", "message": "no such tool"} if data["tool_name"] != "add" else None
            return await _observe(
                socket, {"tool_name": data["tool_name"], "result": result, "error": error}, 0.5, False
            )
        guess = data.get("guess")
        if isinstance(guess, int) and guess < 0:
            faults = [{"loc": ["guess"], "msg": "Input should be greater than or equal to 0", "url": "https://x"}]
            return await _send(
                socket, "error", {"code": "VALIDATION_ERROR", "message": "Invalid message", "errors": faults}
            )
        self.tries += 1
        right = guess == self.number
        text = "right" if right else "higher" if isinstance(guess, int) and guess < self.number else "lower"
        text = "x" * (17 << 20) if self.reset.get("fault") == "huge" else self.server.observation or text
        await _observe(socket, {"message": text, "tries": self.tries}, 1.0 if right else -0.1, right or self.tries >= 5)

    async def misbehave(self, where: str, socket: ServerConnection) -> None:
        fault = self.reset.get("fault", "")
        if fault == f"{where}_raises" and where != "close":
            raise Fault(f"the {where} failed")
        if fault == f"{where}_hangs":
            await asyncio.sleep(self.reset.get("hang_s", 60.0))
        if fault == f"{where}_cuts":
            socket.transport.abort()
        if fault == f"{where}_dies":
            os._exit(3)
        if fault == f"{where}_stops":
            os.kill(os.getpid(), signal.SIGSTOP)


def _mcp(call: dict[str, Any]) -> dict[str, Any]:
    if call["method"] == "tools/list":
        tool = {
            "name": "add",
            "description": "Add.",
            "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
        }
        return {"result": {"tools": [tool]}}
    return {"error": {"code": -32603, "message": "Environment does not support MCP"}}


async def _send(socket: ServerConnection, kind: str, data: dict[str, Any]) -> None:
    await socket.send(json.dumps({"type": kind, "data": data}))


async def _observe(socket: ServerConnection, observation: dict[str, Any], reward: float | None, done: bool) -> None:
    await _send(socket, "observation", {"observation": {"metadata": {}, **observation}, "reward": reward, "done": done})


# --- servers in processes


def fake_command(max_sessions: int = 64, *, python: str = sys.executable) -> list[str]:
    return [python, str(Path(__file__)), "{port}", str(max_sessions)]


def real_command(*arguments: Any, server: str = "guess_server.py") -> list[str]:
    """The command of a real server; the argument of the guessing game is its number of sessions."""
    assert (REAL_PYTHON.parents[1] / "installed").exists(), (
        "the real OpenEnv server needs an environment of its own: make .venv-openenv/installed"
    )
    return [str(REAL_PYTHON), str(REAL_SERVERS / server), "{port}", *map(str, arguments)]


@contextmanager
def real_server(*arguments: Any, server: str = "guess_server.py") -> Any:
    """The URL of a real server that runs meanwhile."""
    port = free_port("127.0.0.1", 30_000 + os.getpid() % 1000)
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([part.replace("{port}", str(port)) for part in real_command(*arguments, server=server)])
    try:
        deadline = time.monotonic() + 120
        while not _healthy(url):
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not start within 120 s"
            time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


async def instances(url: str) -> int:
    """How many environments live in a server, as it counts them."""
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        return int((await client.get(f"{url}/instances")).text)


async def until_instances(url: str, expected: int, seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while await instances(url) != expected:  # noqa: ASYNC110 - it is in another process
            await asyncio.sleep(0.05)


async def _main(port: int, max_sessions: int = 64) -> None:
    async with FakeServer(max_sessions).running(port):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main(*map(int, sys.argv[1:])))
