"""OpenEnv's WebSocket protocol: one connection is one session of one environment, one answer follows each request.

    {"type": "reset", "data": {"seed": 7}}   →   {"type": "observation", "data": {"observation", "reward", "done"}}
    {"type": "step", "data": {action}}       →   the same, or {"type": "error", "data": {"code", "message"}}
    {"type": "close"}                        →   the server closes the connection, and its slot is free

Answers carry no numbers, so a request that went unanswered would be answered by the next one's: whatever goes wrong
ends the connection, and nothing reconnects.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from rlx.envs.errors import ActionError, EnvLost
from rlx.hosts import is_loopback

MAX_MESSAGE_BYTES = 16 << 20
_FULL = ("CAPACITY_REACHED", "FACTORY_ERROR")


class Unreachable(EnvLost):
    """Nobody listens, or what listens is no OpenEnv server."""


class Full(EnvLost):
    """The server has no free session. `active` is how many it counts, where it says so."""

    def __init__(self, message: str, code: str = "CAPACITY_REACHED", active: int | None = None):
        super().__init__(message)
        self.code, self.active = code, active


class Raised(EnvLost):
    """The environment raised; the server is well."""


class Address:
    """Where a server is: `name` in the configuration, `url` as http(s):// or ws(s)://, with a path or without."""

    def __init__(self, name: str, url: str):
        self.name, self.url = name, url
        parts = urlsplit(url if "://" in url else f"http://{url}")
        path = parts.path.rstrip("/").removesuffix("/ws")
        tls = parts.scheme in ("https", "wss")
        self.ws = urlunsplit(("wss" if tls else "ws", parts.netloc, f"{path}/ws", parts.query, ""))
        self.http = urlunsplit(("https" if tls else "http", parts.netloc, path, "", ""))
        self.local = is_loopback(parts.hostname)

    def __str__(self) -> str:
        return f"environment {self.name!r} at {self.url}"

    async def get(self, path: str, seconds: float) -> Any:
        """The JSON of GET `path`. Raises EnvLost."""
        try:
            async with asyncio.timeout(seconds), httpx.AsyncClient(timeout=seconds, trust_env=not self.local) as client:
                response = await client.get(f"{self.http}{path}")
                response.raise_for_status()
                return response.json()
        except (httpx.HTTPError, OSError, ValueError) as error:
            raise EnvLost(f"{self}: GET {path} failed: {_told(error, seconds)}") from error


