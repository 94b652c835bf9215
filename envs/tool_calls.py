"""Tool calls of a turn. What is a call is for the parser of the model's family to say (transformers' and TRL's); here
a call that is no JSON becomes one without arguments, with its text, so that the model can be told."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_NAME = re.compile(r'"name"\s*:\s*"([^"]*)"')


@dataclass(frozen=True)
class ToolCall:
    """`arguments` is None where the policy wrote no JSON object; `raw` is the text that it wrote."""

    id: str
    name: str
    arguments: dict[str, Any] | None
    raw: str


@dataclass(frozen=True)
class Parsed:
    """An assistant's turn: `message` as chat templates take it, `calls` the same tool calls in order."""

    message: dict[str, Any]
    calls: tuple[ToolCall, ...]


def parse_calls(
    parse: Callable[[str, Mapping[str, Any]], dict[str, Any]], said: str, form: Mapping[str, Any], number: int = 0
) -> Parsed | None:
    """`said` parsed by `parse(said, form)`; `form` is a response template of transformers. `number` is that of the
    first call. None when not even its plain parts can be parsed."""
    try:
        loose = parse(said, _loose(form))
    except (ValueError, TypeError):
        return None
    texts = loose.pop("tool_calls", [])
    texts = texts if isinstance(texts, list) else [texts]
    try:
        strict = parse(said, form).get("tool_calls", [])
        found = [item["function"] for item in (strict if isinstance(strict, list) else [strict])]
    except (ValueError, TypeError, KeyError):
        found = [_from_text(text) for text in texts]
    calls = tuple(
        _call(f"call{number + index:05d}", function, text["raw"])
        for index, (function, text) in enumerate(zip(found, texts, strict=True))
    )
    message = {"role": "assistant", **loose, "content": loose.get("content") or ""}
    if calls:
        message["tool_calls"] = [as_message(call) for call in calls]
    return Parsed(message, calls)


def as_message(call: ToolCall) -> dict[str, Any]:
    """The call as it stands in an assistant's message; arguments that are not JSON stay the text they are."""
    arguments = call.raw if call.arguments is None else call.arguments
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _loose(form: Mapping[str, Any]) -> dict[str, Any]:
    """`form` with the text of each tool call in place of what it means."""
    fields = dict(form["fields"])
    if "tool_calls" in fields:
        calls = dict(fields["tool_calls"])
        calls.pop("content_args", None)
        name = {"name": "{name}"} if "(?P<name>" in str(calls.get("open_pattern")) else {}
        fields["tool_calls"] = {**calls, "content": "text", "transform": {"raw": "{content}", **name}}
    return {**form, "fields": fields}


def _from_text(text: Mapping[str, str]) -> dict[str, Any]:
    """The function of a call among which one is malformed; without arguments when it is this one."""
    try:
        value = json.loads(text["raw"])
    except ValueError:
        value = None
    if "name" in text:
        return {"name": text["name"], "arguments": value}
    if isinstance(value, dict):
        return value
    name = _NAME.search(text["raw"])
    return {"name": name[1] if name else "", "arguments": value if value is not None else text["raw"]}


def _call(number: str, function: Any, raw: str) -> ToolCall:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return ToolCall(number, "", None, raw)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    return ToolCall(number, function["name"], arguments if isinstance(arguments, dict) else None, raw)
