"""Chat messages in the one form that templates take, whoever wrote them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any] | Callable[..., Any]


def normalised(message: Mapping[str, Any]) -> Message:
    """A message as templates take it: text parts joined, no content as "", developer as system, arguments as objects."""
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        content = "".join(str(part["text"]) for part in content)
    role = "system" if message["role"] == "developer" else message["role"]
    plain = {**message, "role": role, "content": "" if content is None else content}
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_with_object(call) for call in plain["tool_calls"]]
    return {key: value for key, value in plain.items() if value is not None}


def _with_object(call: Mapping[str, Any]) -> Message:
    function = dict(call.get("function") or {})
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (TypeError, ValueError):  # an object already, or text that is none
        arguments = function["arguments"]
    return {**call, "function": {**function, "arguments": arguments}}


def whole(text: str) -> str:
    """`text` with U+FFFD for every half of a surrogate pair: JSON may hold one, and no tokenizer takes it."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def with_string_arguments(message: Message) -> Message:
    """The arguments of its tool calls as JSON text, which some templates want."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls") or ()
    ]
    return {**message, "tool_calls": calls} if calls else message


def made_up_call(answer: Message, index: int, mark: str, calls: Sequence[Message]) -> Message:
    """A made-up call for the tool message `answer`, named like the real one where there is one."""
    number = str(answer.get("tool_call_id") or f"call{index:05d}")
    real = next((call for call in calls if call.get("id") == number), calls[index] if index < len(calls) else None)
    name = str(answer.get("name") or (real["function"]["name"] if real else "") or "tool")
    return {"id": number, "type": "function", "function": {"name": name, "arguments": {"key": mark}}}
