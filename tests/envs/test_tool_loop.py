"""TRL's environments and tools: one object an episode, calls side by side, mistakes told to the model."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from env_parts import chat_of, tiny_tokenizer
from rollout_parts import Policy, config_of, episodes_of, trained

from rlx.config.sections import EpisodesSection
from rlx.dotted import resolve
from rlx.envs.chat import Chat
from rlx.envs.load import load_rollout
from rlx.envs.runner import EpisodeRunner
from rlx.envs.threads import stuck_threads
from rlx.episode import Episode
from rlx.errors import ConfigError, RlxError
from rlx.rewards.scoring import ScoreRequest, load_reward, score_group
from rlx.wire import GroupRequest, Sampling

QUESTION = [{"role": "system", "content": "Play."}, {"role": "user", "content": "Guess. "}]

COUNTER = '''
import asyncio, threading

made = []

class Counter:
    """An environment that counts."""

    def __init__(self):
        made.append(self)
        self.total, self.closed, self.done = 0, False, False

    def reset(self, start: int = 0, seed: int = -1):
        self.total, self.seed = start, seed
        return f"Begin at {start}."

    def add(self, amount: int) -> int:
        """Adds to the total.

        Args:
            amount: How much.
        """
        self.total += amount
        self.done = self.total >= 10
        return self.total

    async def look(self) -> dict:
        """Shows the total."""
        return {"total": self.total}

    def break_it(self) -> str:
        """Fails."""
        raise RuntimeError("it broke")

    def leave(self) -> str:
        """Ends the program."""
        raise SystemExit(3)

    def _hidden(self): ...

    def get_reward(self):
        return self.total / 10

    def close(self):
        self.closed = True
'''

TOOLS = '''
import asyncio, threading

together = threading.Barrier(2, timeout=60)
met = asyncio.Event()

def meet(name: str) -> str:
    """Waits for another call.

    Args:
        name: Who.
    """
    together.wait()
    return f"{name} met"

async def wait_for_it(name: str) -> str:
    """Waits for `signal`.

    Args:
        name: Who.
    """
    await met.wait()
    return name

async def signal() -> str:
    """Lets `wait_for_it` go on."""
    met.set()
    return "sent"
'''


def call(name: str, arguments: Any = None) -> str:
    given = arguments if isinstance(arguments, str) else json.dumps(arguments or {})
    return f'<tool_call>\n{{"name": "{name}", "arguments": {given}}}\n</tool_call>'


def written(folder: Path, source: str) -> Path:
    (folder / "mine.py").write_text(source)
    return folder


async def play(folder: Path, source: str, says: Any, *, trl: dict[str, Any] | None = None, **options: Any):
    """The episodes and the policy of the environment or tools in `source`."""
    config = config_of(written(folder, source), **(trl or {"environment_factory": "mine.Counter"}))
    policy = Policy(chat_of(), says)
    episodes = await episodes_of(config, chat_of(), policy, options.pop("prompt", QUESTION), **options)
    return episodes, policy


def tool_messages(episode: Episode) -> list[str]:
    assert isinstance(episode.completion, list)
    return [message["content"] for message in episode.completion if message["role"] == "tool"]


def made(folder: Path) -> list[Any]:
    return resolve("mine.made.copy", base_dir=folder, key="test")()


async def test_an_episode_with_an_environment(tmp_path):
    says = [call("add", {"amount": 2}), call("look"), "It is 5."]
    [episode], policy = await play(tmp_path, COUNTER, says, start=3)
    assert (episode.status, episode.error, episode.reward) == ("ok", "", 0.5)
    assert tool_messages(episode) == ["5", '{"total": 5}']
    assert [message["role"] for message in episode.completion] == [
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    assert episode.metrics == {"tools/call": 2, "tools/failure": 0}
    [row] = episode.rows
    assert trained(episode) == policy.sampled
    prompt = chat_of().tokenizer.decode(policy.prompts[0])
    assert "Guess. Begin at 3.<|im_end|>" in prompt
    assert '"name": "add"' in prompt
    assert "hidden" not in prompt
    assert '"name": "get_reward"' not in prompt
    shown = chat_of().tokenizer.decode(row.ids[~row.mask])
    assert "<tool_response>\n5\n</tool_response>" in shown
    instance = made(tmp_path)[-1]
    assert (instance.seed, instance.closed) == (0, True)


async def test_every_episode_has_an_environment_of_its_own(tmp_path):
    def says(prompt: str) -> str:
        return "end" if "<tool_response>" in prompt else call("add", {"amount": 1})

    episodes, _ = await play(tmp_path, COUNTER, says, n=4)
    assert [episode.reward for episode in episodes] == [0.1] * 4
    assert [(environment.total, environment.closed) for environment in made(tmp_path)] == [(1, True)] * 4


async def test_done_ends_the_episode(tmp_path):
    [episode], policy = await play(tmp_path, COUNTER, lambda _: call("add", {"amount": 5}))
    assert (episode.status, episode.reward) == ("ok", 1.0)
    assert len(policy.completions) == 2
    assert tool_messages(episode) == ["5", "10"]
    assert trained(episode) == policy.sampled


async def test_done_may_be_a_property(tmp_path):
    source = COUNTER.replace(", self.done = 0, False, False", " = 0, False").replace(
        "        self.done = self.total >= 10\n", ""
    )
    source += "\n    @property\n    def done(self) -> bool:\n        return self.total >= 10\n"
    _, policy = await play(tmp_path, source, lambda _: call("add", {"amount": 5}))
    assert len(policy.completions) == 2


async def test_done_may_be_a_method(tmp_path):
    source = COUNTER.replace(", self.done = 0, False, False", " = 0, False").replace(
        "        self.done = self.total >= 10\n", ""
    )
    source += "\n    async def done(self) -> bool:\n        return self.total >= 10\n"
    [episode], policy = await play(tmp_path, source, lambda _: call("add", {"amount": 5}))
    assert len(policy.completions) == 2
    assert '"name": "done"' not in chat_of().tokenizer.decode(policy.prompts[0])
    assert episode.reward == 1.0


async def test_calls_behind_the_end_are_not_made(tmp_path):
    three = "\n".join(call("add", {"amount": amount}) for amount in (4, 6, 90))
    [episode], policy = await play(tmp_path, COUNTER, [three])
    assert tool_messages(episode)[:2] == ["4", "10"]
    assert "not called: the environment is done" in tool_messages(episode)[2]
    assert (episode.reward, len(policy.completions)) == (1.0, 1)


async def test_reward_functions_get_what_is_json_of_the_environment(tmp_path):
    source = COUNTER.replace(
        "made.append(self)",
        "made.append(self); self._secret, self.lock, self.board, self.huge = 1, threading.Lock(), [[1]], 'x' * 30_000",
    )
    source += "\n    @property\n    def share(self):\n        return self.total / 10\n"
    source += "\n    @property\n    def broken(self):\n        raise RuntimeError\n"
    [episode], _ = await play(tmp_path, source, [call("add", {"amount": 4}), "four"])
    wanted = {"total": 4, "closed": False, "done": False, "seed": 0, "board": [[1]], "share": 0.4}
    assert episode.extra == {"environments": wanted}
    (tmp_path / "rewards.py").write_text(
        "def pays(environments, **kwargs):\n    return [e.total for e in environments]"
    )
    reward = load_reward("rewards.pays", tmp_path, "trl.reward_funcs[0]")
    request = GroupRequest("g", QUESTION, chat_of().start(QUESTION), 1, Sampling(512), {})
    assert score_group(reward, ScoreRequest.of(request, [episode])).tolist() == [4.0]
    [truncated], _ = await play(tmp_path, source, lambda _: call("add", {"amount": 1}), max_tokens=400)
    assert truncated.status == "truncated"
    assert truncated.extra["environments"]["total"] / 10 == truncated.reward > 0


@pytest.mark.parametrize(("limit", "turns"), [(1, 2), (3, 4)])
async def test_tool_calls_are_limited(tmp_path, limit, turns):
    trl = {"environment_factory": "mine.Counter", "max_tool_calling_iterations": limit}
    [episode], policy = await play(tmp_path, COUNTER, lambda _: call("look"), trl=trl)
    assert episode.status == "ok"
    assert len(policy.completions) == turns
    assert len(tool_messages(episode)) == episode.metrics["tools/call"] == limit


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (call("break_it"), "it broke"),
        (call("leave"), "raised SystemExit, which ends a program"),
        (call("add", {"amont": 2}), "missing a required argument: 'amount'"),
        (call("add", {"amount": "two"}), "unsupported operand type"),
        (call("reset"), "there is no tool 'reset'; there are: add, break_it, leave, look"),
        (call("unknown"), "there is no tool 'unknown'"),
    ],
)
async def test_what_goes_wrong_with_a_call_the_model_is_told(tmp_path, said, told):
    [episode], policy = await play(tmp_path, COUNTER, [said, "sorry"])
    assert (episode.status, episode.error, episode.reward) == ("ok", "", 0.0)
    [answer] = tool_messages(episode)
    assert told in json.loads(answer)["error"]
    assert episode.metrics == {"tools/call": 1, "tools/failure": 1}
    assert trained(episode) == policy.sampled


@pytest.mark.parametrize("arguments", ['{"amount": ', "5", '"two"', "{amount: 2}"])
async def test_arguments_that_are_not_a_json_object_are_no_exception(tmp_path, arguments):
    [episode], policy = await play(tmp_path, COUNTER, [call("add", arguments), "sorry"])
    assert (episode.status, episode.reward) == ("ok", 0.0)
    [answer] = tool_messages(episode)
    assert "the arguments are not a JSON object" in json.loads(answer)["error"]
    assert episode.metrics["tools/failure"] == 1
    assert trained(episode) == policy.sampled


async def test_synchronous_tools_of_different_episodes_and_of_one_turn_overlap(tmp_path):
    def says(prompt: str) -> str:
        return "end" if "<tool_response>" in prompt else call("meet", {"name": "a"})

    trl = {"tools": ["mine.meet"]}
    episodes, _ = await play(tmp_path, TOOLS, says, trl=trl, n=2)
    assert [tool_messages(episode) for episode in episodes] == [["a met"]] * 2
    both = call("meet", {"name": "a"}) + "\n" + call("meet", {"name": "b"})
    [episode], _ = await play(tmp_path, TOOLS, [both, "end"], trl=trl)
    assert tool_messages(episode) == ["a met", "b met"]
    assert episode.reward is None


async def test_asynchronous_tools_of_one_turn_overlap(tmp_path):
    both = call("wait_for_it", {"name": "a"}) + "\n" + call("signal")
    trl = {"tools": ["mine.wait_for_it", "mine.signal"]}
    [episode], _ = await play(tmp_path, TOOLS, [both, "end"], trl=trl, prompt="Guess.")
    assert tool_messages(episode) == ["a", "sent"]


async def test_synchronous_methods_of_one_object_run_in_the_order_of_their_calls(tmp_path):
    source = """
