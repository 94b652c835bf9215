"""The player of an OpenEnv environment, where the YAML has `envs:` and no rollout function of its own.

    reset   what the environment shows goes to the policy, at the end of the prompt
    turn    what the policy says becomes an action; what does not fit is told, and costs a turn
    step    what the environment shows goes to the policy, until it is done or `max_turns` are used up

The reward of the episode is the sum of what the steps gave.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from rlx.config import Config
from rlx.envs.chat import Chat
from rlx.envs.errors import ActionError
from rlx.envs.messages import Message
from rlx.envs.openenv_actions import describe, required, shown
from rlx.envs.rollout import Rollout, Turn
from rlx.envs.session import EnvSession

TEXTS = ("message", "text", "prompt", "observation", "question", "content", "output", "echoed_message", "result")
"""Fields of an observation that are shown to the policy alone, the first that is a text."""
TOOL = "step"
_FENCED = re.compile(r"```[a-zA-Z]*\s*\n(.*?)```", re.DOTALL)

Act = Callable[[EnvSession, Turn], Awaitable[list[Message]]]


def player(config: Config) -> Callable[[Rollout], Awaitable[float | None]]:
    """A rollout function that plays the environment which the row's column `environment` names, or the first."""
    max_turns = {env.name: env.max_turns for env in config.envs}

    async def play(ctx: Rollout) -> None:
        env = await ctx.env(ctx.task.get("environment"))
        act, tools = await asyncio.to_thread(_way_to_act, env.action_schema, ctx.chat)
        _begin(ctx, rendered(env.observation), tools)
        for left in reversed(range(max_turns[env.name])):
            answers = await act(env, await ctx.turn())
            if env.done or not left:
                return
            ctx.observe(*answers)

    return play


def rendered(observation: Any) -> str:
    """What the policy is shown of an observation: its text, or all of it as JSON."""
    if isinstance(observation, Mapping):
        for name in TEXTS:
            if isinstance(text := observation.get(name), str) and text:
                return text
        observation = {name: value for name, value in observation.items() if name != "metadata"}
    return json.dumps(observation, ensure_ascii=False, separators=(",", ":"))


def _begin(ctx: Rollout, shown_first: str, tools: list[dict[str, Any]] | None) -> None:
    """The prompt of the group with the first observation at its end: in its last message where that is the user's, as
    many templates want the roles to alternate."""
    prompt = ctx.task["prompt"]
    if isinstance(prompt, str):
        if tools is None:
            ctx.start()
            return ctx.observe({"role": "user", "content": shown_first})
        prompt = [{"role": "user", "content": prompt}]
    *before, last = [*prompt] or [{"role": "user", "content": ""}]
    if last["role"] == "user" and isinstance(last["content"], str):
        last = {**last, "content": "\n\n".join(filter(None, [last["content"], shown_first]))}
        return ctx.start([*before, last], tools)
    return ctx.start([*before, last, {"role": "user", "content": shown_first}], tools)


# --- from what the policy says to an action


def _way_to_act(schema: Mapping[str, Any], chat: Chat) -> tuple[Act, list[dict[str, Any]] | None]:
    """How actions of this schema are said, and the tools that the policy is given for it. The first time takes seconds
    where it loads parsers."""
    if _single_field(schema, "string"):
        return _by_text, None
    if chat.can_parse_tools:
        function = {"name": TOOL, "description": "Act in the environment.", "parameters": shown(schema)}
        return _by_tool, [{"type": "function", "function": function}]
    return _by_json, None


def _single_field(schema: Mapping[str, Any], kind: str | None = None) -> str | None:
    """The one field that an action must have, if it must have one, of this type."""
    names = required(schema)
    if len(names) != 1 or (kind and schema["properties"][names[0]].get("type") != kind):
        return None
    return names[0]


async def _by_text(env: EnvSession, turn: Turn) -> list[Message]:
    return [_user(await _step(env, {str(_single_field(env.action_schema)): turn.text}))]


async def _by_json(env: EnvSession, turn: Turn) -> list[Message]:
    fenced = _FENCED.findall(turn.text)
    text = (fenced[-1] if fenced else turn.text).strip()
    single = _single_field(env.action_schema)
    try:
        action = json.loads(text)
    except (ValueError, RecursionError):
        action = None
    if not isinstance(action, dict):
        if single is None or action is None:
            return [_user(f"Reply with one JSON object and nothing else. Its fields: {describe(env.action_schema)}")]
        action = {single: action}
    return [_user(await _step(env, action))]


async def _by_tool(env: EnvSession, turn: Turn) -> list[Message]:
    if not turn.tool_calls:
        return [_user(f"Call the tool {TOOL!r} to act. Its arguments: {describe(env.action_schema)}")]
    answers = []
    for call in turn.tool_calls:
        if env.done:
            said = "not done: the environment is done"
        elif call.name != TOOL:
            said = f"error: there is no tool {call.name!r}, only {TOOL!r}"
        elif call.arguments is None:
            said = f"error: the arguments are no JSON object. They are: {describe(env.action_schema)}"
        else:
            said = await _step(env, call.arguments)
        answers.append({"role": "tool", "name": call.name, "tool_call_id": call.id, "content": said})
    return answers


async def _step(env: EnvSession, action: Mapping[str, Any]) -> str:
    try:
        return rendered((await env.step(action)).observation)
    except ActionError as error:
        return f"error: {error}"


def _user(content: str) -> Message:
    return {"role": "user", "content": content}
