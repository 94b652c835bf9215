import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from env_parts import ENDS, USER, FakeEnvironments, Policy, chat_of, group, runner_of
from hypothesis import given, settings
from hypothesis import strategies as st

from rlx.envs.errors import EpisodeTruncated
from rlx.envs.rollout import Rollout
from rlx.envs.state import EpisodeState
from rlx.episode import Episode
from rlx.wire import GroupRequest

FAMILIES = [
    ("qwen3", "qwen3_training"),
    ("qwen3", "qwen2_5_training"),
    ("llama3", "llama3_training"),
    ("phi3", "phi3_training"),
    ("gemma", "gemma_training"),
    ("qwen3", None),
]
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'


def _rollout(
    policy: Policy, request: GroupRequest | None = None, *, max_model_len: int = 4096, **parts: Any
) -> Rollout:
    state = EpisodeState(
        policy, request or group(chat=policy.chat), 0, 0, deadline=1e12, max_model_len=max_model_len, **parts
    )
    return Rollout(state, policy.chat)


def _rows(ctx: Rollout) -> list[np.ndarray]:
    return [line.tape.ids() for line in ctx._state.lines]


async def _episode(function: Callable[[Rollout], Awaitable[Any]], policy: Policy, request: GroupRequest | None = None) -> Episode:  # fmt: skip
    [episode] = await runner_of(function, chat=policy.chat).run(policy, request or group(chat=policy.chat))
    return episode


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


# --- trained tokens are the sampled tokens

_MARKERS = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end|>", "<start_of_turn>", "<tool_call>"]  # fmt: skip
_texts = st.lists(st.one_of(st.sampled_from(_MARKERS), st.text(max_size=6)), max_size=4).map("".join)
_turns = st.tuples(st.just("turn"), st.integers(1, 30))
_moves = st.one_of(
    _turns,
    st.tuples(st.just("observe"), _texts),
    st.tuples(st.just("fork"), st.none()),
    st.tuples(st.just("start"), _texts),
    st.tuples(st.just("generate"), st.lists(st.integers(0, 255), max_size=4)),
    st.tuples(st.just("generate new"), st.lists(st.integers(0, 255), min_size=1, max_size=4)),
    st.tuples(st.just("reply"), _texts),
    st.tuples(st.just("reply rewritten"), _texts),
)


async def _play(ctx: Rollout, moves: list[tuple[str, Any]]) -> None:
    """Whatever of `moves` the state of the row allows."""
    for move, what in moves:
        try:
            if move == "turn":
                await ctx.turn(max_tokens=what)
            elif move == "observe":
                ctx.observe(_user(what))
            elif move == "fork":
                ctx = ctx.fork()
            elif move == "start":
                ctx.start([_user(what)])
            elif move == "generate" and ctx._line:
                await ctx.generate([*ctx._line.tape.ids().tolist(), *what], max_tokens=9)
            elif move == "generate new":
                await ctx.generate(what, max_tokens=9)
            elif move == "reply":
                await ctx.reply([*ctx.messages, _user(what)], max_tokens=9)
            elif move == "reply rewritten":
                await ctx.reply([_user("summary"), *ctx.messages[3:], _user(what)], max_tokens=9)
        except (RuntimeError, ValueError):  # ConfigError and UserCodeError are these, and what the state forbids
            continue
    await ctx.fork().turn()


