"""TRL's `environment_factory` and `tools` as one native rollout function.

    reset(**row) ─► start(messages, tools) ─► turn ─► tool calls ─► observe ─► turn … ─► get_reward()
                                                └─ no calls, or the environment is done: the end

Every episode has an environment of its own. What goes wrong with a call, the model is told; what goes wrong in
`reset` or `get_reward` is the episode's failure. Asynchronous tools are awaited, synchronous ones run in threads, and
the calls of a turn run side by side, except that an object's synchronous methods run one after the other, in the
order of the calls: it need not be safe for threads.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlx.config import Config
from rlx.envs.chat import Chat
from rlx.envs.errors import EpisodeTruncated
from rlx.envs.rollout import Rollout, ToolCall
from rlx.envs.threads import in_thread
from rlx.envs.tool_kinds import Kind, factories_of, kind_of, schema_of, standalone
from rlx.errors import ConfigError, UserCodeError

_MAX_ATTRIBUTE = 20_000
"""Characters of JSON that an attribute of an environment may be to be given to reward functions."""
CLOSE_TIMEOUT_S = 3.0
"""Seconds that `close()` of an environment may take."""


@dataclass
class _Tools:
    """The tools of one episode by name. `in_turn` holds the calls of its environment's synchronous methods apart."""

    functions: Mapping[str, Callable[..., Any]]
    methods: frozenset[str]
    environment: Any
    in_turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    calls: int = 0
    failures: int = 0


class ToolLoop:
    """A native rollout function. Everything that can be refused is refused when it is made, with UserCodeError or
    ConfigError."""

    def __init__(self, config: Config, chat: Chat):
        self._limit = config.trl.max_tool_calling_iterations
        self._functions = standalone(config)
        factories = factories_of(config)
        self._by_column = isinstance(config.trl.environment_factory, dict)
        key = "trl.environment_factory" if config.trl.environment_factory else "trl.tools"
        if not chat.can_parse_tools:
            raise ConfigError(
                f"{config.path}: {key}: the chat template does not render tool calls, or they are of a family that "
                "cannot be parsed. Set chat_template to one of a known family, for example qwen3_training, and use a "
                "model that was trained with it."
            )
        schemas = [schema_of(function, name, chat) for name, function in self._functions.items()]
        self._kinds = {name: kind_of(factory, name, schemas, chat) for name, factory in factories.items()}
        if not factories:
            self._kinds = {None: Kind(None, (), tuple(schemas), has_reward=False)}

    @property
    def own_reward(self) -> bool:
        """Whether an environment has `get_reward`."""
        return any(kind.has_reward for kind in self._kinds.values())

    async def __call__(self, ctx: Rollout) -> float | None:
        kind = self._kind_of(ctx.task)
        environment = await _environment(ctx, kind)
        methods = {name: getattr(environment, name) for name in kind.methods}
        tools = _Tools({**self._functions, **methods}, frozenset(methods), environment)
        try:
            observation = await self._reset(ctx, environment) if kind.factory else None
            ctx.start(_with_observation(ctx.task["prompt"], observation), kind.schemas)
            try:
                await self._turns(ctx, tools)
            except EpisodeTruncated:
                if kind.has_reward and (value := await _reward_of(ctx, environment)) is not None:
                    ctx.reward(value, name=type(environment).__name__)
                raise
            finally:
                if kind.factory:
                    ctx.extra["environments"] = _state_of(environment)
            return await _reward_of(ctx, environment) if kind.has_reward else None
        finally:
            ctx.metric("tools/call", tools.calls)
            ctx.metric("tools/failure", tools.failures)
            await _close(ctx, environment)

    def _kind_of(self, task: Mapping[str, Any]) -> Kind:
        name = task.get("environment") if self._by_column else None
        if name not in self._kinds:
            raise UserCodeError(
                f"trl.environment_factory has no environment {name!r}, which is in the column `environment` of this "
                f"row. It has: {', '.join(map(str, self._kinds))}."
            )
        return self._kinds[name]

    async def _reset(self, ctx: Rollout, environment: Any) -> str | None:
        row = {name: value for name, value in ctx.task.items() if not (self._by_column and name == "environment")}
        parameters = inspect.signature(environment.reset).parameters.values()
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = {p.name for p in parameters}
        given = {name: value for name, value in row.items() if takes_all or name in named}
        if "seed" in named:
            given.setdefault("seed", ctx.seed)
        observation = await _call(environment.reset, _name(ctx, "reset"), **given)
        if observation is not None and not isinstance(observation, str):
            raise UserCodeError(
                f"{type(environment).__name__}.reset returned a value of type {type(observation).__name__}. "
                "Return None, or a string, which is appended to the last message of the user."
            )
        return observation

    async def _turns(self, ctx: Rollout, tools: _Tools) -> None:
        turns_with_calls = 0
        while True:
            turn = await ctx.turn()
            if not turn.tool_calls or turns_with_calls == self._limit:
                return
            turns_with_calls += 1
            answers = await asyncio.gather(*(_answer(ctx, tools, call) for call in turn.tool_calls))
            ctx.observe(*answers)
            if await _is_done(ctx, tools.environment):
                return


