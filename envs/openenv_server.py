"""OpenEnv servers that the YAML starts on this machine: watched, and restarted when they die, hang or leak sessions.

                start ──► ready ──► probe, every PROBE_INTERVAL_S seconds ──► ready
                  ▲                   │ it died, did not answer, or lost half of its sessions
                  └──── restart ◄─────┘        RESTARTS times without HEALTHY_S good seconds: broken, for good

A server is its process, everything below it, one port that it keeps, and a log. Its health is a real session, opened,
reset and closed: a server whose sessions all hang still answers GET /health.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import re
import shlex
import signal
import time
from pathlib import Path

from rlx.config import Config
from rlx.config.sections import OpenEnvSection
from rlx.envs.errors import EnvLost
from rlx.envs.openenv import try_session
from rlx.envs.openenv_wire import Address, Full, Raised, Unreachable
from rlx.errors import ServiceUnavailable
from rlx.processes import descendants, die_with_parent, end_processes, free_port, shorten

PROBE_INTERVAL_S = 5.0
RESTARTS = 5
HEALTHY_S = 60.0
_HOST = "127.0.0.1"
_PORTS = range(20_000, 30_000)
"""Below those that the kernel gives to outgoing connections, so that a port stays free over a restart."""
_GRACE_S = 3.0
_POLL_S = 0.2
_END_S = 2.0
"""Seconds that the end of a process may be heard of later than that of its connections."""
_LOG_LINES = 20
_LEAK_SIGHTINGS = 2
_LEAK_LOOKS, _LEAK_LOOK_S = 3, 0.5
_SHARE = 20
"""A probe takes at most one part in so many of the time: its session is one that no episode has."""
_log = logging.getLogger(__name__)


class EnvServers:
    """The servers of all entries of `envs:` that have a `command`. For one event loop, in the main thread: the
    servers die with the thread that started them."""

    def __init__(self, config: Config, *, probe_interval: float = PROBE_INTERVAL_S):
        logs = Path(config.output_dir).absolute() / "logs"
        self._servers: dict[str, SupervisedServer] = {}
        port = random.choice(_PORTS)
        for index, env in enumerate(config.envs):
            if env.openenv.command is not None:
                port = free_port(_HOST, port + 1)
                log = logs / f"env-{re.sub(r'[^A-Za-z0-9_.-]', '_', env.name)}.log"
                where = f"envs[{index}].openenv.command"
                self._servers[env.name] = SupervisedServer(
                    env.name,
                    env.openenv,
                    port,
                    base_dir=config.base_dir,
                    log=log,
                    key=where,
                    probe_interval=probe_interval,
                )

    @property
    def urls(self) -> dict[str, str]:
        """Where the servers are, by the names of their environments; the same over restarts."""
        return {name: server.url for name, server in self._servers.items()}

    @property
    def failures(self) -> dict[str, str]:
        """Why a server was given up, by the name of its environment."""
        return {name: server.failure for name, server in self._servers.items() if server.failure}

    async def start(self) -> None:
        """Start all at once. ServiceUnavailable with the end of the log when one does not come up; then none runs."""
        try:
            async with asyncio.TaskGroup() as group:
                for server in self._servers.values():
                    group.create_task(server.start())
        except BaseExceptionGroup as failed:
            await self.close()
            raise failed.exceptions[0] from None
        except BaseException:  # cancelled: what was started ends
            await self.close()
            raise

    async def close(self) -> None:
        """End all, and everything that they started. Idempotent."""
        await asyncio.gather(*[server.close() for server in self._servers.values()])


class SupervisedServer:
    """One server. `restarts` counts; `failure` says why it was given up."""

    def __init__(
        self,
        name: str,
        settings: OpenEnvSection,
        port: int,
        *,
        base_dir: Path,
        log: Path,
        key: str,
        probe_interval: float = PROBE_INTERVAL_S,
    ):
        self.url, self.restarts, self.failure = f"http://{_HOST}:{port}", 0, ""
        self._name, self._settings, self._port, self._base_dir = name, settings, port, base_dir
        self._path, self._key, self._interval = log, key, probe_interval
        self._address = Address(name, self.url)
        self._process: asyncio.subprocess.Process | None = None
        self._supervision: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start it, and watch it from then on. ServiceUnavailable with the end of its log when it does not come up."""
        await self._start()
        self._supervision = asyncio.create_task(self._supervise(), name=f"supervise {self._name}")

    async def close(self) -> None:
        """End it and everything below it. Idempotent."""
        if self._supervision is not None:
            self._supervision.cancel()
            await asyncio.wait({self._supervision})
        await self._end(_GRACE_S)

    # --- its process

    async def _start(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        command = self._settings.command or ""
        parts = shlex.split(command) if isinstance(command, str) else command
        parts = [part.replace("{port}", str(self._port)) for part in parts]
        try:
            with self._path.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *parts,
                    cwd=self._base_dir,
                    env={**os.environ, "PORT": str(self._port)},
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
        except (OSError, ValueError, TypeError) as error:
            raise ServiceUnavailable(
                f"{self._key}: {shlex.join(parts)} cannot be started in {self._base_dir}: {error}"
            ) from error
        try:
            await self._until_ready(self._process)
        except BaseException:  # cancelled or not ready: nothing of it goes on
            await self._end(0)
            raise

    async def _until_ready(self, process: asyncio.subprocess.Process) -> None:
        seconds = self._settings.start_timeout
        deadline = time.monotonic() + seconds
        last = ""
        while (left := deadline - time.monotonic()) > 0:
            if process.returncode is not None:
                raise self._not_ready(f"it ended with {_status(process.returncode)} before it was ready")
            try:
                await try_session(self._address, {**self._settings.reset, "seed": 0}, max(left, _POLL_S))
                return
            except Full:  # of episodes that waited for it to come back
                return
            except Unreachable as error:
                last = str(error)
                await asyncio.sleep(min(_POLL_S, left))
            except EnvLost as error:
                if process.returncode is None:
                    raise self._not_ready(str(error)) from error
        raise self._not_ready(f"it was not ready within start_timeout, {seconds:g} s ({last})")

    def _not_ready(self, what: str) -> ServiceUnavailable:
        return ServiceUnavailable(f"{self._key} ({self._name}): {what}. {self._end_of_log()}")

    def _end_of_log(self) -> str:
        end = "\n".join(f"    {line}" for line in _last_lines(self._path))
        return f"The end of {self._path}:\n{end or '    (nothing)'}"

    async def _end(self, grace_s: float) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        below = descendants(process.pid)
        try:
            if grace_s:
                _signal_group(process.pid, signal.SIGTERM)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(grace_s):
                        await process.wait()
        finally:
            _signal_group(process.pid, signal.SIGKILL)
            end_processes(below, 0.0)
        await process.wait()

    # --- its supervision

    async def _supervise(self) -> None:
        """Consumes: time. Waits for: the end of the process, or the next probe. Ends when the server is broken."""
        in_a_row, first, ready = 0, "", time.monotonic()
        while True:
            fault = await self._until_fault()
            if time.monotonic() - ready > HEALTHY_S:
                in_a_row = 0
            first = fault if in_a_row == 0 else first
            while True:
                in_a_row += 1
                await self._end(0)
                if in_a_row > RESTARTS:
                    given_up = f"{self._key} ({self._name}): given up after {RESTARTS} restarts. At first {first}"
                    self.failure = f"{given_up}. {self._end_of_log()}"
                    _log.error("%s", self.failure)
                    return
                _log.warning("%s (%s): restarted: %s", self._key, self._name, fault)
                self.restarts += 1
                try:
                    await self._start()
                    break
                except ServiceUnavailable as error:
                    fault = str(error)
            ready = time.monotonic()

    async def _until_fault(self) -> str:
        """Returns why the server must be restarted, when it must."""
        assert self._process is not None
        process, wait, leaks = self._process, self._interval, 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):  # wait_for would lose a cancellation at the end of the process
                    return f"it ended with {_status(await process.wait())}"
            shorten(self._path)
            began, fault = time.monotonic(), ""
            try:
                await try_session(self._address, {**self._settings.reset, "seed": 0}, self._settings.reset_timeout)
                leaks = 0
                wait = max(self._interval, _SHARE * (time.monotonic() - began))
            except Full as full:
                lost = await self._lost_sessions(full)
                leaks = leaks + 1 if lost else 0
                if leaks >= _LEAK_SIGHTINGS:
                    fault = f"{lost} of its sessions belong to nobody any more: {full}"
            except Raised as error:
                _log.warning("%s", error)
            except EnvLost as error:
                fault = str(error)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_END_S):
                        await process.wait()
            if fault and process.returncode is None:
                return fault

    async def _lost_sessions(self, full: Full) -> int:
        """How many sessions of a full server nobody is connected to, 0 for less than half. It must stay so for
        _LEAK_LOOKS looks: short episodes may all end between a probe and the count of their connections."""
        for _ in range(_LEAK_LOOKS):
            clients = await _clients(self._port)
            lost = full.active - clients if full.active is not None else int(clients == 0)
            if lost <= 0 or 2 * lost < (full.active or 1):
                return 0
            await asyncio.sleep(_LEAK_LOOK_S)
            try:
                await try_session(self._address, {**self._settings.reset, "seed": 0}, self._settings.reset_timeout)
                return 0
            except Full as still:
                full = still
            except EnvLost:  # the next probe will say what is wrong
                return 0
        return lost


async def _clients(port: int) -> int:
    """How many connections to the server at `port` this machine holds, once that of the probe is gone. They are
    counted where they begin: the server may be in a container."""
    await asyncio.sleep(_POLL_S)
    return _connections_to(port)


def _connections_to(port: int) -> int:
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    server, established = f"0100007F:{port:04X}", "01"
    return sum((remote, state) == (server, established) for _, _, remote, state, *_ in rows)


def _signal_group(pid: int, signal_number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal_number)


def _status(returncode: int) -> str:
    return f"signal {signal.Signals(-returncode).name}" if returncode < 0 else f"status {returncode}"


def _last_lines(path: Path) -> list[str]:
    with path.open("rb") as log:
        log.seek(max(path.stat().st_size - 8192, 0))
        return log.read().decode(errors="replace").splitlines()[-_LOG_LINES:]
