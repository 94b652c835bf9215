"""Episodes per second at 1, 32 and 128 sessions: through `OpenEnvs`, beside a bare WebSocket client, one real server.

An episode is a connection, a reset, STEPS steps and a close, in both. Bare means the frames of the protocol and
`json`, with no lease, no deadline, no check of actions or answers. A/B/A/B in one run, each pair in both orders.
Limit: on two cores the server is the slower side at 32 sessions and more, for both. Needs `.venv-openenv` (Makefile).
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from rlx.config import Config
from rlx.envs.openenv import OpenEnvs
from rlx.envs.openenv_server import EnvServers

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-openenv" / "bin" / "python"
SERVER = ROOT / "tests" / "envs" / "real_openenv" / "guess_server.py"
STEPS, PAIRS = 10, 6
SESSIONS = {1: 60, 32: 320, 128: 640}
"""Sessions at a time: episodes a measurement."""

Episode = Callable[[], Awaitable[None]]


def bare(url: str) -> Episode:
    address = url.replace("http://", "ws://") + "/ws"

    async def episode() -> None:
        async with connect(address, compression=None, ping_interval=None, proxy=None) as socket:
            await socket.send(json.dumps({"type": "reset", "data": {"seed": 7}}))
            json.loads(await socket.recv())
            for step in range(STEPS):
                await socket.send(json.dumps({"type": "step", "data": {"guess": step}}))
                json.loads(await socket.recv())
            await socket.send('{"type": "close"}')
            try:
                await socket.recv()
            except ConnectionClosed:
                return

    return episode


def leased(environments: OpenEnvs) -> Episode:
    async def episode() -> None:
        session = await environments.open(None, seed=7, deadline=time.monotonic() + 60)
        for step in range(STEPS):
            await session.step(guess=step)
        await session.close()

    return episode


async def episodes_per_second(episode: Episode, sessions: int, count: int) -> float:
    left = iter(range(count))

    async def player() -> None:
        for _ in left:
            await episode()

    began = time.perf_counter()
    await asyncio.gather(*[player() for _ in range(sessions)])
    return count / (time.perf_counter() - began)


async def main() -> None:
    freeze = subprocess.run([PYTHON, "-m", "pip", "list", "--format=json"], check=True, capture_output=True).stdout  # noqa: ASYNC221 - nothing runs yet
    theirs = {package["name"]: package["version"] for package in json.loads(freeze)}
    print(
        f"openenv {theirs['openenv']}, uvicorn {theirs['uvicorn']}, websockets {importlib.metadata.version('websockets')}; Python {platform.python_version()}; {platform.machine()}"
    )
    section = {"command": [str(PYTHON), str(SERVER), "{port}", "256"]}
    config = Config.model_validate({"base_model": "-", "rl": "grpo", "datasets": [{"path": "-"}], "envs": [{"openenv": section}], "output_dir": "outputs/benchmark"})  # fmt: skip
    servers = EnvServers(config, probe_interval=math.inf)
    await servers.start()
    environments = OpenEnvs(config, servers.urls)
    ways = {"bare client": bare(servers.urls["env"]), "OpenEnvs": leased(environments)}
    print(f"episodes of {STEPS} steps per second, median of {2 * PAIRS} (min to max)")
    for sessions, count in SESSIONS.items():
        found: dict[str, list[float]] = {name: [] for name in ways}
        for name in ways:
            await episodes_per_second(ways[name], sessions, count // 4)
        for _ in range(PAIRS):
            for name in [*ways, *reversed(ways)]:
                found[name].append(await episodes_per_second(ways[name], sessions, count))
        told = [f"{name} {statistics.median(v):7.1f} ({min(v):.1f} to {max(v):.1f})" for name, v in found.items()]
        ratio = statistics.median(found["OpenEnvs"]) / statistics.median(found["bare client"])
        print(f"  {sessions:4} sessions   {'   '.join(told)}   ratio {ratio:.2f}", flush=True)
    await environments.close()
    await servers.close()


if __name__ == "__main__":
    asyncio.run(main())