class Connection:
    """One session on the wire."""

    def __init__(self, address: Address, socket: ClientConnection):
        self._address, self._socket = address, socket
        self._lost = ""
        self._turn = asyncio.Lock()

    @classmethod
    async def open(cls, address: Address, seconds: float) -> Connection:
        """Raises Unreachable.

        There are no pings from here: each request has a deadline, and an event loop that was busy for a while would
        take its own delay for the server's. The server's pings are answered.
        """
        try:
            socket = await connect(
                address.ws,
                open_timeout=seconds,
                ping_interval=None,
                max_size=MAX_MESSAGE_BYTES,
                compression=None,
                proxy=None if address.local else True,
            )
        except (OSError, WebSocketException) as error:
            raise Unreachable(f"{address}: no connection: {_told(error, seconds)}") from error
        return cls(address, socket)

    async def ask(self, kind: str, data: dict[str, Any], seconds: float, what: str) -> dict[str, Any]:
        """The `data` of the answer to a request. Raises EnvLost, Full or ActionError; after the first two this
        connection is closed, and every further call raises EnvLost."""
        try:
            request = json.dumps({"type": kind, "data": data}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ActionError(f"{what}: this is not JSON: {error}") from error
        async with self._turn:
            if self._lost:
                raise EnvLost(self._lost)
            try:
                async with asyncio.timeout(seconds):
                    with contextlib.suppress(ConnectionClosed):  # a server that is full answers before it is asked
                        await self._socket.send(request)
                    answer = await self._socket.recv()
            except TimeoutError as error:
                raise self.lose(f"{what} was not answered within {seconds:g} s") from error
            except ConnectionClosed as error:
                raise self.lose(f"the connection was lost during {what}: {_closed(error)}") from error
            except BaseException:  # cancelled: the answer may still come, and must not be taken for the next one's
                self.lose(f"{what} was cancelled")
                raise
            return self._data("observation" if kind in ("reset", "step") else kind, answer, what)

    def lose(self, what: str) -> EnvLost:
        """Close the socket at once, for good; the first reason is kept."""
        said = f"{self._address}: {what}"
        self._lost = self._lost or said
        self._socket.transport.abort()
        return EnvLost(said)

    async def close(self, seconds: float) -> str:
        """End the session, and wait until the server has. What went wrong, or nothing. Idempotent."""
        if self._lost or self._turn.locked():
            self.lose("the session was closed during a request")
            return ""
        self._lost = f"{self._address}: the session is closed"
        try:
            async with asyncio.timeout(seconds):
                await self._socket.send('{"type":"close"}')
                while True:
                    await self._socket.recv()
        except ConnectionClosed:
            return ""
        except TimeoutError:
            return f"{self._address}: the session was not closed within {seconds:g} s"
        finally:
            self._socket.transport.abort()

    def _data(self, expected: str, answer: str | bytes, what: str) -> dict[str, Any]:
        try:
            frame = json.loads(answer)
            kind, data = frame["type"], frame["data"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise self._malformed(what, answer) from error
        if kind == "error" and isinstance(data, dict):
            raise self._error(data, what)
        if kind != expected or not isinstance(data, dict):
            raise self._malformed(what, answer)
        return data

    def _malformed(self, what: str, answer: str | bytes) -> EnvLost:
        shown = repr(answer if len(answer) <= 200 else answer[:200])
        return self.lose(f"the answer to {what} is no frame of the protocol: {shown}")

    def _error(self, data: dict[str, Any], what: str) -> EnvLost | ActionError:
        code, message = str(data.get("code")), str(data.get("message"))
        if code == "VALIDATION_ERROR":
            return ActionError(f"{what} was refused: {_faults(data) or message}")
        if code in _FULL:
            active = data.get("active_sessions")
            lost = str(self.lose(f"{code}: {message}"))
            return Full(lost, code, active if isinstance(active, int) else None)
        if code == "EXECUTION_ERROR":
            return Raised(str(self.lose(f"the environment raised in {what}: {message}")))
        hint = ""
        if code == "SESSION_ERROR" and "Unable to serialize" in message:
            hint = " (openenv cannot send what a custom validator of an action raised; constrain it with Field(ge=…) and the like)"
        return self.lose(f"the server answered {what} with {code}: {message}{hint}")


def seconds_until(deadline: float, at_most: float) -> float:
    """Seconds until `deadline`, on time.monotonic(), but no more than `at_most`."""
    return max(min(deadline - time.monotonic(), at_most), 0.0)


def _faults(data: dict[str, Any]) -> str:
    """What pydantic said, without its links."""
    faults = data.get("errors")
    if not isinstance(faults, list):
        return ""
    told = []
    for fault in faults:
        if isinstance(fault, dict):
            where = ".".join(str(part) for part in fault.get("loc") or ())
            told.append(f"{where}: {fault.get('msg')}" if where else str(fault.get("msg")))
    return "; ".join(told)


def _closed(error: ConnectionClosed) -> str:
    """Why a connection ended, as the side that ended it said."""
    close = error.sent or error.rcvd
    if close is None:
        return "the server is gone"
    if close.code == 1009:
        return f"a message of more than {MAX_MESSAGE_BYTES >> 20} MiB"
    by = "this side" if close is error.sent and not error.rcvd_then_sent else "the server"
    return f"{by} closed it with code {close.code} {close.reason}".rstrip()


def _told(error: Exception, seconds: float) -> str:
    if isinstance(error, TimeoutError | httpx.TimeoutException):
        return f"no answer within {seconds:g} s"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return f"{type(error).__name__}: {error}"