import threading, time
class Env:
    inside = 0
    def reset(self, **row): self.order = []
    def note(self, name: str) -> str:
        '''Notes.

        Args:
            name: What.
        '''
        self.inside += 1
        assert self.inside == 1, "two threads in one object"
        time.sleep(0.02)
        self.inside -= 1
        self.order.append(name)
        return "".join(self.order)
"""
    said = "\n".join(call("note", {"name": name}) for name in "abcd")
    [episode], _ = await play(tmp_path, source, [said, "end"], trl={"environment_factory": "mine.Env"})
    assert tool_messages(episode) == ["a", "ab", "abc", "abcd"]


async def test_the_column_environment_selects_one(tmp_path):
    source = """
class One:
    def reset(self, answer, **row):
        assert set(row) == {"prompt", "level"}, row
        return answer
    def first(self) -> str:
        '''The first.'''
        return "1"
class Two:
    def reset(self): ...
    def second(self) -> str:
        '''The second.'''
        return "2"
    async def get_reward(self):
        return 2
"""
    trl = {"environment_factory": {"one": "mine.One", "two": "mine.Two"}}
    [episode], policy = await play(tmp_path, source, ["hm"], trl=trl, environment="one", answer="4", level=1)
    prompt = chat_of().tokenizer.decode(policy.prompts[0])
    assert (episode.status, episode.error, episode.reward) == ("ok", "", None)
    assert '"first"' in prompt
    assert '"second"' not in prompt
    assert "Guess. 4" in prompt
    [episode], policy = await play(tmp_path, source, ["hm"], trl=trl, environment="two")
    assert episode.reward == 2.0
    assert '"second"' in chat_of().tokenizer.decode(policy.prompts[0])
    [episode], _ = await play(tmp_path, source, [], trl=trl, environment="three")
    assert "no environment 'three'" in episode.error
    assert "It has: one, two" in episode.error


async def test_a_truncated_episode_keeps_what_its_environment_pays(tmp_path):
    [episode], policy = await play(tmp_path, COUNTER, lambda _: call("add", {"amount": 1}), max_tokens=200)
    assert episode.status == "truncated"
    assert 0 < len(policy.completions) < 9
    assert episode.reward == pytest.approx(len(tool_messages(episode)) / 10)
    assert made(tmp_path)[-1].closed
    assert trained(episode) == policy.sampled


async def test_a_truncated_episode_whose_environment_gives_no_reward_has_none(tmp_path):
    source = COUNTER.replace("return self.total / 10", "return None")
    [episode], _ = await play(tmp_path, source, lambda _: call("add", {"amount": 1}), max_tokens=200)
    assert (episode.status, episode.reward) == ("truncated", None)


async def test_a_hanging_tool_ends_with_the_episode(tmp_path):
    source = """
