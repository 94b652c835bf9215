"""Whole episodes against real OpenEnv servers, which are killed, hang, crash and are over capacity."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from env_parts import Policy, chat_of, group, runner_of
from openenv_parts import config_with, real_command, real_server, until_instances

from rlx.envs.errors import ActionError, EnvLost
from rlx.envs.openenv import OpenEnvs, Session
from rlx.envs.openenv_server import EnvServers
from rlx.envs.play import player
from rlx.envs.rollout import Rollout

pytestmark = pytest.mark.slow
SETTINGS = {"start_timeout": 90.0, "reset_timeout": 30.0, "step_timeout": 30.0}


@asynccontextmanager
async def supervised(folder: Path, sessions: int, **settings: Any) -> AsyncIterator[tuple[EnvServers, OpenEnvs]]:
    section = {**SETTINGS, "command": real_command(sessions), **settings}
    config = config_with({"name": "guess", "openenv": section}, folder=folder)
    servers = EnvServers(config, probe_interval=0.3)
    try:
        await servers.start()
        environments = OpenEnvs(config, servers.urls)
        yield servers, environments
        await environments.close()
    finally:
        await servers.close()


def pid_of(servers: EnvServers) -> int:
    process = servers._servers["guess"]._process
    assert process is not None
    return process.pid


async def opened(environments: OpenEnvs, **reset: Any) -> Session:
    return await environments.open(None, seed=7, deadline=time.monotonic() + 120, **reset)


def policy() -> Policy:
    return Policy(chat_of(), lambda *_: "7<|im_end|>")


def guesser(faults: Any = lambda ctx: None) -> Any:
    """Guesses wrongly four times, then says what the policy says; misbehaves as `faults(ctx)` tells."""

    async def guess(ctx: Rollout) -> None:
        fault = faults(ctx)
        env = await ctx.env(**({"fault": fault, "hang_s": 8.0} if fault else {}))
        for number in (1, 2, 3, 4):
            await env.step(guess=number)
        assert (await env.step(guess=(await ctx.turn()).text)).done

    return guess


async def test_32_sessions_at_a_time_with_every_fault_leave_none_behind(tmp_path: Path) -> None:
    def faults(ctx: Rollout) -> str | None:
        if ctx.index == 0:
            return "step_raises"
        if ctx.index == 1 and ctx.attempt == 0:
            return "step_dies"
        if ctx.index < 6 and ctx.attempt == 0:  # once, as the end of the server may cost it another attempt
            return ("step_raises", "step_hangs", "reset_hangs", "reset_raises")[ctx.index - 2]
        return "close_hangs" if ctx.index == 6 else None

    timeouts = {"reset_timeout": 6.0, "step_timeout": 6.0, "close_timeout": 0.5}
    async with supervised(tmp_path, 32, **timeouts) as (servers, environments):
        runner = runner_of(guesser(faults), environments=environments, retries=2, timeout=200.0)
        episodes = await runner.run(policy(), group(n=32))
        assert [e.status for e in episodes] == ["env_lost"] + ["ok"] * 31, [e.error for e in episodes]
        assert (episodes[0].attempts, episodes[0].reward) == (3, None)
        assert all(e.reward == pytest.approx(0.6) for e in episodes[1:])
        assert servers._servers["guess"].restarts == 1
        await until_instances(servers.urls["guess"], 0)


async def test_a_run_that_is_cancelled_leaves_no_session(tmp_path: Path) -> None:
    async with supervised(tmp_path, 32) as (servers, environments):
        said = policy()
        said.gate.clear()
        runner = runner_of(guesser(), environments=environments, timeout=120.0)
        run = asyncio.create_task(runner.run(said, group(n=32)))
        await said.asked(32)
        await until_instances(servers.urls["guess"], 32)
        run.cancel()
        await asyncio.wait({run})
        await until_instances(servers.urls["guess"], 0)


async def test_eight_episodes_take_turns_at_the_one_session_of_a_server(tmp_path: Path) -> None:
    section = {**SETTINGS, "command": real_command()}
    config = config_with({"name": "guess", "openenv": section}, folder=tmp_path)
    servers = EnvServers(config, probe_interval=0.3)
    try:
        await servers.start()
        environments = OpenEnvs(config, servers.urls)
        runner = runner_of(player(config), environments=environments, timeout=120.0, retries=0)
        call = '<tool_call>\n{"name": "step", "arguments": {"guess": 7}}\n</tool_call><|im_end|>'
        episodes = await runner.run(Policy(chat_of(), lambda *_: call), group(n=8))
        assert [(e.status, e.reward) for e in episodes] == [("ok", 1.0)] * 8, [e.error for e in episodes]
        await until_instances(servers.urls["guess"], 0)
    finally:
        await servers.close()


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
async def test_episodes_begin_anew_on_a_server_that_was_restarted(tmp_path: Path, signal_number: int) -> None:
    timeouts = {"reset_timeout": 6.0, "step_timeout": 6.0} if signal_number == signal.SIGSTOP else {}
    async with supervised(tmp_path, 8, **timeouts) as (servers, environments):
        said = policy()
        said.gate.clear()
        run = asyncio.create_task(runner_of(guesser(), environments=environments, timeout=120.0).run(said, group(n=8)))
        await said.asked(8)
        os.kill(pid_of(servers), signal_number)
        said.gate.set()
        episodes = await run
        assert [e.status for e in episodes] == ["ok"] * 8, [e.error for e in episodes]
        assert all(e.attempts > 1 and e.reward == pytest.approx(0.6) for e in episodes)
        assert servers._servers["guess"].restarts == 1
        await until_instances(servers.urls["guess"], 0)


async def test_a_slot_that_hangs_for_ever_is_won_back(tmp_path: Path) -> None:
    async with supervised(tmp_path, 1) as (servers, environments):
        section = {**SETTINGS, "command": real_command(1), "step_timeout": 3.0}
        hasty = OpenEnvs(config_with({"name": "guess", "openenv": section}, folder=tmp_path), servers.urls)
        session = await opened(hasty, fault="step_hangs", hang_s=1000.0)
        with pytest.raises(EnvLost, match="a step was not answered within 3 s"):
            await session.step(guess=7)
        await session.close()
        session = None
        async with asyncio.timeout(200):
            while session is None:
                with contextlib.suppress(EnvLost):  # the server may be ended between the connection and the reset
                    session = await opened(environments)
        assert (await session.step(guess=7)).done
        assert servers._servers["guess"].restarts == 1


async def test_what_a_custom_validator_refuses_loses_the_session_and_says_why() -> None:
    with real_server(2) as url:
        environments = OpenEnvs(config_with({"openenv": {"url": url}}))
        session = await opened(environments)
        with pytest.raises(EnvLost, match=r"SESSION_ERROR.*constrain it with Field\(ge"):
            await session.step(guess=13)
        await environments.close()


async def test_the_tools_of_a_real_mcp_environment_are_listed_and_called() -> None:
    with real_server(server="tool_server.py") as url:
        environments = OpenEnvs(config_with({"openenv": {"url": url}}))
        session = await opened(environments)
        (tool,) = await session.list_tools()
        assert (tool["function"]["name"], tool["function"]["description"]) == ("add", "Add two numbers.")
        assert set(tool["function"]["parameters"]["properties"]) == {"a", "b"}
        assert await session.call_tool("add", {"a": 2, "b": 3}) == 5
        assert session.reward == 0.5
        with pytest.raises(ActionError, match="add: "):
            await session.call_tool("add", {"a": "two", "b": 3})
        with pytest.raises(ActionError, match="subtract: "):
            await session.call_tool("subtract", {})
        assert await session.call_tool("add", {"a": 4, "b": 4}) == 8
        await environments.close()
