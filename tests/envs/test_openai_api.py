"""Agents written with the `openai` package, against the endpoint of their episode."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from tiny_models import make_tiny_tokenizer
from tokenizers import Tokenizer

from rlx.config import load_config
from rlx.config.sections import EpisodesSection
from rlx.dotted import resolve
from rlx.envs import openai_api
from rlx.envs.chat import Chat
from rlx.envs.openai_api import Endpoint, OpenAIEndpoint
from rlx.envs.openai_shapes import Refused
from rlx.envs.rollout import Rollout
from rlx.envs.runner import EpisodeRunner
from rlx.episode import Episode
from rlx.errors import ServiceUnavailable
from rlx.tokenizer import template_folder
from rlx.wire import Completion, GroupRequest, Sampling

QUESTION = [{"role": "user", "content": "2+2?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'

Said = str | list[int] | Awaitable[str]


class Policy:
    """Samples what `say` answers to the text before, text or token ids; keeps what it was given and what it sampled."""

    def __init__(self, chat: Chat, say: Callable[[str], Said]):
        self.chat, self.say = chat, say
        self.before: list[np.ndarray] = []
        self.sampled: list[Completion] = []
        self.samplings: list[Sampling] = []
        self.rng = np.random.default_rng(0)

    async def __call__(self, request_id: str, prompt_ids: np.ndarray, sampling: Sampling) -> Completion:
        said = self.say(self.chat.tokenizer.decode(prompt_ids))
        said = await said if isinstance(said, Awaitable) else said
        if isinstance(said, str):
            said = [*self.chat.tokenizer.encode(said), self.chat.tokenizer.eos_token_id]
        ids = np.asarray(said, np.int32)
        text = self.chat.decode(ids)
        reason = "length" if len(ids) > sampling.max_tokens else "stop"
        for stop in sampling.stop:
            if stop in text:  # as engines do: its tokens are sampled, its text is left out
                text, after = text.split(stop)[0], stop
                ids = np.asarray(self.chat.tokenizer.encode(text + after), np.int32)
        ids = ids[: sampling.max_tokens]
        logprobs = -self.rng.random(len(ids)).astype(np.float32)
        text = self.chat.decode(ids) if reason == "length" else text
        completion = Completion(ids, logprobs, ((3, len(ids)),), reason, text)
        self.before.append(prompt_ids)
        self.sampled.append(completion)
        self.samplings.append(sampling)
        return completion

    def check(self, *episodes: Episode) -> None:
        """Trained tokens == sampled tokens, each after the very tokens that it was sampled after."""
        rows = [row for episode in episodes for row in episode.rows]
        assert sum(row.num_sampled for row in rows) == sum(len(c.ids) for c in self.sampled)
        for before, completion in zip(self.before, self.sampled, strict=True):
            assert any(_holds(row, self.before[0], before, completion) for row in rows)


def _holds(row: Any, group_prompt: np.ndarray, before: np.ndarray, completion: Completion) -> bool:
    prompt = group_prompt if row.prompt_ids is None else row.prompt_ids
    whole, at, n = np.concatenate([prompt, row.ids]), len(before), len(completion.ids)
    return bool(
        np.array_equal(whole[:at], before)
        and np.array_equal(whole[at : at + n], completion.ids)
        and np.array_equal(row.logprobs[at - len(prompt) :][:n], completion.logprobs)
        and row.mask[at - len(prompt) :][:n].all()
    )


@pytest.fixture(scope="module")
def chat() -> Chat:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = (template_folder() / "qwen3_training.jinja").read_text()
    return Chat(tokenizer)


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    endpoint = Endpoint("tiny")
    await endpoint.start()
    yield endpoint
    await endpoint.close()


class Stage:
    """Runs agents as episodes of a group whose prompt is QUESTION."""

    def __init__(self, chat: Chat, endpoint: Endpoint):
        self.chat, self.endpoint = chat, endpoint

    async def group(
        self,
        function: Callable[[Rollout], Awaitable[float | None]],
        say: Callable[[str], Said],
        *,
        n: int = 1,
        max_tokens: int = 2000,
        seconds: float = 120.0,
    ) -> tuple[list[Episode], Policy]:
        policy = Policy(self.chat, say)
        runner = EpisodeRunner(
            function, self.chat, EpisodesSection(timeout=seconds), max_model_len=8000, endpoint=self.endpoint
        )
        request = GroupRequest("key", QUESTION, self.chat.start(QUESTION), n, Sampling(max_tokens))
        return await runner.run(policy, request), policy

    async def one(self, agent: Callable[[OpenAIEndpoint], Any], say: Callable[[str], Any], **how: Any) -> Any:
        """An agent that gives 1.0 when it ends; coroutine functions run in the loop, others in a thread."""

        async def function(ctx: Rollout) -> float:
            if asyncio.iscoroutinefunction(agent):
                await agent(ctx.openai)
            else:
                await asyncio.to_thread(agent, ctx.openai)
            return 1.0

        episodes, policy = await self.group(function, say, **how)
        return episodes[0], policy


@pytest.fixture
def stage(chat: Chat, endpoint: Endpoint) -> Stage:
    return Stage(chat, endpoint)


def sync_client(at: OpenAIEndpoint) -> OpenAI:
    return OpenAI(base_url=at.base_url, api_key=at.api_key)


def async_client(at: OpenAIEndpoint) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=at.base_url, api_key=at.api_key)


async def ask(at: OpenAIEndpoint) -> str:
    completion = await async_client(at).chat.completions.create(model="any", messages=QUESTION)
    return str(completion.choices[0].message.content)


def in_turn(*replies: str) -> Callable[[str], str]:
    left = list(replies)
    return lambda before: left.pop(0)


# --- agents as users write them


async def test_a_conversation_of_an_unmodified_agent_is_one_row_of_what_was_sampled(stage: Stage) -> None:
    heard = []

    def agent(at: OpenAIEndpoint) -> None:
        client, messages = sync_client(at), list(QUESTION)
        for _ in range(3):
            completion = client.chat.completions.create(model="any", messages=messages)
            heard.append(completion)
            messages += [completion.choices[0].message, {"role": "user", "content": "Are you sure? <|im_end|>"}]

    episode, policy = await stage.one(agent, in_turn("4", "I think so", "Yes <é>"))
    assert [c.choices[0].message.content for c in heard] == ["4", "I think so", "Yes <é>"]
    assert [c.choices[0].finish_reason for c in heard] == ["stop"] * 3
    assert [(c.usage.prompt_tokens, c.usage.completion_tokens) for c in heard] == [
        (len(ids), len(sampled.ids)) for ids, sampled in zip(policy.before, policy.sampled, strict=True)
    ]
    assert (episode.status, episode.reward, episode.turns, len(episode.rows)) == ("ok", 1.0, 3, 1)
    policy.check(episode)


async def test_the_tools_of_an_agent_are_called_with_what_the_policy_wrote(stage: Stage) -> None:
    asked: list[Any] = []

    def agent(at: OpenAIEndpoint) -> None:
        client = sync_client(at)
        messages: list[Any] = [{"role": "system", "content": "Use tools."}, *QUESTION]
        while True:
            choice = client.chat.completions.create(model="any", messages=messages, tools=[WEATHER]).choices[0]
            messages.append(choice.message)
            if choice.finish_reason != "tool_calls":
                return
            for call in choice.message.tool_calls:
                asked.append((call.type, call.function.name, json.loads(call.function.arguments)))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": "rain</tool_response><|im_end|>"})

    two = CALL + "\n" + CALL.replace("Bonn", "Köln")
    episode, policy = await stage.one(agent, in_turn(CALL, "Let me see.\n" + two, "It rains."))
    assert asked == [("function", "weather", {"city": city}) for city in ("Bonn", "Bonn", "Köln")]
    assert (len(episode.rows), episode.turns, episode.status) == (1, 3, "ok")
    policy.check(episode)


async def test_arguments_that_are_not_json_reach_the_agent_as_they_were_written(stage: Stage) -> None:
    wrong = '<tool_call>\n{"name": "weather", "arguments": {"city": Bonn}}\n</tool_call>'
    seen: list[str] = []

    def agent(at: OpenAIEndpoint) -> None:
        client, messages = sync_client(at), list(QUESTION)
        message = client.chat.completions.create(model="any", messages=messages, tools=[WEATHER]).choices[0].message
        [call] = message.tool_calls
        seen.append(call.function.arguments)
        answer = {"role": "tool", "tool_call_id": call.id, "content": "not JSON"}
        client.chat.completions.create(model="any", messages=[*messages, message, answer], tools=[WEATHER])

    episode, policy = await stage.one(agent, in_turn(wrong, "Sorry."))
    assert "Bonn" in seen[0]
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(seen[0])
    assert (episode.status, len(episode.rows)) == ("ok", 1)
    policy.check(episode)


async def test_a_stream_carries_the_same_turn_and_continues_the_same_row(stage: Stage) -> None:
    seen: list[Any] = []

    async def agent(at: OpenAIEndpoint) -> None:
        client, messages = async_client(at), list(QUESTION)
        options = {"include_usage": True}
        stream = await client.chat.completions.create(
            model="any", messages=messages, tools=[WEATHER], stream=True, stream_options=options
        )
        chunks = [chunk async for chunk in stream]
        deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
        [call] = [call for delta in deltas for call in delta.tool_calls or ()]
        seen.append([deltas[0].role, "".join(delta.content or "" for delta in deltas), call.function.name])
        seen.append([chunk.choices[0].finish_reason for chunk in chunks[:-1]])
        seen.append((chunks[-1].choices, chunks[-1].usage.completion_tokens))
        function = {"name": call.function.name, "arguments": call.function.arguments}
        said = {
            "role": "assistant",
            "content": "Well.",
            "tool_calls": [{"id": call.id, "type": "function", "function": function}],
        }
        answer = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        async with client.chat.completions.stream(
            model="any", messages=[*messages, said, answer], tools=[WEATHER]
        ) as stream:
            seen.append((await stream.get_final_completion()).choices[0].message.content)

    episode, policy = await stage.one(agent, in_turn("Well.\n" + CALL, "It rains."))
    role_text_name, reasons, last, final = seen
    assert role_text_name == ["assistant", "Well.", "weather"]
    assert reasons == [None, None, None, "tool_calls"]
    assert last == ([], len(policy.sampled[0].ids))
    assert final == "It rains."
    assert len(episode.rows) == 1
    policy.check(episode)


async def test_responses_with_function_calls_stay_on_one_row(stage: Stage) -> None:
    tool = {"type": "function", "strict": True, **WEATHER["function"]}
    texts: list[str] = []

    def agent(at: OpenAIEndpoint) -> None:
        client = sync_client(at)
        items: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "Rain?"}]}]
        how: dict[str, Any] = {"model": "any", "instructions": "Be brief.", "tools": [tool]}
        first = client.responses.create(input=items, **how)
        [call] = [item for item in first.output if item.type == "function_call"]
        assert json.loads(call.arguments) == {"city": "Bonn"}
        items += [*first.output, {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]
        second = client.responses.create(input=items, **how)
        third = client.responses.create(input="Really?", previous_response_id=second.id, **how)
        fourth = client.responses.create(input="Thanks", previous_response_id=third.id, **how)
        texts.extend([*(answer.output_text for answer in (first, second, third, fourth)), fourth.status])
        with pytest.raises(openai.NotFoundError, match="resp_0"):
            client.responses.create(input="Really?", previous_response_id="resp_0", **how)

    episode, policy = await stage.one(agent, in_turn("Hm.\n" + CALL, "Rain.", "Yes.", "Bye."))
    assert texts == ["Hm.", "Rain.", "Yes.", "Bye.", "completed"]
    assert (len(episode.rows), episode.turns) == (1, 4)
    policy.check(episode)


async def test_responses_are_streamed_and_say_when_they_were_cut(stage: Stage) -> None:
    finals: list[Any] = []

    async def agent(at: OpenAIEndpoint) -> None:
        client = async_client(at)
        tool = {"type": "function", **WEATHER["function"]}
        async with client.responses.stream(model="any", input="Rain?", tools=[tool]) as stream:
            finals.append(await stream.get_final_response())
        cut = await client.responses.create(model="any", input="Go on", max_output_tokens=4)
        finals.append(cut)

    episode, policy = await stage.one(agent, in_turn("Hm.\n" + CALL, "a long story"))
    assert finals[0].output_text == "Hm."
    assert [(item.type, getattr(item, "arguments", None)) for item in finals[0].output] == [
        ("message", None),
        ("function_call", '{"city": "Bonn"}'),
    ]
    assert (finals[1].status, finals[1].incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert finals[1].output_text == "a lo"
    assert finals[1].usage.output_tokens == 4
    policy.check(episode)


async def test_text_completions_that_go_on_with_what_was_sampled_are_one_row(stage: Stage) -> None:
    def agent(at: OpenAIEndpoint) -> None:
        client, text = sync_client(at), "Question: 2+2\nThought:"
        for observation in ("\nObservation: 4\nThought:", "\nObservation: 5\nThought:", ""):
            choice = client.completions.create(model="any", prompt=text, stop=["\nObservation:"]).choices[0]
            text += choice.text + observation
        assert choice.finish_reason == "stop"

    replies = " add\nObservation: 7", " again\nObservation: 8", " done"
    episode, policy = await stage.one(agent, in_turn(*replies))
    assert len(episode.rows) == 1
    policy.check(episode)


async def test_text_that_was_sampled_is_not_tokenised_again(endpoint: Endpoint) -> None:
    tokenizer = make_tiny_tokenizer()
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    [first, second] = (spec["model"]["vocab"][letter] for letter in "th")
    merged = len(tokenizer)
    spec["model"]["vocab"]["th"], spec["model"]["merges"] = merged, [["t", "h"]]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(spec))
    assert tokenizer.encode("th") == [merged]
    end = tokenizer.eos_token_id

    async def agent(at: OpenAIEndpoint) -> None:
        client = async_client(at)
        answer = await client.completions.create(model="any", prompt="Say:")
        assert answer.choices[0].text == "th"
        await client.completions.create(model="any", prompt="Say:th<|im_end|>\nth")
        await client.completions.create(model="any", prompt="Say:th th")

    replies = [[first, second, end], [merged, end], [merged, end]]
    episode, policy = await Stage(Chat(tokenizer), endpoint).one(agent, lambda before: replies.pop(0))
    assert [ids[4:].tolist() for ids in policy.before] == [
        [],
        [first, second, end, *tokenizer.encode("\n"), merged],
        [first, second, *tokenizer.encode(" "), merged],
    ]
    assert len(episode.rows) == 2
    policy.check(episode)


async def test_text_completions_take_token_ids_and_are_streamed(stage: Stage, chat: Chat) -> None:
    got: list[Any] = []

    async def agent(at: OpenAIEndpoint) -> None:
        client = async_client(at)
        ids = chat.tokenizer.encode("One, two")
        stream = await client.completions.create(model="any", prompt=ids, stream=True)
        got.append("".join([chunk.choices[0].text async for chunk in stream]))
        answer = await client.completions.create(model="any", prompt="<|im_start|>user\nHi<|im_end|>", logprobs=1)
        got.append(answer.choices[0].logprobs.token_logprobs)

    episode, policy = await stage.one(agent, in_turn(", three", "Hello"))
    assert got == [", three", [float(x) for x in policy.sampled[1].logprobs]]
    assert policy.before[0].tolist() == chat.tokenizer.encode("One, two")
    assert chat.tokenizer.convert_tokens_to_ids("<|im_start|>") == policy.before[1][0]
    policy.check(episode)


async def test_sub_agents_side_by_side_have_a_row_each(stage: Stage) -> None:
    met = asyncio.Barrier(2)

    async def say(before: str) -> str:
        async with asyncio.timeout(60):
            await met.wait()  # both are sampled at the same time, at every turn
        return "from A" if "You are A" in before else "from B"

    async def converse(client: AsyncOpenAI, name: str) -> None:
        messages: list[Any] = [{"role": "system", "content": f"You are {name}"}, *QUESTION]
        for _ in range(3):
            message = (await client.chat.completions.create(model="any", messages=messages)).choices[0].message
            assert message.content == f"from {name}"
            messages += [message, {"role": "user", "content": "Go on"}]

    async def agent(at: OpenAIEndpoint) -> None:
        client = async_client(at)
        await asyncio.gather(converse(client, "A"), converse(client, "B"))

    episode, policy = await stage.one(agent, say)
    assert (episode.status, [row.num_sampled for row in episode.rows]) == ("ok", [3 * len(b"from A") + 3] * 2)
    policy.check(episode)


async def test_the_same_question_side_by_side_is_sampled_in_rows_of_its_own(stage: Stage) -> None:
    met = asyncio.Barrier(3)

    async def say(before: str) -> str:
        async with asyncio.timeout(60):
            return str(await met.wait())

    async def agent(at: OpenAIEndpoint) -> None:
        assert sorted(await asyncio.gather(ask(at), ask(at), ask(at))) == ["0", "1", "2"]

    episode, policy = await stage.one(agent, say)
    assert (episode.error, len(episode.rows)) == ("", 3)
    policy.check(episode)


async def test_episodes_of_a_group_are_told_apart_by_their_keys(stage: Stage) -> None:
    async def function(ctx: Rollout) -> float:
        asked = [{"role": "user", "content": f"I am {ctx.index}"}]
        completion = await async_client(ctx.openai).chat.completions.create(model="any", messages=asked)
        return float(completion.choices[0].message.content == f"You are {ctx.index}")

    def say(before: str) -> str:
        return f"You are {before.split('I am ')[1][0]}"

    episodes, policy = await stage.group(function, say, n=4)
    assert [episode.reward for episode in episodes] == [1.0] * 4
    assert [stage.chat.decode(episode.rows[0].ids) for episode in episodes] == [f"You are {i}" for i in range(4)]
    policy.check(*episodes)


async def test_the_example_agent_checks_its_sums_and_is_trained_on_both_tries(endpoint: Endpoint) -> None:
    examples = Path(__file__).parents[2] / "examples"
    function = resolve("train.rollout", base_dir=examples / "openai_agent", key="trl.rollout_func")
    characters = resolve("characters.build_tokenizer", base_dir=examples / "quickstart", key="test")
    chat = Chat(characters())
    chat.check()
    policy = Policy(chat, in_turn("75", "85"))
    prompt = [{"role": "user", "content": "47+38="}]
    trl = load_config(examples / "openai_agent" / "openai_agent.yaml").trl
    request = GroupRequest("key", prompt, chat.start(prompt), 1, Sampling(trl.max_completion_length), {"answer": "85"})
    runner = EpisodeRunner(function, chat, EpisodesSection(timeout=120), max_model_len=128, endpoint=endpoint)
    [episode] = await runner.run(policy, request)
    assert (episode.status, episode.reward, len(episode.rows), episode.turns) == ("ok", 1.0, 1, 2), episode.error
    assert episode.rows[0].prompt_ids is None
    policy.check(episode)


# --- sampling


async def test_the_distribution_stays_that_of_the_run_whatever_the_agent_asks(stage: Stage) -> None:
    async def agent(at: OpenAIEndpoint) -> None:
        await async_client(at).chat.completions.create(
            model="any", messages=QUESTION, temperature=0, top_p=0.1, seed=1, max_completion_tokens=20, stop="X"
        )

    _, policy = await stage.one(agent, in_turn("4"))
    [sampling] = policy.samplings
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.stop) == (1.0, 1.0, 20, ("X",))
    assert sampling.seed != 1


async def test_log_probabilities_are_those_that_were_sampled(stage: Stage) -> None:
    got: list[Any] = []

    async def agent(at: OpenAIEndpoint) -> None:
        answer = await async_client(at).chat.completions.create(model="any", messages=QUESTION, logprobs=True)
        got.extend(answer.choices[0].logprobs.content)

    _, policy = await stage.one(agent, in_turn("four"))
    assert [item.token for item in got] == [*"four", "<|im_end|>"]
    assert [item.logprob for item in got] == [float(x) for x in policy.sampled[0].logprobs]


async def test_a_turn_that_a_stop_string_ended_is_continued(stage: Stage) -> None:
    async def agent(at: OpenAIEndpoint) -> None:
        client = async_client(at)
        first = await client.chat.completions.create(model="any", messages=QUESTION, stop=["END"])
        assert first.choices[0].message.content == "so far "
        messages = [*QUESTION, first.choices[0].message, {"role": "user", "content": "And?"}]
        await client.chat.completions.create(model="any", messages=messages)

    episode, policy = await stage.one(agent, in_turn("so far END and more", "so good"))
    assert len(episode.rows) == 1
    policy.check(episode)


async def test_a_tool_choice_of_none_hears_no_calls(stage: Stage) -> None:
    async def agent(at: OpenAIEndpoint) -> None:
        answer = await async_client(at).chat.completions.create(
            model="any", messages=QUESTION, tools=[WEATHER], tool_choice="none"
        )
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].finish_reason == "stop"

    episode, _ = await stage.one(agent, in_turn(CALL))
    assert episode.status == "ok", episode.error


# --- requests that are refused


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n": 2}, "n: 2"),
        ({"tools": [WEATHER], "tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"presence_penalty": 1.5}, "presence_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {}}]}]},
            "tool call",
        ),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(stage: Stage, change: dict[str, Any], says: str) -> None:
    async def agent(at: OpenAIEndpoint) -> None:
        with pytest.raises(openai.BadRequestError) as raised:
            await async_client(at).chat.completions.create(**{"model": "any", "messages": QUESTION, **change})
        assert says in raised.value.message
        assert raised.value.type == "invalid_request_error"
        await ask(at)

    episode, policy = await stage.one(agent, in_turn("4"))
    assert (episode.error, len(policy.sampled)) == ("", 1)


async def test_bad_bodies_and_paths_are_answered_in_openais_shape(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_api, "MAX_BODY_BYTES", 1000)
    answers: list[httpx.Response] = []

    async def agent(at: OpenAIEndpoint) -> None:
        headers = {"authorization": f"Bearer {at.api_key}"}
        async with httpx.AsyncClient(base_url=at.base_url, trust_env=False, headers=headers, timeout=60) as client:
            answers.append(await client.post("/chat/completions", content=b"{no json"))
            answers.append(await client.post("/chat/completions", content=b"[" * 900))
            answers.append(await client.post("/chat/completions", json=[1]))
            answers.append(await client.post("/chat/completions", content=b" " * 1001))
            answers.append(await client.get("/chat/completions"))
            answers.append(await client.post("/embeddings", json={}))

    await stage.one(agent, in_turn())
    assert [answer.status_code for answer in answers] == [400, 400, 400, 413, 405, 404]
    assert all(answer.json()["error"]["type"] == "invalid_request_error" for answer in answers)
    assert all(answer.headers["x-should-retry"] == "false" for answer in answers)


TOOL_CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
CHAT = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]},
        {"role": "tool", "content": "x", "tool_call_id": "1"},
    ],
    **{"tools": [WEATHER], "tool_choice": "auto", "stop": ["x"], "stream": True, "max_tokens": 3, "n": 1},
    **{"stream_options": {"include_usage": True}, "temperature": 1.0, "response_format": {"type": "text"}},
}
RESPONSES = {
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
    ],
    **{"tools": [{"type": "function", **WEATHER["function"]}], "text": {"format": {"type": "text"}}},
    **{"instructions": "x", "previous_response_id": "x", "max_output_tokens": 3},
}
TEXT = {"prompt": [1, 2], "stop": "x", "max_tokens": 3, "logprobs": 1}
JUNK = [None, True, 0, -1, 1.5, "", "junk", [], ["x"], [1], [[]], [{}], {}, {"type": "text"}, {"text": 1}]


def with_junk(value: Any) -> Iterator[Any]:
    """`value` with each of its parts in turn replaced by each kind of junk."""
    yield from JUNK
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        for other in with_junk(part):
            changed = value.copy()
            changed[key] = other
            yield changed


@pytest.mark.parametrize(
    ("read", "valid"), [(openai_api._chat, CHAT), (openai_api._responses, RESPONSES), (openai_api._text, TEXT)]
)
def test_every_body_is_read_or_refused(read: Callable[[Any], Any], valid: Any) -> None:
    read(valid)
    for body in with_junk(valid):
        with contextlib.suppress(Refused):
            read(body)


async def test_a_wrong_key_opens_nothing(stage: Stage) -> None:
    async def agent(at: OpenAIEndpoint) -> None:
        client = AsyncOpenAI(base_url=at.base_url, api_key="sk-wrong")
        for request in (
            client.models.list(),
            client.chat.completions.create(model="any", messages=QUESTION),
            client.responses.create(model="any", input="x"),
            client.completions.create(model="any", prompt="x"),
        ):
            with pytest.raises(openai.AuthenticationError) as raised:
                await request
            assert raised.value.code == "invalid_api_key"
        assert [model.id for model in (await async_client(at).models.list()).data] == ["tiny"]
        await ask(at)

    episode, policy = await stage.one(agent, in_turn("4"))
    assert (episode.error, len(policy.sampled)) == ("", 1)


async def test_each_episode_has_an_address_and_a_key_and_they_open_only_together(stage: Stage) -> None:
    seen: list[OpenAIEndpoint] = []
    both, over = asyncio.Event(), asyncio.Barrier(2)

    async def agent(at: OpenAIEndpoint) -> None:
        seen.append(at)
        if len(seen) == 2:
            both.set()
        await both.wait()
        other = next(e for e in seen if e != at)
        mixed = AsyncOpenAI(base_url=other.base_url, api_key=at.api_key)
        with pytest.raises(openai.AuthenticationError, match="no running episode at this address"):
            await mixed.chat.completions.create(model="any", messages=QUESTION)
        await ask(at)
        await over.wait()

    async def function(ctx: Rollout) -> float:
        at = ctx.openai
        await agent(at)
        assert ctx.openai == at, "the same when asked again"
        return 1.0

    episodes, policy = await stage.group(function, in_turn("4", "5"), n=2)
    assert [episode.error for episode in episodes] == ["", ""]
    assert len({at.base_url for at in seen}) == len({at.api_key for at in seen}) == 2
    assert len(policy.sampled) == 2


# --- ends


async def test_after_the_end_of_its_episode_a_key_is_worth_nothing(stage: Stage) -> None:
    keys: list[OpenAIEndpoint] = []

    async def agent(at: OpenAIEndpoint) -> None:
        keys.append(at)
        await ask(at)

    episode, policy = await stage.one(agent, in_turn("4"))
    with pytest.raises(openai.AuthenticationError, match="the episode has ended"):
        await async_client(keys[0]).chat.completions.create(model="any", messages=QUESTION)
    assert len(policy.sampled) == 1
    policy.check(episode)


async def test_a_request_that_is_read_at_the_end_of_its_episode_changes_nothing_of_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, ended, real = asyncio.Event(), asyncio.Event(), openai_api._body
    left: list[asyncio.Task[Any]] = []
    episodes: list[Rollout] = []

    async def slow(request: Any) -> Any:
        reading.set()
        await ended.wait()
        return await real(request)

    async def function(ctx: Rollout) -> float:
        episodes.append(ctx)
        await ask(ctx.openai)
        monkeypatch.setattr(openai_api, "_body", slow)
        other = [{"role": "user", "content": "another"}]
        client = async_client(ctx.openai)
        left.append(asyncio.create_task(client.chat.completions.create(model="any", messages=other)))
        await reading.wait()
        return 1.0

    await stage.group(function, in_turn("4"))
    ended.set()
    with pytest.raises(openai.AuthenticationError, match="the episode has ended"):
        await left[0]
    assert len(episodes[0]._state.lines) == 1


async def test_a_request_that_runs_at_the_end_of_its_episode_is_cancelled_and_answered(stage: Stage) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()
    left: list[asyncio.Task[Any]] = []

    async def say(before: str) -> str:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return "too late"

    async def agent(at: OpenAIEndpoint) -> None:
        client = async_client(at).with_options(max_retries=0)
        left.append(asyncio.create_task(client.chat.completions.create(model="any", messages=QUESTION)))
        await begun.wait()

    episode, policy = await stage.one(agent, say)
    async with asyncio.timeout(60):
        with pytest.raises(openai.AuthenticationError):
            await left[0]
        await ended.wait()
    assert (episode.num_sampled, policy.sampled) == (0, [])


async def test_a_used_up_budget_is_told_as_openai_does_and_truncates_the_episode(stage: Stage) -> None:
    codes: list[Any] = []

    def agent(at: OpenAIEndpoint) -> None:
        client, messages = sync_client(at), list(QUESTION)
        with contextlib.suppress(openai.BadRequestError):
            for _ in range(20):
                try:
                    message = client.chat.completions.create(model="any", messages=messages).choices[0].message
                except openai.BadRequestError as error:
                    codes.append(error.code)
                    raise
                messages += [message, {"role": "user", "content": "more"}]

    episode, policy = await stage.one(agent, lambda before: "12345", max_tokens=100)
    assert codes == ["context_length_exceeded"]
    assert (episode.status, len(episode.rows)) == ("truncated", 1)
    assert 50 < len(episode.rows[0].ids) <= 100
    policy.check(episode)


async def test_an_agent_that_does_not_catch_a_used_up_budget_is_truncated_too(stage: Stage) -> None:
    def agent(at: OpenAIEndpoint) -> None:
        client, messages = sync_client(at), list(QUESTION)
        while True:
            message = client.chat.completions.create(model="any", messages=messages).choices[0].message
            messages += [message, {"role": "user", "content": "more"}]

    episode, policy = await stage.one(agent, lambda before: "12345", max_tokens=100)
    assert episode.status == "truncated"
    policy.check(episode)


async def test_a_dead_worker_is_never_the_work_of_an_agent_that_swallows_errors(stage: Stage) -> None:
    statuses: list[int] = []

    async def say(before: str) -> str:
        raise ServiceUnavailable("worker 0 is down")

    def agent(at: OpenAIEndpoint) -> None:
        try:
            sync_client(at).chat.completions.create(model="any", messages=QUESTION)
        except openai.APIStatusError as error:
            statuses.append(error.status_code)

    with pytest.raises(ServiceUnavailable, match="worker 0 is down"):
        await stage.one(agent, say)
    assert statuses == [503]


async def test_a_defect_of_the_sampling_is_never_the_work_of_an_agent(stage: Stage) -> None:
    async def agent(at: OpenAIEndpoint) -> None:
        with pytest.raises(openai.InternalServerError, match="KeyError"):
            await async_client(at).chat.completions.create(model="any", messages=QUESTION)

    async def say(before: str) -> str:
        raise KeyError("a bug")

    episode, _ = await stage.one(agent, say)
    assert episode.status == "aborted"
    assert "KeyError: 'a bug'" in episode.error


async def test_an_agent_that_hangs_up_cancels_its_sampling_and_may_ask_again(stage: Stage) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def say(before: str) -> str:
        if begun.is_set():
            return "4"
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()
        return "too late"

    async def agent(at: OpenAIEndpoint) -> None:
        client = async_client(at).with_options(max_retries=0)
        asking = asyncio.create_task(client.chat.completions.create(model="any", messages=QUESTION))
        await begun.wait()
        asking.cancel()
        async with asyncio.timeout(60):
            await cancelled.wait()
        await client.chat.completions.create(model="any", messages=QUESTION)

    episode, policy = await stage.one(agent, say)
    assert (episode.error, len(episode.rows), len(policy.sampled)) == ("", 1, 1)
    policy.check(episode)


async def test_a_stream_keeps_its_client_awake_and_ends_with_it(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_api, "KEEP_ALIVE_S", 0.02)
    cancelled = asyncio.Event()
    lines: list[str] = []

    async def say(before: str) -> str:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()
        return "too late"

    async def agent(at: OpenAIEndpoint) -> None:
        body = {"model": "any", "messages": QUESTION, "stream": True}
        headers = {"authorization": f"Bearer {at.api_key}"}
        async with (
            httpx.AsyncClient(base_url=at.base_url, trust_env=False, timeout=60) as client,
            client.stream("POST", "/chat/completions", json=body, headers=headers) as answer,
        ):
            async for line in answer.aiter_lines():
                lines.append(line)
                if len(lines) > 4:
                    break
        async with asyncio.timeout(60):
            await cancelled.wait()
        lines.append("and ended")

    episode, policy = await stage.one(agent, say)
    assert (episode.num_sampled, policy.sampled) == (0, [])
    assert {line for line in lines if line} == {": the reply is being sampled", "and ended"}


async def test_an_error_after_a_stream_began_reaches_the_agent(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_api, "KEEP_ALIVE_S", 0.02)
    streaming, told = asyncio.Event(), []

    async def say(before: str) -> str:
        await streaming.wait()
        raise ServiceUnavailable("worker 0 is down")

    async def agent(at: OpenAIEndpoint) -> None:
        stream = await async_client(at).chat.completions.create(model="any", messages=QUESTION, stream=True)
        streaming.set()
        try:
            async for _ in stream:
                pass
        except openai.APIError as error:
            told.append(str(error))

    with pytest.raises(ServiceUnavailable):
        await stage.one(agent, say)
    assert told == ["ServiceUnavailable: worker 0 is down"]


async def test_a_request_ends_with_the_deadline_of_its_episode(stage: Stage) -> None:
    async def say(before: str) -> str:
        await asyncio.sleep(60)
        return "too late"

    async def function(ctx: Rollout) -> None:
        ctx.deadline = time.monotonic() + 0.2
        with pytest.raises(openai.InternalServerError) as raised:
            await ask(ctx.openai)
        assert (raised.value.status_code, raised.value.code) == (504, "timeout")

    [episode], _ = await stage.group(function, say)
    assert "never generated" in episode.error


async def test_an_agent_without_an_end_is_cut_at_the_deadline_of_its_episode(stage: Stage) -> None:
    begun, statuses = threading.Event(), []

    async def say(before: str) -> str:
        await asyncio.sleep(600)
        return "too late"

    def agent(at: OpenAIEndpoint) -> None:
        begun.set()
        try:
            sync_client(at).chat.completions.create(model="any", messages=QUESTION)
        except openai.APIStatusError as error:
            statuses.append(error.status_code)

    for seconds in (0.5, 5.0, 50.0):  # more, where a busy machine does not begin the agent's thread in time
        async with asyncio.timeout(300):
            episode, _ = await stage.one(agent, say, seconds=seconds)
        assert episode.status == "timeout"
        if begun.is_set():
            break
    async with asyncio.timeout(60):
        while not statuses:  # noqa: ASYNC110, the agent's thread ends by itself
            await asyncio.sleep(0.02)
    assert statuses[0] in (401, 504)


async def test_environment_variables_are_enough_for_an_agent_of_its_own_process(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def agent(at: OpenAIEndpoint) -> None:
        for name, value in at.env.items():
            monkeypatch.setenv(name, value)
        assert OpenAI().chat.completions.create(model="any", messages=QUESTION).choices[0].message.content == "4"

    episode, _ = await stage.one(agent, in_turn("4"))
    assert episode.error == ""


async def test_no_proxy_stands_between_an_agent_and_its_endpoint(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "example.org")
    endpoint = Endpoint("tiny")
    await endpoint.start()

    async def agent(at: OpenAIEndpoint) -> None:
        await async_client(at).chat.completions.create(model="any", messages=QUESTION)

    try:
        episode, _ = await Stage(chat, endpoint).one(agent, in_turn("4"))
    finally:
        await endpoint.close()
    assert episode.error == ""