# --- calling


async def _environment(ctx: Rollout, kind: Kind) -> Any:
    """An environment for one episode; None without a factory. One that was made for an episode which ended meanwhile
    is the next one's."""
    if (make := kind.factory) is None:
        return None
    while not kind.spare:
        await in_thread(lambda: kind.spare.append(make()), _name(ctx, "its constructor"))
    return kind.spare.pop()


async def _is_done(ctx: Rollout, environment: Any) -> bool:
    """What its `done` says, an attribute, a property or a method; without one it never is."""
    done = getattr(environment, "done", False)
    return bool(await _call(done, _name(ctx, "done")) if callable(done) else done)


async def _answer(ctx: Rollout, tools: _Tools, call: ToolCall) -> dict[str, Any]:
    """The message of the role tool that answers `call`."""
    tools.calls += 1
    try:
        content = _as_content(await _result(ctx, tools, call))
    except (Exception, SystemExit) as error:  # it is for the model to see what its call came to
        tools.failures += 1
        content = json.dumps({"error": str(error) or type(error).__name__}, ensure_ascii=False)
    return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content}


async def _result(ctx: Rollout, tools: _Tools, call: ToolCall) -> Any:
    function = tools.functions.get(call.name)
    if function is None:
        raise ValueError(f"there is no tool {call.name!r}; there are: {', '.join(sorted(tools.functions))}")
    if call.arguments is None:
        raise ValueError(f"the arguments are not a JSON object: {call.raw}")
    inspect.signature(function).bind(**call.arguments)
    if call.name in tools.methods and not inspect.iscoroutinefunction(function):
        async with tools.in_turn:
            if await _is_done(ctx, tools.environment):
                raise ValueError("not called: the environment is done")
            return await _call(function, _name(ctx, call.name), **call.arguments)
    return await _call(function, _name(ctx, call.name), **call.arguments)


async def _call(function: Callable[..., Any], name: str, /, **arguments: Any) -> Any:
    """Await an asynchronous function, run any other in a thread called `name`."""
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004  is it `async def __call__`
        return await function(**arguments)
    result = await in_thread(lambda: function(**arguments), name)
    return await result if inspect.isawaitable(result) else result


def _as_content(result: Any) -> str:
    if isinstance(result, str):
        return result
    return json.dumps(result, ensure_ascii=False, default=str)


def _name(ctx: Rollout, what: str) -> str:
    return f"{what} of {ctx.group_id}, episode {ctx.index}"


async def _reward_of(ctx: Rollout, environment: Any) -> float | None:
    value = await _call(environment.get_reward, _name(ctx, "get_reward"))
    value = value.item() if hasattr(value, "item") else value
    if value is None or (isinstance(value, int | float) and math.isfinite(value)):
        return value
    raise UserCodeError(f"{type(environment).__name__}.get_reward returned {value!r}. Return a finite number, or None.")


def _state_of(environment: Any) -> dict[str, Any]:
    """The public attributes that are JSON and not huge, for reward functions that ask for `environments`."""
    state: dict[str, Any] = {}
    for name in [name for name in dir(environment) if not name.startswith("_")]:
        try:
            value = getattr(environment, name)
            text = json.dumps(value.tolist() if hasattr(value, "tolist") else value, allow_nan=False)
        except Exception:  # a property of the user's may raise anything; methods and clients are not JSON
            continue
        if len(text) <= _MAX_ATTRIBUTE:
            state[name] = json.loads(text)
    return state


async def _close(ctx: Rollout, environment: Any) -> None:
    close = getattr(environment, "close", None)
    if close is None:
        return
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await _call(close, _name(ctx, "close"))
    except Exception as error:  # the episode is over, and this must not change how it ended
        print(f"{_name(ctx, 'close')} failed: {type(error).__name__}: {error}", flush=True)


# --- the prompt


def _with_observation(prompt: str | Sequence[Mapping[str, Any]], observation: str | None) -> list[dict[str, Any]]:
    """The messages of a prompt, with `observation` at the end of the user's last one."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if not observation:
        return messages
    last = next((message for message in reversed(messages) if message["role"] == "user"), None)
    if last is None:
        return [*messages, {"role": "user", "content": observation}]
    last["content"] = (last.get("content") or "") + observation
    return messages
