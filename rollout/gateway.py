"""uvicorn inside a running event loop. The port is taken before anything slow starts; signals stay the caller's."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import psutil
import uvicorn
from fastapi import FastAPI

from rlx.errors import ConfigError

_BACKLOG = 2048
_COLLECT_AFTER = 100_000
"""Objects made and not freed again before the youngest are searched for cycles: a few thousand requests have as many."""
_GRACE_S = 3


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; ConfigError with `vllm.port` or `vllm.host` when there can be none. Port 0: any free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(
            f"vllm.host: {host!r} is no address ({error.strerror}); write 127.0.0.1 or 0.0.0.0"
        ) from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _not_bound(host, port, error) from error
    listener.setblocking(False)
    return listener


@asynccontextmanager
async def serving(app: FastAPI, listener: socket.socket) -> AsyncIterator[str]:
    """Answer on `listener` while the body runs; gives the URL. Takes the socket over and closes it."""
    server = _Server(
        uvicorn.Config(
            app, log_config=None, access_log=False, proxy_headers=False, lifespan="off", timeout_keep_alive=75,
            timeout_graceful_shutdown=_GRACE_S, backlog=_BACKLOG,
        )
    )  # fmt: skip
    host, port = listener.getsockname()[:2]
    running = asyncio.create_task(server.serve(sockets=[listener]), name="gateway")
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        server.should_exit = True
        await running
        listener.close()


def quiet_collector() -> None:
    """For a process that has loaded what it needs and now answers requests: Python's search for cycles leaves alone what
    there is, and does not go through the requests in flight again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, 20, 20)


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _not_bound(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"vllm.port: {port} is in use{_holder(port)}; stop that, or write another port, "
            f"for example vllm.port: {port + 1 if port < 65535 else port - 1}"
        )
    if error.errno == errno.EACCES:
        return ConfigError(f"vllm.port: {port} is reserved for the system; write one from 1024, for example 8000")
    return ConfigError(f"vllm.host: cannot listen on {host} ({error.strerror}); write 127.0.0.1 or 0.0.0.0")


def _holder(port: int) -> str:
    """Who listens there, where the system tells."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        pass
    return ""
