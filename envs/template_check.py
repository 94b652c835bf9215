"""Whether a chat template renders every turn the same wherever it stands. What a bridge appends is right only then."""

from __future__ import annotations

from typing import Any, Protocol

from rlx.errors import RlxError

_USER, _TEXT, _THOUGHT, _VALUE = "rlxquestion", "rlxanswer", "rlxthought", "rlxvalue"
_THINKING = f"<think>\n{_THOUGHT}\n</think>\n\n"
_CALLS = [{"id": "call00000", "type": "function", "function": {"name": "rlxtool", "arguments": {"key": _VALUE}}}]
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
    """What the template does to a turn that keeps a conversation from being continued; None when nothing."""
    plain = {"role": "assistant", "content": _TEXT}
    thinking = {"role": "assistant", "content": _THINKING + _TEXT}
    found = _changed(chat, "an answer", plain, _TEXT, _user()) or _changed(
        chat, "an answer with thinking", thinking, _TEXT, _user()
    )
    if found:
        return found
    if _THOUGHT not in chat.render([_user(), thinking, _user()]):
        return "the template leaves the thinking out of an answer, so that it is not rendered as it was sampled."
    prompt = chat.render([_user()])
    if not any(chat.render([_user(), answer], None, False).startswith(prompt) for answer in (plain, thinking)):
        return "the template begins an answer otherwise than the generation prompt does."
    if not renders_tools(chat):
        return None
    call = {"role": "assistant", "content": "", "tool_calls": _CALLS}
    return _changed(chat, "a tool call", call, _VALUE, _RESULT, [_TOOL]) or _changed(
        chat, "a tool call with thinking", {**call, "content": _THINKING}, _VALUE, _RESULT, [_TOOL]
    )


def renders_tools(chat: Renders) -> bool:
    """Whether tool calls and their results stand in what the template writes."""
    try:
        text = chat.render([_user(), {"role": "assistant", "content": "", "tool_calls": _CALLS}, _RESULT], [_TOOL])
    except RlxError:  # a template that refuses these messages says so by raising
        return False
    return all(part in text for part in ("rlxtool", _VALUE, "rlxresult"))


def _changed(
    chat: Renders,
    what: str,
    turn: dict[str, Any],
    mark: str,
    reply: dict[str, Any],
    tools: list[dict[str, Any]] | None = None,
) -> str | None:
    """Whether `turn`, of which `mark` is the last that the policy writes, changes as the conversation goes on."""
    answer = {"role": "assistant", "content": "rlxlast"}
    alone = chat.render([_user(), turn], tools, generation_prompt=False)
    followed = chat.render([_user(), turn, reply], tools)
    later = chat.render([_user(), turn, reply, answer, _user()], tools)
    same = _until(mark, alone) == _until(mark, followed) == _until(mark, later)
    end = len(followed) - len(_tail(chat, tools))
    if same and later[:end] == followed[:end]:
        return None
    return f"the template renders {what} otherwise once more turns follow."


def _tail(chat: Renders, tools: list[dict[str, Any]] | None) -> str:
    """The generation prompt."""
    return chat.render([_user()], tools).removeprefix(chat.render([_user()], tools, generation_prompt=False))


def _until(mark: str, text: str) -> str:
    return text[: text.find(mark) + len(mark)] if mark in text else ""


def _user() -> dict[str, Any]:
    return {"role": "user", "content": _USER}
