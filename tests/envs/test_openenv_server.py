"""Servers that are started, watched and restarted; the fake OpenEnv server as a process stands for them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from openenv_parts import config_with, fake_command

from rlx.config import Config
from rlx.envs import openenv_server
from rlx.envs.errors import EnvLost
from rlx.envs.openenv import OpenEnvs, Session
from rlx.envs.openenv_server import EnvServers
from rlx.errors import ServiceUnavailable
from rlx.processes import LOG_BYTES, alive, descendants, is_free

pytestmark = pytest.mark.slow


def config_of(folder: Path, *commands: Any, **settings: Any) -> Config:
    sections = [{"start_timeout": 90, "reset_timeout": 20, "command": command, **settings} for command in commands]
    return config_with(*[{"name": f"env{i}", "openenv": s} for i, s in enumerate(sections)], folder=folder)


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[tuple[EnvServers, OpenEnvs]]:
    servers = EnvServers(config, probe_interval=0.1)
    try:
        await servers.start()
        environments = OpenEnvs(config, servers.urls)
        yield servers, environments
        await environments.close()
    finally:
        await servers.close()


async def opened(environments: OpenEnvs, **reset: Any) -> Session:
    return await environments.open(None, seed=3, deadline=time.monotonic() + 120, **reset)


async def play(environments: OpenEnvs) -> bool:
    session = await opened(environments)
    try:
        return (await session.step(guess=3)).done
    finally:
        await session.close()


async def played_at_last(environments: OpenEnvs) -> bool:
    """Begun anew where the server was ended under it, as an episode is."""
    async with asyncio.timeout(90):
        while True:
            with contextlib.suppress(EnvLost):
                return await play(environments)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(90):
        while not true():  # noqa: ASYNC110 - it is in another process
            await asyncio.sleep(0.05)


def server_of(servers: EnvServers, name: str = "env0") -> Any:
    return servers._servers[name]


def processes_in(folder: Path) -> set[int]:
    """The processes that run in `folder`, where the servers of a test do."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cwd").readlink() == folder:
                found.add(int(entry.name))
    return found


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


async def test_servers_run_until_they_are_closed_and_leave_nothing(tmp_path: Path) -> None:
    config = config_of(tmp_path, fake_command(), shlex.join(fake_command()))
    async with running(config) as (servers, environments):
        urls = servers.urls
        assert set(urls) == {"env0", "env1"}
        for name in urls:
            session = await environments.open(name, seed=3, deadline=time.monotonic() + 120)
            assert (await session.step(guess=3)).done
        assert len(processes_in(tmp_path)) == 2
        await servers.close()
        assert processes_in(tmp_path) == set()
    assert all(is_free("127.0.0.1", port_of(url)) for url in urls.values())


async def test_what_a_server_starts_ends_with_it(tmp_path: Path) -> None:
    command = f"sleep 1000 & setsid sleep 1000 & {shlex.join(fake_command())}; true"
    async with running(config_of(tmp_path, ["sh", "-c", command])) as (servers, environments):
        assert await play(environments)
        await until(lambda: len(processes_in(tmp_path)) == 4)
        await servers.close()
        await until(lambda: not processes_in(tmp_path))


async def test_the_command_runs_next_to_the_yaml_and_is_told_its_port_twice(tmp_path: Path) -> None:
    (tmp_path / "serve.sh").write_text(f'echo "$PORT" "$1" > ports\nexec {shlex.join(fake_command()[:2])} $PORT\n')
    async with running(config_of(tmp_path, "sh serve.sh {port}")) as (servers, environments):
        port = str(port_of(servers.urls["env0"]))
        assert (tmp_path / "ports").read_text().split() == [port, port]
        assert await play(environments)


@pytest.mark.parametrize(
    ("command", "settings", "said"),
    [
        (["sh", "-c", "echo no licence >&2; exit 4"], {}, "ended with status 4 before it was ready"),
        (["sleep", "60"], {"start_timeout": 0.5}, "not ready within start_timeout, 0.5 s .*(refused|no answer)"),
        (["./missing"], {}, "./missing cannot be started in .*No such file"),
        (fake_command(), {"reset": {"fault": "reset_raises"}}, "the environment raised in reset: the reset failed"),
    ],
)
async def test_a_server_that_does_not_come_up_is_told_with_the_end_of_its_log(
    tmp_path: Path, command: list[str], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ServiceUnavailable, match=said) as caught:
        async with running(config_of(tmp_path, command, **settings)):
            pass
    assert "envs[0].openenv.command" in str(caught.value)
    log = tmp_path / "outputs" / "logs" / "env-env0.log"
    if "licence" in command[-1]:
        assert f"The end of {log}:\n    no licence" in str(caught.value)
    await until(lambda: not processes_in(tmp_path))


