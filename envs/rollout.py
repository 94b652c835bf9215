"""The context of one episode: what a rollout function is given.

    ctx.turn()     samples the policy's next turn: on the tape, trained
    ctx.observe()  appends what the environment says: on the tape, context
    ctx.fork()     another row: a rewritten context, a sub-agent

Each row is one `Line`: a tape, and the conversation it stands for. `EpisodeState` is what rows have in common.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlx.envs.chat import Chat
from rlx.envs.errors import EnvLost, EpisodeTruncated
from rlx.envs.lease import Leased
from rlx.envs.messages import Message, Tool, normalised
from rlx.envs.session import EnvSession
from rlx.envs.state import EpisodeState, Line, OpenAIEndpoint, finite
from rlx.envs.tape import Tape
from rlx.envs.tool_calls import ToolCall
from rlx.episode import StepReward
from rlx.wire import Completion, Sampling

__all__ = ["Rollout", "ToolCall", "Turn"]


@dataclass(frozen=True)
class Turn:
    """What the policy said in one request, T tokens: `ids` int32 [T], `logprobs` float32 [T], `versions` run-length
    encoded. `finish_reason`: stop or length. `message` is the assistant's message as chat templates take it."""

    text: str
    tool_calls: tuple[ToolCall, ...]
    ids: np.ndarray
    logprobs: np.ndarray
    versions: tuple[tuple[int, int], ...]
    finish_reason: str
    message: Message
    num_prompt_tokens: int
    """How many tokens of its row it was sampled after."""