@pytest.mark.parametrize(("family", "template"), FAMILIES)
@settings(max_examples=60, deadline=None)
@given(moves=st.lists(_moves, max_size=10), data=st.data())
def test_trained_tokens_are_the_sampled_tokens(family: str, template: str | None, moves: list, data: st.DataObject):
    chat = chat_of(family, template)
    size = len(chat.tokenizer)
    end = chat.tokenizer.convert_tokens_to_ids(ENDS.get(family, chat.tokenizer.eos_token))
    seeds = np.random.default_rng(data.draw(st.integers(0, 2**32)))

    def says(number: int, prompt_ids: np.ndarray, sampling: Any) -> list[int]:
        ids = seeds.integers(0, size, seeds.integers(0, 12)).tolist()
        return [*ids, end] if seeds.random() < 0.7 else ids

    policy = Policy(chat, says)
    request = group([USER] if template else "hi", chat=chat, max_tokens=200)

    async def function(ctx: Rollout) -> None:
        await _play(ctx, moves)

    episode = asyncio.run(_episode(function, policy, request))
    if episode.status == "aborted":
        assert "never generated" in episode.error
        assert not any(len(r.completion.ids) for r in policy.requests if r.completion)
        return

    sampled = [r for r in policy.requests if r.completion is not None and len(r.completion.ids)]
    trained = np.concatenate([row.logprobs[row.mask] for row in episode.rows])
    assert sorted(trained) == sorted(np.concatenate([r.completion.logprobs for r in sampled]))
    for row in episode.rows:
        assert len(row.ids) == len(row.logprobs) == len(row.mask) <= 200
        assert np.isnan(row.logprobs[~row.mask]).all()
        assert row.mask[-1]
    for asked in sampled:
        said = asked.completion
        [(row, where)] = [
            (row, int(np.flatnonzero(row.logprobs == said.logprobs[0])[0]))
            for row in episode.rows
            if said.logprobs[0] in row.logprobs
        ]
        prompt = request.prompt_ids if row.prompt_ids is None else row.prompt_ids
        there = slice(where, where + len(said.ids))
        assert np.array_equal(row.ids[there], said.ids)
        assert np.array_equal(row.logprobs[there], said.logprobs)
        assert row.mask[there].all()
        assert np.array_equal(np.concatenate([prompt, row.ids[:where]]), asked.prompt_ids)
        versions = np.repeat([v for v, _ in row.versions], [n for _, n in row.versions])
        assert versions[there].tolist() == [v for v, n in said.versions for _ in range(n)]


_CANONICAL = {
    "qwen3_training": lambda text: f"<think>\n{text}\n</think>\n\n{text}<|im_end|>",
    "qwen2_5_training": lambda text: f"{text}<|im_end|>",
    "llama3_training": lambda text: f"{text}<|eot_id|>",
    "phi3_training": lambda text: f"{text}<|end|>",
    "gemma_training": lambda text: f"{text}<end_of_turn>",
}
_plain = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=8).filter(
    lambda text: "<" not in text
)


@pytest.mark.parametrize(("family", "template"), [f for f in FAMILIES if f[1]])
@settings(max_examples=40, deadline=None)
@given(turns=st.lists(st.tuples(_plain, _texts), min_size=1, max_size=4))
def test_the_tape_reads_like_the_rendering_of_the_conversation(family: str, template: str, turns: list):
    chat = chat_of(family, template)
    policy = Policy(chat, [_CANONICAL[template](said) for said, _ in turns])

    async def converse() -> tuple[str, list]:
        ctx = _rollout(policy, group(chat=chat, max_tokens=4000))
        for number, (_, heard) in enumerate(turns):
            await ctx.turn()
            if number < len(turns) - 1:
                ctx.observe(_user(heard))
        return chat.tokenizer.decode(_rows(ctx)[0].tolist()), ctx.messages

    text, messages = asyncio.run(converse())
    rendered = chat.tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered.removesuffix(chat.tokenizer.eos_token if family == "phi3" else "").rstrip("\n") == text


async def test_a_conversation_with_tools_reads_like_its_rendering():
    chat = chat_of()
    said = [
        f"<think>\nhm\n</think>\n\n{CALL}",
        f"<think>\n4\n</think>\n\nmore\n{CALL}",
        "<think>\n5\n</think>\n\nfive<|im_end|>",
    ]
    ctx = _rollout(Policy(chat, said))
    ctx.start([USER], [TOOL])
    for _ in range(2):
        turn = await ctx.turn()
        ctx.observe({"role": "tool", "content": "4<|im_end|>", "tool_call_id": turn.tool_calls[0].id})
    await ctx.turn()
    assert [m["role"] for m in ctx.messages] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert [c["id"] for m in ctx.messages for c in m.get("tool_calls", ())] == ["call00000", "call00001"]
    rendered = chat.tokenizer.apply_chat_template(ctx.messages, tools=[TOOL], tokenize=False)
    assert chat.tokenizer.decode(_rows(ctx)[0].tolist()) == rendered.rstrip("\n")