async def test_when_one_server_does_not_come_up_none_is_left(tmp_path: Path) -> None:
    servers = EnvServers(config_of(tmp_path, fake_command(), ["sleep", "60"], ["sh", "-c", "sleep 2; exit 1"]))
    with pytest.raises(ServiceUnavailable, match=r"envs\[2\].*status 1"):
        await servers.start()
    await until(lambda: not processes_in(tmp_path))


async def test_a_server_that_dies_is_restarted_on_its_port(tmp_path: Path) -> None:
    async with running(config_of(tmp_path, fake_command())) as (servers, environments):
        url = servers.urls["env0"]
        session = await opened(environments, fault="step_dies")
        with pytest.raises(EnvLost, match="connection was lost during a step"):
            await session.step(guess=3)
        await session.close()
        assert await play(environments)
        assert (server_of(servers).restarts, servers.urls["env0"], servers.failures) == (1, url, {})


async def test_the_log_of_a_server_stays_short(tmp_path: Path) -> None:
    async with running(config_of(tmp_path, fake_command())) as (servers, _):
        log = server_of(servers)._path
        with log.open("ab") as file:
            file.truncate(LOG_BYTES + 1)
        await until(lambda: log.stat().st_size <= LOG_BYTES)
        assert b"earlier output was removed" in log.read_bytes()[:100]


async def test_a_server_that_hangs_is_restarted(tmp_path: Path) -> None:
    async with running(config_of(tmp_path, fake_command(), reset_timeout=3.0)) as (servers, _):
        hasty = OpenEnvs(config_of(tmp_path, fake_command(), step_timeout=2.0), servers.urls)
        session = await opened(hasty, fault="step_stops")
        with pytest.raises(EnvLost, match="not answered within"):
            await session.step(guess=3)
        await session.close()
        await until(lambda: server_of(servers).restarts >= 1)
        assert await played_at_last(OpenEnvs(config_of(tmp_path, fake_command()), servers.urls))


async def test_a_server_whose_sessions_leaked_is_restarted(tmp_path: Path) -> None:
    async with running(config_of(tmp_path, fake_command(1))) as (servers, environments):
        hasty = OpenEnvs(config_of(tmp_path, fake_command(1), step_timeout=2.0), servers.urls)
        session = await opened(hasty, fault="step_hangs", hang_s=1000)
        with pytest.raises(EnvLost, match="not answered within"):
            await session.step(guess=3)
        await session.close()
        assert await played_at_last(environments)
        assert server_of(servers).restarts == 1


async def test_a_full_server_in_use_is_left_alone(tmp_path: Path) -> None:
    async with running(config_of(tmp_path, fake_command(1))) as (servers, environments):
        session = await opened(environments)
        probes = []
        real = openenv_server._clients

        async def clients(port: int) -> int:
            probes.append(await real(port))
            return probes[-1]

        openenv_server._clients = clients  # type: ignore[assignment]
        try:
            await until(lambda: len(probes) >= 4)
        finally:
            openenv_server._clients = real  # type: ignore[assignment]
        assert probes == [1] * len(probes)
        assert server_of(servers).restarts == 0
        assert (await session.step(guess=3)).done


async def test_a_server_that_dies_again_and_again_is_given_up_with_the_first_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openenv_server, "RESTARTS", 2)
    once = tmp_path / "once"
    command = f"[ -e {once} ] && echo no more && exit 7; touch {once}; exec {shlex.join(fake_command())}"
    async with running(config_of(tmp_path, ["sh", "-c", command])) as (servers, _):
        os.kill(server_of(servers)._process.pid, signal.SIGKILL)
        await until(lambda: bool(servers.failures))
        assert (
            "given up after 2 restarts. At first it ended with signal SIGKILL. The end of" in servers.failures["env0"]
        )
        assert servers.failures["env0"].endswith("    no more")
        assert server_of(servers).restarts == 2


async def test_a_server_that_dies_soon_after_each_restart_is_given_up_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openenv_server, "RESTARTS", 1)
    async with running(config_of(tmp_path, fake_command())) as (servers, environments):
        session = await opened(environments, fault="step_dies")
        with pytest.raises(EnvLost):
            await session.step(guess=3)
        await session.close()
        assert await play(environments)
        os.kill(server_of(servers)._process.pid, signal.SIGKILL)
        await until(lambda: bool(servers.failures))
        assert "given up after 1 restarts. At first it ended with status 3" in servers.failures["env0"]


async def test_servers_die_with_their_parent(tmp_path: Path) -> None:
    script = f"""
import asyncio, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from openenv_parts import config_with, fake_command
from rlx.envs.openenv_server import EnvServers
async def main():
    servers = EnvServers(config_with({{"name": "e", "openenv": {{"command": fake_command()}}}}, folder=Path({str(tmp_path)!r})))
    await servers.start()
    print("ready", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    try:
        assert parent.stdout is not None
        assert await parent.stdout.readline() == b"ready\n"
        below = descendants(parent.pid)
        assert below
    finally:
        parent.kill()
        await parent.wait()
    await until(lambda: not any(alive(pid, start) for pid, start in below.items()))
