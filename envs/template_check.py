"""Whether a chat template renders every turn the same wherever it stands. What a bridge appends is right only then."""

from __future__ import annotations

from typing import Any, Protocol

from rlx.errors import RlxError

_USER, _TEXT, _THOUGHT, _VALUE = "rlxquestion", "rlxanswer", "rlxthought", "rlxvalue"
_ANSWERS = {
    "an answer": {"role": "assistant", "content": _TEXT},
    "an answer with thinking": {"role": "assistant", "content": f"<think>\n{_THOUGHT}\n</think>\n\n{_TEXT}"},
}
_CALL = {
    "role": "assistant",
    "content": f"<think>\n{_THOUGHT}\n</think>\n\n{_TEXT}",
    "tool_calls": [
        {"id": "call00000", "type": "function", "function": {"name": "rlxtool", "arguments": {"key": _VALUE}}}
    ],
}
_RESULT = {"role": "tool", "name": "rlxtool", "tool_call_id": "call00000", "content": "rlxresult"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "rlxtool",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}},
    },
}


class Renders(Protocol):
    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, generation_prompt: bool = True
    ) -> str: ...


def fault(chat: Renders) -> str | None:
    """What the template does to an earlier turn once another follows; None when it leaves it alone."""
    for what, answer in _ANSWERS.items():
        if found := _of_turn(chat, what, [_user()], answer, _TEXT, [_user()], None):
            return found
    if not renders_tools(chat):
        return None
    return _of_turn(chat, "a tool call", [_user()], _CALL, _VALUE, [_RESULT], [_TOOL])


def renders_tools(chat: Renders) -> bool:
    """Whether tool calls and their results stand in what the template writes."""
    try:
        text = chat.render([_user(), {**_CALL, "content": ""}, _RESULT], [_TOOL])
    except RlxError:  # a template that refuses these messages says so by raising
        return False
    return all(part in text for part in ("rlxtool", _VALUE, "rlxresult"))


def _of_turn(
    chat: Renders,
    what: str,
    before: list[dict[str, Any]],
    turn: dict[str, Any],
    mark: str,
    after: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
) -> str | None:
    """`mark` ends what the policy writes of `turn`. Each state of the conversation must begin like the one before."""
    last = {"role": "assistant", "content": f"{_TEXT}2"}
    prompt = chat.render(before, tools)
    alone, stem = _until(mark, chat.render([*before, turn], tools, False)), [*before, turn, *after]
    followed = chat.render(stem, tools)
    later = chat.render([*stem, last, _user()], tools)
    if _THOUGHT in turn["content"] and _THOUGHT not in alone:
        return f"the template leaves the thinking out of {what}, so that a turn is not rendered as it was sampled."
    if not alone.startswith(prompt):
        return f"the template writes {what} otherwise than its generation prompt begins it."
    if _until(mark, followed) != alone or not later.startswith(followed):
        return f"the template renders {what} otherwise once more turns follow."
    return None


def _until(mark: str, text: str) -> str:
    return text[: text.find(mark) + len(mark)] if mark in text else ""


def _user() -> dict[str, Any]:
    return {"role": "user", "content": _USER}