# --- turns and observations


async def test_a_turn_tells_what_was_sampled():
    policy = Policy(chat_of(), ["four<|im_end|>"])
    ctx = _rollout(policy)
    turn = await ctx.turn()
    said = policy.requests[0].completion
    assert (turn.text, turn.finish_reason, turn.tool_calls) == ("four", "stop", ())
    assert turn.message == {"role": "assistant", "content": "four"}
    assert np.array_equal(turn.ids, said.ids)
    assert np.array_equal(turn.logprobs, said.logprobs)
    assert turn.versions == said.versions
    assert ctx.messages == [USER, turn.message]


async def test_the_first_turn_continues_the_prompt_ids_of_the_group_as_they_are():
    request = group(columns={"answer": "4"})
    odd = GroupRequest(**{**vars(request), "prompt_ids": np.asarray([5, 6, 7], np.int32)})
    policy = Policy(chat_of(), ["a<|im_end|>", "b<|im_end|>"])
    ctx = _rollout(policy, odd)
    await ctx.turn()
    await ctx.fork().reply([USER])
    assert [r.prompt_ids.tolist() for r in policy.requests] == [[5, 6, 7]] * 2
    assert ctx.task == {"prompt": [USER], "answer": "4"}
    assert [line.tape.row().prompt_ids for line in ctx._state.lines] == [None, None]


async def test_a_turn_cut_by_its_own_limit_goes_on_where_it_stopped():
    policy = Policy(chat_of(), ["abc", "d<|im_end|>"])
    ctx = _rollout(policy)
    assert (await ctx.turn(max_tokens=3)).finish_reason == "length"
    turn = await ctx.turn()
    assert policy.requests[1].prompt_ids[-3:].tolist() == policy.requests[0].completion.ids.tolist()
    assert turn.text == "d"
    assert ctx.messages == [USER, {"role": "assistant", "content": "abcd"}]


async def test_a_tool_call_cut_in_two_is_parsed_whole():
    half = len(CALL) // 2
    ctx = _rollout(Policy(chat_of(), [CALL[:half], CALL[half:]]))
    ctx.start([USER], [TOOL])
    assert (await ctx.turn()).tool_calls[0].arguments is None
    turn = await ctx.turn()
    assert [(c.name, c.arguments) for c in turn.tool_calls] == [("add", {"a": 1})]
    assert len(ctx.messages) == 2


async def test_a_second_turn_without_an_observation_is_refused():
    ctx = _rollout(Policy(chat_of(), ["a<|im_end|>"]))
    await ctx.turn()
    with pytest.raises(RuntimeError, match=r"ctx\.observe"):
        await ctx.turn()


async def test_a_row_that_is_being_sampled_is_not_sampled_twice():
    policy = Policy(chat_of(), ["a<|im_end|>"])
    policy.gate.clear()
    ctx = _rollout(policy)
    ctx.start()
    first = asyncio.create_task(ctx.turn())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match=r"ctx\.fork"):
        await ctx.turn()
    policy.gate.set()
    assert (await first).text == "a"


@pytest.mark.parametrize("plain", [True, False])
async def test_nothing_is_observed_while_a_row_is_sampled(plain: bool):
    """It would stand before tokens that were not sampled after it."""
    policy = Policy(chat_of(), ["a", "b"])
    ctx = _rollout(policy, group("hi") if plain else None)
    await ctx.turn()
    policy.gate.clear()
    going_on = asyncio.create_task(ctx.turn())
    await policy.asked(2)
    with pytest.raises(RuntimeError, match="is being sampled"):
        ctx.observe(_user("x"))
    policy.gate.set()
    await going_on
    [line] = ctx._state.lines
    assert line.tape.ids().tolist() == [*policy.requests[1].prompt_ids, *policy.requests[1].completion.ids]
    ctx.observe(_user("x"))