import asyncio
told = []
class Env:
    def reset(self, **row): told.clear()
    async def hang(self) -> str:
        '''Hangs.'''
        told.append("hangs")
        await asyncio.Event().wait()
    async def close(self): told.append("closed")
"""
    trl = {"environment_factory": "mine.Env"}
    for seconds in (0.3, 3.0, 30.0):  # more, where a busy machine does not come to the call in time
        [episode], _ = await play(tmp_path, source, lambda _: call("hang"), trl=trl, seconds=seconds)
        assert episode.status == "timeout"
        if "hangs" in (told := resolve("mine.told.copy", base_dir=tmp_path, key="test")()):
            break
    assert told == ["hangs", "closed"]


async def test_a_synchronous_tool_that_hangs_is_named(tmp_path, monkeypatch):
    source = """
import threading
entered, go = threading.Event(), threading.Event()
def hang() -> str:
    '''Hangs.'''
    entered.set()
    go.wait(60)
    return "late"
"""
    running = asyncio.create_task(play(tmp_path, source, lambda _: call("hang"), trl={"tools": ["mine.hang"]}))
    await asyncio.sleep(0)
    assert await asyncio.to_thread(resolve("mine.entered.wait", base_dir=tmp_path, key="test"), 60)
    running.cancel()
    await asyncio.wait({running})
    monkeypatch.setattr("rlx.envs.threads.GRACE_S", 0.0)
    assert stuck_threads() == ["hang of group, episode 0"]
    resolve("mine.go.set", base_dir=tmp_path, key="test")()
    for thread in threading.enumerate():
        if thread.name.startswith("hang of"):
            await asyncio.to_thread(thread.join, 60)
    assert not stuck_threads()


async def test_an_environment_that_is_made_too_late_is_the_next_episodes(tmp_path):
    """Nobody would close it; whatever it holds would stay."""
    source = """
