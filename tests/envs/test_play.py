"""The player: whole episodes against the fake OpenEnv server, with a policy that says what it is told."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from env_parts import Policy, chat_of, group, runner_of, tiny_tokenizer
from openenv_parts import HINT, FakeServer, config_with, until_instances

from rlx.envs.chat import Chat
from rlx.envs.data_text import DataText
from rlx.envs.openenv import OpenEnvs
from rlx.envs.play import player, rendered
from rlx.envs.rollout import Rollout
from rlx.episode import Episode

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORD = {"type": "object", "properties": {"metadata": {}, "word": {"type": "string"}, "loud": {"type": "boolean"}}, "required": ["word"]}  # fmt: skip


def plain_chat(template: str | None = PLAIN) -> Chat:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return Chat(tokenizer)


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    async with FakeServer().running() as running:
        yield running
        await until_instances(running.url, 0)


async def played(
    server: FakeServer, chat: Chat, says: list[str], prompt: Any = None, max_turns: int = 16, **columns: Any
) -> tuple[Episode, Policy]:
    """The episode of a policy that says `says`, one a turn."""
    names = ("guess", "other")
    config = config_with(*[{"name": n, "openenv": {"url": server.url}, "max_turns": max_turns} for n in names])
    policy = Policy(chat, [f"{text}<|im_end|>" for text in says])
    environments = OpenEnvs(config)
    runner = runner_of(player(config), chat=chat, environments=environments, retries=0)
    prompt = [{"role": "user", "content": "play"}] if prompt is None else prompt
    (episode,) = await runner.run(policy, group(prompt, chat=chat, max_tokens=4000, columns=columns))
    await environments.close()
    return episode, policy


def prompt_of(policy: Policy, turn: int = 0) -> str:
    return str(policy.chat.tokenizer.decode(policy.requests[turn].prompt_ids))


async def test_json_replies_are_actions_and_the_sum_of_the_steps_is_the_reward(server: FakeServer) -> None:
    episode, policy = await played(server, plain_chat(), ['{"guess": 1}', 'I say:\n```json\n{"guess": 9}\n```', "7"])
    assert (episode.status, episode.error, episode.turns) == ("ok", "", 3)
    assert episode.reward == pytest.approx(0.8)
    assert [(r.value, r.name, r.turn) for r in episode.step_rewards] == [
        (-0.1, "guess", 0),
        (-0.1, "guess", 1),
        (1.0, "guess", 2),
    ]
    assert server.actions == [{"guess": 1}, {"guess": 9}, {"guess": 7}]
    assert server.resets == [{"seed": 7}]
    assert prompt_of(policy) == f"<|im_start|>user\nplay\n\n{HINT}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_of(policy, 1).endswith(
        '{"guess": 1}<|im_end|>\n<|im_start|>user\nhigher<|im_end|>\n<|im_start|>assistant\n'
    )


async def test_what_is_no_action_is_told_and_costs_a_turn(server: FakeServer) -> None:
    episode, policy = await played(server, plain_chat(), ["five?", '{"gues": 5}', '{"guess": 7}'])
    assert (episode.status, episode.turns, episode.reward) == ("ok", 3, 1.0)
    assert "Reply with one JSON object and nothing else. Its fields: guess (an integer)" in prompt_of(policy, 1)
    assert "error: the action does not fit: gues is no field of it; guess is missing" in prompt_of(policy, 2)
    assert server.actions == [{"guess": 7}]


async def test_an_episode_ends_after_max_turns(server: FakeServer) -> None:
    episode, _ = await played(server, plain_chat(), ["1", "1", "1"], max_turns=2)
    assert (episode.status, episode.turns, episode.reward) == ("ok", 2, pytest.approx(-0.2))


async def test_an_action_of_one_text_is_the_reply_itself(server: FakeServer) -> None:
    server.schema = WORD
    await played(server, chat_of(), ["north", "```\nsouth\n```"], max_turns=2)
    assert server.actions == [{"word": "north"}, {"word": "```\nsouth\n```"}]


async def test_a_template_with_tools_gets_the_action_as_a_tool(server: FakeServer) -> None:
    def call(name: str, arguments: Any) -> str:
        return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"

    says = [call("step", {"guess": 1}), "I do not know", call("jump", {}), call("step", {"guess": 7})]
    episode, policy = await played(server, chat_of(), says)
    assert (episode.status, episode.error, episode.turns, episode.reward) == ("ok", "", 4, pytest.approx(0.9))
    assert server.actions == [{"guess": 1}, {"guess": 7}]
    assert '"name": "step"' in prompt_of(policy)
    assert "metadata" not in prompt_of(policy)
    assert "<tool_response>\nhigher\n</tool_response>" in prompt_of(policy, 1)
    assert "Call the tool 'step' to act. Its arguments: guess (an integer)" in prompt_of(policy, 2)
    assert "there is no tool 'jump', only 'step'" in prompt_of(policy, 3)


async def test_calls_after_the_end_are_not_made(server: FakeServer) -> None:
    call = '<tool_call>\n{"name": "step", "arguments": {"guess": 7}}\n</tool_call>'
    episode, _ = await played(server, chat_of(), [f"{call}\n{call}"])
    assert (episode.reward, len(server.actions)) == (1.0, 1)


async def test_a_long_observation_ends_the_episode_as_truncated_before_it_is_tokenised(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.observation = "x" * 8_000_000
    encoded, real = [0], DataText.encode

    def encode(self: DataText, rendered: str) -> np.ndarray:
        encoded.append(len(rendered))
        return real(self, rendered)

    monkeypatch.setattr(DataText, "encode", encode)
    episode, _ = await played(server, plain_chat(), ["1", "2"])
    assert max(encoded) < 10_000
    assert (episode.status, episode.reward, episode.turns) == ("truncated", pytest.approx(-0.1), 1)
    assert "8,000,000 characters were to be shown" in episode.error


async def test_a_prompt_that_is_text_goes_on_as_text(server: FakeServer) -> None:
    episode, policy = await played(server, plain_chat(None), ["7"], prompt="play: ")
    assert prompt_of(policy) == f"play: {HINT}"
    assert episode.reward == 1.0


async def test_an_observation_follows_a_system_message_as_a_message_of_its_own(server: FakeServer) -> None:
    _, policy = await played(server, plain_chat(), ["7"], prompt=[{"role": "system", "content": "be brief"}])
    assert prompt_of(policy).startswith(f"<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n{HINT}<|im_end|>")


async def test_the_row_names_its_environment(server: FakeServer) -> None:
    episode, _ = await played(server, plain_chat(), ["7"], environment="other")
    assert [reward.name for reward in episode.step_rewards] == ["other"]
    episode, _ = await played(server, plain_chat(), ["7"], environment="othe")
    assert episode.status == "aborted"
    assert "there is no environment 'othe'. Did you mean 'other'?" in episode.error


async def test_an_environment_that_is_lost_gives_no_reward(server: FakeServer) -> None:
    names = [{"name": "guess", "openenv": {"url": server.url, "reset": {"fault": "step_raises"}}}]
    config, chat = config_with(*names), plain_chat()
    runner = runner_of(player(config), chat=chat, environments=OpenEnvs(config), retries=2)
    (episode,) = await runner.run(Policy(chat, lambda *_: "7<|im_end|>"), group(chat=chat))
    assert (episode.status, episode.attempts, episode.reward) == ("env_lost", 3, None)
    assert "raised in a step" in episode.error
    assert [reset["seed"] for reset in server.resets] == [7, 7, 7]


async def test_rewards_of_tools_are_recorded_like_those_of_steps(server: FakeServer) -> None:
    server.schema = {"type": "object", "properties": {"type": {}, "tool_name": {"type": "string"}, "arguments": {}}}
    config, chat = config_with({"name": "adder", "openenv": {"url": server.url}}), chat_of()

    async def add(ctx: Rollout) -> None:
        env = await ctx.env()
        ctx.start(tools=await env.list_tools())
        (call,) = (await ctx.turn()).tool_calls
        ctx.completion = str(await env.call_tool(call.name, call.arguments or {}))

    said = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>'
    runner = runner_of(add, chat=chat, environments=OpenEnvs(config))
    (episode,) = await runner.run(Policy(chat, [said]), group(chat=chat))
    assert (episode.status, episode.error, episode.completion, episode.reward) == ("ok", "", "5", 0.5)
    assert [(r.value, r.name, r.turn) for r in episode.step_rewards] == [(0.5, "adder", 0)]


@pytest.mark.parametrize(
    ("observation", "shown"),
    [
        ({"message": "hello", "tries": 1, "metadata": {}}, "hello"),
        ({"message": "", "text": "hi"}, "hi"),
        ({"board": [[0, 1]], "metadata": {"a": 1}}, '{"board":[[0,1]]}'),
        ({"content": 3}, '{"content":3}'),
        ("text", '"text"'),
    ],
)
def test_observations_are_shown_as_their_text_or_as_json(observation: Any, shown: str) -> None:
    assert rendered(observation) == shown