@pytest.mark.parametrize(
    ("messages", "says"),
    [([], "at least one"), (["text"], "a message is a dict"), ([{"role": "assistant", "content": "x"}], r"ctx\.turn")],
)
async def test_what_cannot_be_observed_is_refused(messages: list, says: str):
    ctx = _rollout(Policy(chat_of(), ["a<|im_end|>"]))
    await ctx.turn()
    with pytest.raises((TypeError, ValueError), match=says):
        ctx.observe(*messages)


async def test_an_observation_before_the_policy_spoke_is_refused():
    ctx = _rollout(Policy(chat_of()))
    with pytest.raises(RuntimeError, match=r"ctx\.start"):
        ctx.observe(_user("x"))
    ctx.start()
    with pytest.raises(RuntimeError, match="has not spoken"):
        ctx.observe(_user("x"))


@pytest.mark.parametrize("template", ["qwen3_training", None])
async def test_a_text_prompt_is_continued_by_text(template: str | None):
    chat = chat_of("qwen3", template)
    policy = Policy(chat, ["4,", " 5"])
    ctx = _rollout(policy, group("1+3=", chat=chat))
    await ctx.turn()
    ctx.observe(_user("<|im_end|> 2+3="))
    await ctx.turn()
    assert chat.tokenizer.decode(_rows(ctx)[0].tolist()) == "1+3=4,<|im_end|> 2+3= 5"
    assert chat.tokenizer.eos_token_id not in _rows(ctx)[0]
    assert ctx.messages == []


async def test_sampling_of_one_turn_is_changed_by_name():
    policy = Policy(chat_of(), ["abcdef", "g<|im_end|>"])
    ctx = _rollout(policy, group(max_tokens=100))
    await ctx.turn(max_tokens=3, temperature=0.5, stop="x")
    await ctx.turn()
    first, second = (r.sampling for r in policy.requests)
    assert (first.max_tokens, first.temperature, first.stop) == (3, 0.5, ("x",))
    assert (second.max_tokens, second.temperature, second.stop) == (97, 1.0, ())
    with pytest.raises(TypeError, match=r"no sampling field 'temprature'. There are: extra, max_tokens, .*temperature"):
        await ctx.fork().turn(temprature=1)
    with pytest.raises(ValueError, match="temperature=0 samples nothing to learn from"):
        await ctx.fork().turn(temperature=0)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        await ctx.fork().turn(max_tokens=0)


# --- budgets


async def test_a_row_has_one_budget_for_all_that_follows_its_prompt():
    policy = Policy(chat_of(), ["aaaa<|im_end|>", "b" * 1000, "c" * 1000])
    ctx = _rollout(policy, group(max_tokens=60))
    await ctx.turn()
    ctx.observe(_user("x"))
    used = len(_rows(ctx)[0]) - len(policy.requests[0].prompt_ids)
    assert used > 5
    turn = await ctx.turn()
    assert policy.requests[1].sampling.max_tokens == 60 - used == len(turn.ids)
    with pytest.raises(EpisodeTruncated, match=r"trl\.max_completion_length is 60"):
        await ctx.turn()
    assert (await ctx.fork().turn()).finish_reason == "length"
    assert policy.requests[2].sampling.max_tokens == 60


async def test_prompt_and_tokens_fit_the_model():
    policy = Policy(chat_of(), ["b" * 1000])
    request = group()
    long = _rollout(policy, request, max_model_len=60)
    long.start([_user("x" * 100)])
    room = len(request.prompt_ids) + 7
    await _rollout(policy, request, max_model_len=room).turn()
    assert policy.requests[0].sampling.max_tokens == 7
    with pytest.raises(EpisodeTruncated, match=r"vllm\.max_model_len 60"):
        await long.turn()