import threading
go, made = threading.Event(), []
class Env:
    def __init__(self):
        made.append(self)
        if len(made) == 2:
            go.wait(60)
        self.closed = 0
    def reset(self, **row): ...
    def close(self): self.closed += 1
"""
    config = config_of(written(tmp_path, source), environment_factory="mine.Env")
    function = load_rollout(config, chat_of()).function
    request = GroupRequest("group", QUESTION, chat_of().start(QUESTION), 1, Sampling(max_tokens=99))

    async def status(seconds: float) -> str:
        runner = EpisodeRunner(function, chat_of(), EpisodesSection(timeout=seconds), max_model_len=8192)
        [episode] = await runner.run(Policy(chat_of(), lambda _: "done"), request)
        return episode.status

    assert [await status(120.0), await status(0.3)] == ["ok", "timeout"]
    resolve("mine.go.set", base_dir=tmp_path, key="test")()
    for thread in threading.enumerate():
        if thread.name.startswith("its constructor of"):
            await asyncio.to_thread(thread.join, 60)
    assert await status(120.0) == "ok"
    assert [environment.closed for environment in made(tmp_path)] == [1, 1]


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("def reset(self):\n        raise OSError('no board')", "OSError: no board"),
        ("def reset(self):\n        return 5", "Env.reset returned a value of type int"),
        ("def reset(self): ...\n    def get_reward(self):\n        return 'much'", "Env.get_reward returned 'much'"),
    ],
)
async def test_what_goes_wrong_around_the_calls_fails_the_episode(tmp_path, method, told):
    source = f"class Env:\n    {method}\n    def look(self) -> str:\n        '''Looks.'''\n        return 'x'\n"
    [episode], _ = await play(tmp_path, source, ["end"], trl={"environment_factory": "mine.Env"})
    assert episode.status == "aborted"
    assert told in episode.error


async def test_a_close_that_fails_does_not_change_the_episode(tmp_path, capsys):
    source = COUNTER.replace("self.closed = True", "raise OSError('stuck')")
    [episode], _ = await play(tmp_path, source, ["end"])
    assert (episode.status, episode.reward) == ("ok", 0.0)
    assert "close of group, episode 0 failed: OSError: stuck" in capsys.readouterr().out


# --- refused at start


def refusal(folder: Path, source: str, chat: Chat | None = None, **trl: Any) -> str:
    with pytest.raises(RlxError) as caught:
        load_rollout(config_of(written(folder, source), **trl), chat or chat_of())
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("class Env:\n    pass", "(Env) has no `reset`. Write `def reset(self, **row) -> str | None:`"),
        ("class Env:\n    def __init__(self):\n        raise OSError('no board')", "OSError: no board"),
        (
            "class Env:\n    def reset(self): ...\n    def go(self, to) -> str:\n        '''Goes.'''",
            "the tool Env.go has no type hint for 'to', so the model cannot be told what to give. Write `to: str`",
        ),
        (
            "class Env:\n    def reset(self): ...\n    def go(self, to: str) -> str: ...",
            "the tool Env.go has no docstring",
        ),
        (
            "class Env:\n    def reset(self): ...\n    def go(self, to: str) -> str:\n        '''Goes.'''",
            "the tool Env.go cannot be described to the model",
        ),
    ],
)
def test_an_environment_that_cannot_be_used_is_refused_with_the_line_to_write(tmp_path, source, told):
    error = refusal(tmp_path, source, environment_factory="mine.Env")
    assert told in error


def test_a_tool_without_a_description_is_shown_what_to_write(tmp_path):
    error = refusal(tmp_path, "def go(to: str) -> str: ...", tools=["mine.go"])
    assert (
        'Write under its `def` line:\n        """What it does.\n\n        Args:\n            to: ...\n        """'
        in error
    )


def test_two_tools_of_one_name_are_refused(tmp_path):
    go = "def go() -> str:\n    '''Goes.'''\n"
    (tmp_path / "other.py").write_text(go)
    assert "two tools are called 'go'" in refusal(tmp_path, go, tools=["mine.go", "other.go"])
    (tmp_path / "env.py").write_text(
        "class Env:\n    def reset(self): ...\n    def go(self) -> str:\n        '''Goes.'''"
    )
    assert "both have 'go'" in refusal(tmp_path, go, tools=["other.go"], environment_factory="env.Env")


def test_a_template_that_renders_no_tools_is_refused(tmp_path):
    plain = tiny_tokenizer("qwen3")
    plain.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match=r"trl\.environment_factory: the chat template does not render tool calls"):
        load_rollout(config_of(written(tmp_path, COUNTER), environment_factory="mine.Counter"), Chat(plain))


def test_only_an_environment_with_get_reward_brings_one(tmp_path):
    loaded = load_rollout(config_of(written(tmp_path, COUNTER + TOOLS), environment_factory="mine.Counter"), chat_of())
    assert (loaded.many_turns, loaded.own_reward) == (True, True)
    loaded = load_rollout(config_of(tmp_path, tools=["mine.meet"]), chat_of())
    assert (loaded.many_turns, loaded.own_reward) == (True, False)
