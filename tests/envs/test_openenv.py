"""Sessions with OpenEnv servers. What `server` gives runs on the fake server, and (slow) on the real one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from held_port import held_port
from openenv_parts import GUESS_SCHEMA, HINT, FakeServer, config_with, instances, real_server, until_instances

from rlx.envs import openenv_leases
from rlx.envs.errors import ActionError, EnvLost
from rlx.envs.openenv import OpenEnvs, Session
from rlx.envs.openenv_leases import RETRY_S
from rlx.errors import UserCodeError
from rlx.processes import free_port


@pytest.fixture(scope="module")
def real_url() -> Any:
    with real_server(48) as url:
        yield url


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.slow)])
async def url(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """The address of a server of 48 sessions; nothing may be left in it."""
    if request.param == "real":
        address = request.getfixturevalue("real_url")
        await until_instances(address, 0)
        yield address
        await until_instances(address, 0)
        return
    async with FakeServer(48).running() as server:
        yield server.url
        await until_instances(server.url, 0)


@asynccontextmanager
async def environments(url: str, **settings: Any) -> AsyncIterator[OpenEnvs]:
    patient = {"reset_timeout": 60.0, "step_timeout": 60.0, "close_timeout": 60.0}
    opened = OpenEnvs(config_with({"name": "guess", "openenv": {"url": url, **patient, **settings}}))
    try:
        yield opened
    finally:
        await opened.close()


async def opened(envs: OpenEnvs, *, seed: int = 3, seconds: float = 120.0, **reset: Any) -> Session:
    return await envs.open("guess", seed=seed, deadline=time.monotonic() + seconds, **reset)


async def one_episode(envs: OpenEnvs, guesses: range = range(10), **reset: Any) -> float:
    session = await opened(envs, **reset)
    rewards = []
    try:
        for guess in guesses:
            rewards.append((await session.step(guess=guess)).reward)
            if session.done:
                break
    finally:
        await session.close()
    return sum(rewards)


# --- the contract, on both servers


async def test_an_episode_gives_observations_rewards_and_done_as_the_server_sent_them(url: str) -> None:
    async with environments(url) as envs:
        session = await opened(envs)
        assert (session.name, session.observation["message"], session.reward, session.done) == (
            "guess",
            HINT,
            None,
            False,
        )
        assert session.action_schema["properties"]["guess"]["type"] == "integer"
        steps = [await session.step({"guess": 1}), await session.step(guess=5), await session.step(guess=3)]
        assert [step.observation["message"] for step in steps] == ["higher", "lower", "right"]
        assert [(step.reward, step.done) for step in steps] == [(-0.1, False), (-0.1, False), (1.0, True)]
        assert (session.reward, session.done, session.observation["tries"]) == (1.0, True, 3)


async def test_text_that_stands_for_a_number_is_one(url: str) -> None:
    async with environments(url) as envs:
        session = await opened(envs)
        assert (await session.step(guess=" 3 ")).done


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ({}, "guess is missing"),
        ({"guess": "three"}, "guess must be an integer, not 'three'"),
        ({"guess": 3.5}, "guess must be an integer, not 3.5"),
        ({"guess": True}, "guess must be an integer"),
        ({"guess": 3, "gues": 4}, "gues is no field of it"),
        ({"guess": -1}, "greater than or equal to 0"),
    ],
)
async def test_an_action_that_does_not_fit_is_told_and_the_session_goes_on(
    url: str, action: dict[str, Any], said: str
) -> None:
    async with environments(url) as envs:
        session = await opened(envs)
        with pytest.raises(ActionError, match=said):
            await session.step(action)
        assert (await session.step(guess=3)).done


async def test_an_environment_that_raises_in_reset_is_lost_and_its_slot_free(url: str) -> None:
    async with environments(url, max_sessions=1) as envs:
        with pytest.raises(EnvLost, match=r"'guess' at http.*raised in reset: the reset failed"):
            await opened(envs, fault="reset_raises")
        assert await one_episode(envs) == pytest.approx(0.7)


async def test_an_environment_that_raises_in_a_step_is_lost_for_good(url: str) -> None:
    async with environments(url, max_sessions=1) as envs:
        session = await opened(envs, fault="step_raises")
        for _ in range(2):
            with pytest.raises(EnvLost, match="the environment raised in a step: the step failed"):
                await session.step(guess=3)
        await session.close()
        assert await one_episode(envs) == pytest.approx(0.7)


@pytest.mark.parametrize("where", ["reset", "step"])
async def test_an_environment_that_hangs_is_lost_at_its_deadline(url: str, where: str) -> None:
    async with environments(url, **{f"{where}_timeout": 1.0}) as envs:  # type: ignore[arg-type]
        with pytest.raises(EnvLost, match=r"was not answered within 1 s|no connection: no answer within 1 s"):
            await one_episode(envs, fault=f"{where}_hangs", hang_s=2.0)
    async with environments(url) as envs:
        assert await one_episode(envs) == pytest.approx(0.7)


async def test_a_session_that_hangs_while_it_is_closed_holds_nobody_up(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with environments(url, close_timeout=0.2, max_sessions=1) as envs:
        with caplog.at_level(logging.WARNING):
            assert await one_episode(envs, fault="close_hangs", hang_s=1.2) == pytest.approx(0.7)
        assert "the session was not closed within 0.2 s" in caplog.text
        assert await one_episode(envs) == pytest.approx(0.7)


async def test_a_huge_observation_is_refused(url: str) -> None:
    async with environments(url) as envs:
        session = await opened(envs, fault="huge")
        with pytest.raises(EnvLost, match="a message of more than 16 MiB"):
            await session.step(guess=3)


async def test_special_tokens_of_an_observation_pass_as_text(url: str) -> None:
    async with environments(url) as envs:
        session = await opened(envs, fault="special")
        assert session.observation["message"] == "<|im_start|>assistant\n"


async def test_more_episodes_than_the_server_allows_wait_their_turn(url: str) -> None:
    async with environments(url) as envs:
        rewards = await asyncio.gather(*[one_episode(envs, range(3, 4)) for _ in range(100)])
    assert rewards == pytest.approx([1.0] * 100)


async def test_a_cancelled_step_loses_the_session_and_frees_its_lease(url: str) -> None:
    async with environments(url, max_sessions=1) as envs:
        session = await opened(envs, fault="step_hangs", hang_s=1.2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await session.step(guess=3)
        with pytest.raises(EnvLost, match="a step was cancelled"):
            await session.step(guess=3)
        await session.close()
        assert await one_episode(envs) == pytest.approx(0.7)


async def test_closing_gives_every_session_back(url: str) -> None:
    async with environments(url) as envs:
        sessions = [await opened(envs) for _ in range(3)]
        assert await instances(url) == 3
        await sessions[0].close()
        await sessions[0].close()
        assert await instances(url) == 2
        with pytest.raises(EnvLost, match="the session is closed"):
            await sessions[0].step(guess=3)
    assert await instances(url) == 0


async def test_closing_twice_gives_one_lease_back(url: str) -> None:
    async with environments(url, max_sessions=2) as envs:
        first, _ = [await opened(envs) for _ in range(2)]
        await first.close()
        await first.close()
        await opened(envs)
        with pytest.raises(EnvLost, match="all sessions of this process are in use"):
            await opened(envs, seconds=0.2)


async def test_steps_side_by_side_get_their_own_answers(url: str) -> None:
    async with environments(url) as envs:
        session = await opened(envs)
        steps = await asyncio.gather(*[session.step(guess=guess) for guess in (1, 5, 2, 9)])
    assert [step.observation["message"] for step in steps] == ["higher", "lower", "higher", "lower"]
    assert [step.observation["tries"] for step in steps] == [1, 2, 3, 4]


# --- what only the fake server does


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with FakeServer(3).running() as running:
        yield running


@pytest.mark.parametrize(
    "raw",
    [
        "not json",
        "[]",
        "{}",
        '{"type": "observation"}',
        '{"type": "observation", "data": []}',
        '{"type": "observation", "data": {}}',
        '{"type": "observation", "data": {"observation": "text", "reward": 0, "done": false}}',
        '{"type": "observation", "data": {"observation": {}, "reward": "much", "done": false}}',
        '{"type": "observation", "data": {"observation": {}, "reward": NaN, "done": false}}',
        '{"type": "observation", "data": {"observation": {}, "reward": 0}}',
        '{"type": "state", "data": {"step_count": 1}}',
        '{"type": "error", "data": "broken"}',
        '{"type": "error", "data": {"code": "SESSION_ERROR", "message": "it broke"}}',
        '{"type": "error", "data": {"code": "UNKNOWN_TYPE", "message": "what"}}',
        '{"type": "error", "data": {}}',
        "[" * 100_000,
    ],
)
async def test_an_answer_that_is_none_loses_the_session(server: FakeServer, raw: str) -> None:
    async with environments(server.url) as envs:
        session = await opened(envs, raw=raw)
        with pytest.raises(EnvLost, match=r"environment 'guess' at http://127.0.0.1:\d+: .*a step"):
            await session.step(guess=3)
        await until_instances(server.url, 0)
        with pytest.raises(EnvLost):
            await session.step(guess=3)


async def test_binary_answers_are_read_like_text_or_lose_the_session(server: FakeServer) -> None:
    async with environments(server.url) as envs:
        session = await opened(envs, raw="\ud7ff")
        with pytest.raises(EnvLost, match="no frame of the protocol"):
            await session.step(guess=3)


async def test_a_connection_that_is_cut_loses_the_session(server: FakeServer) -> None:
    async with environments(server.url) as envs:
        session = await opened(envs, fault="step_cuts")
        with pytest.raises(EnvLost, match="the connection was lost during a step: the server is gone"):
            await session.step(guess=3)
        assert await one_episode(envs) == pytest.approx(0.7)
    assert server.opened == 2


async def test_an_idle_session_whose_connection_is_cut_is_lost_at_its_next_step(server: FakeServer) -> None:
    async with environments(server.url) as envs:
        session = await opened(envs, fault="idle_cuts")
        await until_instances(server.url, 0)
        with pytest.raises(EnvLost, match="the connection was lost during a step"):
            await session.step(guess=3)


async def test_nobody_there_is_told_at_once() -> None:
    with held_port() as port:
        envs = OpenEnvs(config_with({"name": "guess", "openenv": {"url": f"http://127.0.0.1:{port}"}}))
        with pytest.raises(EnvLost, match=f"'guess' at http://127.0.0.1:{port}: no connection: connection refused"):
            await opened(envs)


async def test_what_is_no_openenv_server_is_told(server: FakeServer) -> None:
    async with environments(f"{server.url}/elsewhere") as envs:
        with pytest.raises(EnvLost, match=r"no connection: InvalidStatus.*404"):
            await opened(envs)


@pytest.mark.parametrize("form", ["http://{}", "ws://{}", "http://{}/", "ws://{}/ws", "{}"])
async def test_every_form_of_an_address_is_understood(server: FakeServer, form: str) -> None:
    async with environments(form.format(server.url.removeprefix("http://"))) as envs:
        assert await one_episode(envs) == pytest.approx(0.7)


async def test_environment_variables_for_proxies_do_not_concern_this_machine(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with environments(server.url) as envs:
        assert await one_episode(envs) == pytest.approx(0.7)


async def test_no_more_sessions_are_open_than_the_server_allows_and_none_waits_idle(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openenv_leases, "RETRY_S", 5.0)
    began = time.monotonic()
    async with environments(server.url) as envs:
        assert await asyncio.gather(*[one_episode(envs) for _ in range(120)]) == pytest.approx([0.7] * 120)
    assert time.monotonic() - began < 100, "40 rounds of waiting take 200 s"
    assert server.most == 3
    assert server.opened == 120
    assert server.schema_requests <= 3


async def test_max_sessions_is_never_exceeded(server: FakeServer) -> None:
    async with environments(server.url, max_sessions=2) as envs:
        await asyncio.gather(*[one_episode(envs) for _ in range(20)])
    assert (server.most, server.refusals) == (2, 0)


async def test_a_limit_that_was_learned_grows_when_others_give_their_sessions_back(server: FakeServer) -> None:
    async with environments(server.url) as other, environments(server.url) as envs:
        held = [await opened(other) for _ in range(3)]
        waiting = [asyncio.create_task(opened(envs)) for _ in range(3)]
        await server.refused(3)
        for session in held:
            await session.close()
        async with asyncio.timeout(60):
            await asyncio.gather(*waiting)
        assert server.sessions == 3


async def test_a_lease_that_does_not_come_free_is_lost_with_the_reason(server: FakeServer) -> None:
    async with environments(server.url) as other, environments(server.url, lease_timeout=0.3) as envs:
        for _ in range(3):
            await opened(other)
        with pytest.raises(
            EnvLost, match=r"no free session within 0.3 s .*CAPACITY_REACHED: at capacity.*lease_timeout"
        ):
            await opened(envs)


async def test_a_lease_waits_no_longer_than_the_episode_has(server: FakeServer) -> None:
    async with environments(server.url, max_sessions=1) as envs:
        await opened(envs)
        began = time.monotonic()
        with pytest.raises(EnvLost, match="all sessions of this process are in use"):
            await opened(envs, seconds=1.5 * RETRY_S)
        assert time.monotonic() - began < 60, "lease_timeout is 120 s"


async def test_a_cancelled_wait_takes_no_lease(server: FakeServer) -> None:
    async with environments(server.url, max_sessions=1) as envs:
        session = await opened(envs)
        waiting = asyncio.create_task(opened(envs))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.wait({waiting})
        await session.close()
        assert await one_episode(envs) == pytest.approx(0.7)


async def test_a_factory_that_fails_is_told_unless_sessions_are_open(server: FakeServer) -> None:
    async with environments(server.url) as envs:
        session = await opened(envs)
        server.factory_fails = True
        waiting = asyncio.create_task(opened(envs))
        await server.refused(1)
        await session.close()
        with pytest.raises(EnvLost, match=r"http:\S+: FACTORY_ERROR: the factory failed"):
            await asyncio.wait_for(waiting, 60)
        server.factory_fails = False
        assert await one_episode(envs) == pytest.approx(0.7)


async def test_resets_get_the_seed_and_the_arguments_of_the_configuration(server: FakeServer) -> None:
    async with environments(server.url, reset={"level": 2, "mode": "easy"}) as envs:
        await opened(envs, seed=5, level=3)
    assert server.resets == [{"level": 3, "mode": "easy", "seed": 5}]


async def test_a_server_without_schemas_is_told_and_keeps_no_session(server: FakeServer) -> None:
    async with environments(server.url) as envs:
        server.schema = 3  # type: ignore[assignment]
        with pytest.raises(EnvLost, match="GET /schema gave no schemas"):
            await opened(envs)
        await until_instances(server.url, 0)


async def test_environments_are_found_by_name_and_number(server: FakeServer) -> None:
    names = [{"name": name, "openenv": {"url": server.url}} for name in ("chess", "go")]
    envs = OpenEnvs(config_with(*names))
    for ref, name in ((None, "chess"), (1, "go"), ("go", "go")):
        session = await envs.open(ref, seed=0, deadline=time.monotonic() + 60)
        assert session.name == name
        await session.close()
    for ref, said in (("ches", "Did you mean 'chess'"), (2, "There are: 'chess', 'go'"), (-1, "no environment -1")):
        with pytest.raises(UserCodeError, match=said):
            await envs.open(ref, seed=0, deadline=time.monotonic() + 60)


async def test_a_server_of_ours_that_is_restarted_is_waited_for() -> None:
    port = free_port("127.0.0.1", 31_100)
    section = {"command": "true", "start_timeout": 60.0}
    envs = OpenEnvs(config_with({"name": "guess", "openenv": section}), {"guess": f"http://127.0.0.1:{port}"})
    episode = asyncio.create_task(one_episode(envs))
    await asyncio.sleep(0.1)
    assert not episode.done()
    async with FakeServer().running(port):
        assert await episode == pytest.approx(0.7)


async def test_a_server_that_was_not_started_is_told() -> None:
    envs = OpenEnvs(config_with({"name": "guess", "openenv": {"command": "true"}}))
    with pytest.raises(EnvLost, match=r"envs\[0\].openenv.command was not started"):
        await opened(envs)


async def test_an_action_that_is_not_json_is_told(server: FakeServer) -> None:
    server.schema = {"type": "object"}
    async with environments(server.url) as envs:
        session = await opened(envs)
        for value in (float("nan"), object()):
            with pytest.raises(ActionError, match="not JSON"):
                await session.step(guess=value)
        assert (await session.step(guess=3)).done


async def test_tools_of_an_environment_are_listed_and_called(server: FakeServer) -> None:
    server.schema = {"type": "object", "properties": {"type": {}, "tool_name": {"type": "string"}, "arguments": {}}}
    async with environments(server.url) as envs:
        session = await opened(envs)
        tools = await session.list_tools()
        assert [tool["function"]["name"] for tool in tools] == ["add"]
        assert tools[0]["function"]["parameters"]["properties"] == {"a": {"type": "integer"}}
        assert await session.call_tool("add", {"a": 2, "b": 3}) == 5
        assert session.reward == 0.5
        with pytest.raises(ActionError, match="subtract: no such tool"):
            await session.call_tool("subtract", {})
        assert server.actions[0] == {"type": "call_tool", "tool_name": "add", "arguments": {"a": 2, "b": 3}}


async def test_an_environment_without_tools_says_so(server: FakeServer) -> None:
    async with environments(server.url) as envs:
        session = await opened(envs)
        with pytest.raises(ActionError, match="does not support MCP"):
            await session.call_tool("add", {})
        assert (await session.step(guess=3)).done


@pytest.mark.parametrize(
    ("field", "given", "sent"),
    [
        ({"type": "integer"}, "7", 7),
        ({"type": "number"}, "2.5", 2.5),
        ({"type": "boolean"}, "True", True),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, None, None),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "7", "7"),
        ({"$ref": "#/$defs/Move"}, {"x": "1"}, {"x": 1}),
        ({"type": "array", "items": {"type": "integer"}}, ["1", 2], [1, 2]),
        ({"enum": ["left", "right"], "type": "string"}, "left", "left"),
        ({"const": 1}, 1, 1),
        ({}, {"any": "thing"}, {"any": "thing"}),
    ],
)
async def test_actions_are_sent_as_the_schema_wants_them(
    server: FakeServer, field: dict[str, Any], given: Any, sent: Any
) -> None:
    move = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    server.schema = {**GUESS_SCHEMA, "properties": {"guess": field}, "$defs": {"Move": move}}
    async with environments(server.url) as envs:
        await (await opened(envs)).step(guess=given)
    assert server.actions == [{"guess": sent}]


@pytest.mark.parametrize(
    ("field", "given", "said"),
    [
        ({"enum": ["left", "right"], "type": "string"}, "up", "guess must be 'left' or 'right', not 'up'"),
        ({"$ref": "#/$defs/Move"}, {"y": 1}, "guess.x is missing"),
        ({"type": "array", "items": {"type": "integer"}}, ["a"], r"guess\[0\] must be an integer"),
        ({"type": "string"}, 3, "guess must be a text, not 3"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "x", "guess must be an integer or null"),
        ({"type": "number"}, "nan", "not JSON"),
    ],
)
async def test_faults_of_an_action_name_field_and_type(
    server: FakeServer, field: dict[str, Any], given: Any, said: str
) -> None:
    move = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    server.schema = {**GUESS_SCHEMA, "properties": {"guess": field}, "$defs": {"Move": move}}
    async with environments(server.url) as envs:
        session = await opened(envs)
        with pytest.raises(ActionError, match=said):
            await session.step(guess=given)
    assert server.actions == []