# --- generate, reply, fork


async def test_ids_that_extend_a_row_continue_it_and_others_open_one():
    policy = Policy(chat_of(), lambda number, prompt, sampling: [40 + number])
    ctx = _rollout(policy, group("hi"))
    await ctx.generate([1, 2])
    await ctx.generate([1, 2, 40, 9])
    await ctx.generate([1, 2, 77])
    await ctx.generate([1, 2, 40, 9, 41])
    assert [row.tolist() for row in _rows(ctx)] == [[1, 2, 40, 9, 41, 43], [1, 2, 77, 42]]
    rows = [line.tape.row() for line in ctx._state.lines]
    assert [row.mask.tolist() for row in rows] == [[True, False, True, True], [True]]
    for wrong in ([], [[1]], [1.5], [-1], ["a"]):
        with pytest.raises(ValueError, match="one row of token ids"):
            await ctx.generate(wrong)


async def test_ids_of_the_prompt_of_the_group_are_its_prompt():
    request = group("hi")
    ctx = _rollout(Policy(chat_of(), ["x"]), request)
    await ctx.generate(request.prompt_ids.tolist())
    assert ctx._state.lines[0].tape.row().prompt_ids is None


async def test_a_conversation_sent_whole_each_time_stays_one_row():
    policy = Policy(chat_of(), [CALL, "\n\nfour <|im_end|>", "bye<|im_end|>"])
    ctx = _rollout(policy)
    sent: list[dict[str, Any]] = [USER]
    turn = await ctx.reply(sent, [TOOL])
    call = turn.tool_calls[0]
    function = {"name": call.name, "arguments": json.dumps(call.arguments)}
    sent += [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": call.id, "type": "function", "function": function}],
        },
        {"role": "tool", "content": "4", "tool_call_id": call.id},
    ]
    turn = await ctx.reply(sent, [TOOL])
    sent += [{"role": "assistant", "content": [{"type": "text", "text": "four"}]}, _user("thanks")]
    await ctx.reply(sent, [TOOL])
    assert len(ctx._state.lines) == 1
    assert [len(r.completion.ids) for r in policy.requests] == [
        n for v, n in _runs(ctx._state.lines[0].tape.row().mask) if v
    ]


def _runs(mask: np.ndarray) -> list[tuple[bool, int]]:
    edges = np.flatnonzero(np.diff(mask)) + 1
    return [(bool(part[0]), len(part)) for part in np.split(mask, edges)]


@pytest.mark.parametrize(
    "second",
    [
        [USER, {"role": "assistant", "content": "five"}, _user("more")],
        [_user("other"), {"role": "assistant", "content": "four"}, _user("more")],
        [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "four"}, _user("more")],
        [USER, {"role": "assistant", "content": "four"}, {"role": "assistant", "content": "x"}, _user("more")],
        [USER],
    ],
)
async def test_a_conversation_that_was_rewritten_is_a_row_of_its_own(second: list):
    policy = Policy(chat_of(), ["four<|im_end|>", "x<|im_end|>"])
    ctx = _rollout(policy)
    await ctx.reply([USER])
    await ctx.reply(second)
    assert len(ctx._state.lines) == 2
    expected = ctx.chat.tokenizer.apply_chat_template(second, add_generation_prompt=True, return_dict=False)
    assert policy.requests[1].prompt_ids.tolist() == expected


async def test_conversations_of_two_agents_in_turns_are_two_rows():
    policy = Policy(chat_of(), ["a<|im_end|>", "b<|im_end|>", "c<|im_end|>", "d<|im_end|>"])
    ctx = _rollout(policy)
    one, other = [_user("one")], [_user("other")]
    for _ in range(2):
        for sent in (one, other):
            sent += [(await ctx.reply(sent)).message, _user("go on")]
    assert [line.tape.num_sampled for line in ctx._state.lines] == [4, 4]


