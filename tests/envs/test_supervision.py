"""The supervision of a server, with a process that ends when the test says so."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest
from openenv_parts import config_with

from rlx.envs import openenv_server
from rlx.envs.openenv_server import EnvServers, SupervisedServer


class Process:
    """As asyncio's, with the pid of nobody."""

    pid, returncode = 2**22 + 1, 1

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def wait(self) -> int:
        await self.ended.wait()
        return 1


class Server(SupervisedServer):
    """Its processes are made up."""

    started = 0

    async def _start(self) -> None:
        self.started += 1
        self._process = Process()  # type: ignore[assignment]

    async def _end(self, grace_s: float) -> None:
        self._process = None


@pytest.fixture
def server(tmp_path: Path) -> Server:
    config = config_with({"name": "env", "openenv": {"command": "true"}}, folder=tmp_path)
    log = tmp_path / "log"
    log.touch()
    return Server("env", config.envs[0].openenv, 1, base_dir=tmp_path, log=log, key="envs[0]", probe_interval=1000)


@pytest.mark.parametrize("turns", range(6))
async def test_a_server_that_ends_while_it_is_closed_is_not_restarted(server: Server, turns: int) -> None:
    """`turns` of the event loop lie between both; whichever of them the supervision hears of first, it ends."""
    await server.start()
    await asyncio.sleep(0)
    server._process.ended.set()  # type: ignore[union-attr]
    for _ in range(turns):
        await asyncio.sleep(0)
    async with asyncio.timeout(60):
        await server.close()
    assert server._process is None


async def test_a_server_that_does_not_end_by_itself_is_killed_also_when_its_closing_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()
    real = openenv_server._signal_group

    def signals(pid: int, number: int) -> None:
        if number == signal.SIGTERM:
            asked.set()
        else:
            real(pid, number)

    monkeypatch.setattr(openenv_server, "_signal_group", signals)
    monkeypatch.setattr(openenv_server, "_GRACE_S", 1000.0)
    config = config_with({"name": "env", "openenv": {"command": ["sleep", "1000"]}}, folder=tmp_path)
    [server] = EnvServers(config)._servers.values()

    async def ready(process: Any) -> None: ...

    monkeypatch.setattr(server, "_until_ready", ready)
    await server.start()
    assert server._process is not None
    process = server._process
    closing = asyncio.create_task(server.close())
    async with asyncio.timeout(60):
        await asked.wait()
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert await process.wait() == -signal.SIGKILL