class Rollout:
    """One episode, or one row of it when it is a fork. Not for several event loops.

    `task` is the row of the data set: `prompt` and its columns. `seed` is of the environment, the same for the group.
    `deadline` is on time.monotonic(). `completion` is what reward functions get; None: what followed the first
    prompt. `extra` are more columns for them, JSON values. `exact` is False where sampled tokens are hidden.
    """

    def __init__(self, state: EpisodeState, chat: Chat):
        request = state.request
        self.task: Mapping[str, Any] = copy.deepcopy({"prompt": request.prompt, **request.columns})
        self.seed = request.seed
        self.group_id = request.key
        self.index = state.index
        self.attempt = state.attempt
        self.deadline = state.deadline
        self.sampling: Sampling = request.sampling
        self.chat = chat
        self._state = state
        self._line: Line | None = None

    # --- the conversation

    @property
    def messages(self) -> list[Message]:
        """The conversation of the current row so far; empty where it did not begin with messages."""
        return list(self._line.messages) if self._line else []

    def start(self, messages: Sequence[Message] | None = None, tools: Sequence[Tool] | None = None) -> None:
        """Open a row with `messages`; None is the group's own prompt."""
        request = self._state.request
        own = copy.deepcopy(request.prompt) if isinstance(request.prompt, list) else None
        given = own if messages is None else list(messages)
        if given is None and tools:
            raise ValueError("start: tools need messages, and the prompt of this row is text. Give it as messages.")
        self._state.check_length(given or ())
        group_prompt = not tools and (given is own or (given and own and _same(given, own)))
        ids = request.prompt_ids if group_prompt else self.chat.start(given or (), tools)
        tape = Tape(ids, group_prompt=bool(group_prompt))
        self._open(Line(tape, list(given or ()), list(tools) if tools else None, plain=given is None))

    async def turn(self, **sampling: Any) -> Turn:
        """Sample the policy's next turn; fields of Sampling given here are for this turn only.

        Raises EpisodeTruncated when the row's token budget is used up.
        """
        if self._line is None:
            self.start()
        line = self._current()
        if line.phase == "ended":
            raise RuntimeError("turn: the policy has ended its turn. ctx.observe(...) something, or ctx.fork().")
        return await self._sampled(line, sampling)

    def observe(self, *messages: Message) -> None:
        """Append what the environment says, as tool or user messages: context. Their text is data.

        In a row that did not begin with messages (a text prompt, `generate`) the contents are appended as they are.
        """
        if not messages:
            raise ValueError("observe: give at least one message")
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message:
                raise TypeError(
                    f'observe: a message is a dict such as {{"role": "user", "content": "…"}}, not {message!r:.80}'
                )
            if message["role"] == "assistant":
                raise ValueError("observe: what the assistant says comes from ctx.turn()")
        self._state.check_length(messages)
        line = self._current()
        if line.busy:
            raise RuntimeError("observe: this row is being sampled; await ctx.turn() first")
        if line.plain:
            ids = self.chat.text(*messages)
        elif line.phase == "prompt":
            raise RuntimeError(
                "observe: the policy has not spoken since. Give all messages at once, or to ctx.start()."
            )
        else:
            calls = line.messages[-1].get("tool_calls", ())
            ids = self.chat.bridge(messages, line.tape.ids()[line.turn_start :], calls=calls, tools=line.tools)
        line.tape.context(ids)
        line.spoken.append(ids)
        line.phase = "prompt"
        line.messages += [] if line.plain else [dict(message) for message in messages]

    async def generate(self, ids: Sequence[int], **sampling: Any) -> Turn:
        """Sample after the token ids `ids` [N]. Where they begin with all of a row of this episode, the row goes on
        and the rest is context; otherwise they are the prompt of a new row."""
        given = np.asarray(ids)
        if given.ndim != 1 or not len(given) or given.dtype.kind not in "iu" or given.min() < 0:
            raise ValueError(f"generate: one row of token ids is expected, got {given.dtype} of shape {given.shape}")
        prompt = given.astype(np.int32)
        line = self._extended_by(prompt)
        if line is None:
            group_prompt = np.array_equal(prompt, self._state.request.prompt_ids)
            line = Line(Tape(prompt, group_prompt=group_prompt), [], plain=True)
            self._open(line)
        elif len(rest := prompt[len(line.tape.ids()) :]):
            line.tape.context(rest)
            line.spoken.append(rest)
            line.messages, line.plain = [], True
        self._line = line
        return await self._sampled(line, sampling)

    async def reply(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, **sampling: Any) -> Turn:
        """The policy's answer to a whole conversation. Where `messages` begin with those of a row, the row goes on
        with the new ones; otherwise they open a row. Calls side by side get rows of their own."""
        line = self._continued_by(messages, tools)
        if line is None:
            self.start(messages, tools)
            line = self._current()
        else:
            self._line = line
            if new := messages[len(line.messages) :]:
                self.observe(*new)
        return await self._sampled(line, sampling)

    def fork(self) -> Rollout:
        """A new row of the same episode: task, seed, rewards and environments are shared, the token budget is its own."""
        return Rollout(self._state, self.chat)

    # --- beside the conversation

    async def env(self, ref: str | int | None = None, **reset: Any) -> EnvSession:
        """A session with an environment of `envs:`, by its number or name, reset with the episode's seed. Rewards of
        its steps are recorded. It is closed for you, however the episode ends. Raises EnvLost."""
        return Leased(await self._state.lease(ref, reset), self._state)

    def reward(self, value: float, *, name: str = "env", turn: int | None = None) -> None:
        """A reward of the turn `turn`, counted from 0; None belongs to the whole episode."""
        self._state.record(StepReward(finite("reward", value), str(name), None if turn is None else int(turn)))

    def metric(self, key: str, value: float) -> None:
        """A number of this episode; given twice, the last one counts."""
        if not self._state.over:
            self._state.metrics[str(key)] = finite(f"metric {key!r}", value)

    def fail(self, error: BaseException) -> None:
        """End the episode with `error`, whatever the function makes of it. EpisodeTruncated lets other rows go on, but
        what the function raises after it is because of it."""
        if isinstance(error, EnvLost):
            self._state.lose(error)
        elif isinstance(error, EpisodeTruncated):
            self._state.told_truncated = True
        else:
            self._state.failure = self._state.failure or error

    @property
    def openai(self) -> OpenAIEndpoint:
        """`base_url` and `api_key` for an agent that speaks the OpenAI API; what it samples is on this tape."""
        if self._state.endpoint is None:
            raise RuntimeError("openai: this process serves no endpoint for agents")
        if self._state.over:
            raise RuntimeError("openai: the episode is over")
        if self not in self._state.registered:
            self._state.registered.append(self)
        return self._state.endpoint.register(self)

    @property
    def completion(self) -> str | list[Message] | None:
        return self._state.completion

    @completion.setter
    def completion(self, value: str | list[Message] | None) -> None:
        self._state.completion = value

    @property
    def exact(self) -> bool:
        return self._state.exact

    @exact.setter
    def exact(self, value: bool) -> None:
        self._state.exact = bool(value)

    @property
    def extra(self) -> dict[str, Any]:
        return self._state.extra

    @extra.setter
    def extra(self, value: Mapping[str, Any]) -> None:
        self._state.extra = dict(value)

    # --- rows

    def _open(self, line: Line) -> None:
        line.first_message = len(line.messages)
        self._line = line
        self._state.lines.append(line)

    def _current(self) -> Line:
        if self._line is None:
            raise RuntimeError("the row is not open yet: ctx.start() or ctx.turn() first")
        return self._line

    async def _sampled(self, line: Line, changes: Mapping[str, Any]) -> Turn:
        if line.busy:
            raise RuntimeError("this row is being sampled; use ctx.fork() for another beside it")
        if line.phase != "open":
            line.turn_start = len(line.tape.ids())
        completion = await self._state.sample(line, changes)
        return self._spoken(line, completion)

    def _spoken(self, line: Line, completion: Completion) -> Turn:
        goes_on = line.phase == "open"
        ids = line.tape.ids()
        text = completion.text
        calls: tuple[ToolCall, ...] = ()
        message: Message = {"role": "assistant", "content": text}
        if line.tools:
            parsed = self.chat.parse(ids[line.turn_start :], ids[: line.turn_start], line.tools, self._state.calls)
            message, calls = parsed.message, parsed.calls
            self._state.calls += len(calls)
        elif goes_on and line.messages:
            message["content"] = line.messages[-1]["content"] + text
        if not line.plain:
            line.messages[-1 if goes_on else len(line.messages) :] = [message]
        line.spoken.append(text)
        line.phase = "ended" if not line.plain and self.chat.ends_turn(completion.ids) else "open"
        self._state.turns += 1
        return Turn(
            text, calls, completion.ids, completion.logprobs, completion.versions, completion.finish_reason, message,
            num_prompt_tokens=len(ids) - len(completion.ids),
        )  # fmt: skip

    def _extended_by(self, ids: np.ndarray) -> Line | None:
        """The longest row that `ids` begin with; of equal ones the current."""
        lines = [line for line in self._state.lines if not line.busy and line.tape.extended_by(ids)]
        return max(lines, key=lambda line: (len(line.tape.ids()), line is self._line), default=None)

    def _continued_by(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> Line | None:
        """The row that begins `messages` and to which the rest can be appended."""
        fitting = []
        for line in self._state.lines:
            rest = messages[len(line.messages) :]
            if line.busy or line.plain or (line.tools or []) != list(tools or []):
                continue
            if not _same(messages[: len(line.messages)], line.messages):
                continue
            spoken = line.phase != "prompt"
            if bool(rest) == spoken and not any(message["role"] == "assistant" for message in rest):
                fitting.append(line)
        return max(fitting, key=lambda line: (len(line.messages), line is self._line), default=None)


def _same(some: Sequence[Message], others: Sequence[Message]) -> bool:
    """Whether two conversations are the same, however their clients write them."""
    return [_comparable(message) for message in some] == [_comparable(message) for message in others]


def _comparable(message: Mapping[str, Any]) -> tuple[Any, ...]:
    """What has to agree for two messages to be the same turn."""
    plain = normalised(message)
    calls = [
        (call["function"].get("name"), _canonical(call["function"].get("arguments")))
        for call in plain.get("tool_calls", ())
    ]
    content = plain["content"] if isinstance(plain["content"], str) else _canonical(plain["content"])
    if plain["role"] == "assistant":
        content = content.strip()  # as many clients send it back
    return plain["role"], content, calls, plain.get("tool_call_id")


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