async def test_the_same_conversation_asked_for_side_by_side_is_two_rows():
    policy = Policy(chat_of(), ["a<|im_end|>", "b<|im_end|>"])
    policy.gate.clear()
    ctx = _rollout(policy)
    calls = [asyncio.create_task(ctx.reply([USER])) for _ in range(2)]
    await policy.asked(2)
    policy.gate.set()
    assert [turn.text for turn in await asyncio.gather(*calls)] == ["a", "b"]
    assert [line.tape.num_sampled for line in ctx._state.lines] == [2, 2]


async def test_other_tools_are_another_row():
    policy = Policy(chat_of(), ["a<|im_end|>", "b<|im_end|>"])
    ctx = _rollout(policy)
    first = await ctx.reply([USER], [TOOL])
    await ctx.reply([USER, first.message, _user("x")])
    assert len(ctx._state.lines) == 2


async def test_a_fork_is_a_row_with_the_same_rewards():
    policy = Policy(chat_of(), ["a<|im_end|>", "b<|im_end|>", "c<|im_end|>"])
    ctx = _rollout(policy)
    await ctx.turn()
    sub = ctx.fork()
    sub.start([_user("sub task")])
    await sub.turn()
    sub.reward(0.5)
    ctx.observe(_user("go on"))
    await ctx.turn()
    assert [line.tape.num_sampled for line in ctx._state.lines] == [4, 2]
    assert [r.value for r in ctx._state.rewards] == [0.5]
    assert (sub.seed, sub.task, sub.index) == (ctx.seed, ctx.task, ctx.index)


# --- beside the conversation


async def test_rewards_of_steps_are_recorded_for_the_turn_before():
    environments = FakeEnvironments()
    ctx = _rollout(Policy(chat_of(), ["a<|im_end|>", "b<|im_end|>"]), environments=environments)
    env = await ctx.env("maze", level=3)
    assert (env.name, env.observation, env.done, environments.sessions[0].seed) == ("maze", "hello", False, 7)
    await env.step({"go": "left"})
    await ctx.turn()
    await env.step({"go": "left"})
    ctx.observe(_user("x"))
    await ctx.turn()
    await env.step({"go": "left"})
    ctx.reward(2, name="own", turn=0)
    assert [(r.value, r.name, r.turn) for r in ctx._state.rewards] == [
        (0.5, "maze", None),
        (0.25, "maze", 1),
        (2.0, "own", 0),
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "x", None])
async def test_a_reward_that_is_no_number_is_refused_where_it_is_given(value: Any):
    ctx = _rollout(Policy(chat_of()))
    with pytest.raises((TypeError, ValueError)):
        ctx.reward(value)
    with pytest.raises((TypeError, ValueError)):
        ctx.metric("m", value)


async def test_what_is_not_there_says_so():
    ctx = _rollout(Policy(chat_of()))
    with pytest.raises(RuntimeError, match="envs:"):
        await ctx.env()
    with pytest.raises(RuntimeError, match="no endpoint"):
        _ = ctx.openai


async def test_tools_need_messages():
    ctx = _rollout(Policy(chat_of()), group("text"))
    with pytest.raises(ValueError, match="tools need messages"):
        ctx.start(tools=[TOOL])


async def test_every_request_has_a_seed_and_a_name_of_its_own():
    policy = Policy(chat_of(), lambda *_: "a<|im_end|>")

    async def function(ctx: Rollout) -> None:
        await ctx.turn()
        ctx.observe(_user("x"))
        await ctx.turn()
        await ctx.fork().turn()

    episodes = await runner_of(function).run(policy, group(n=3))
    assert [e.status for e in episodes] == ["ok"] * 3
    assert len({r.sampling.seed for r in policy.requests}) == 9
    assert len({r.request_id for r in policy.requests}) == 9
    again = Policy(chat_of(), lambda *_: "a<|im_end|>")
    await runner_of(function).run(again, group(n=3))
    assert {r.sampling.seed for r in again.requests} == {r.sampling.seed for r in policy.requests}
