"""`/v1/responses` in OpenAI's shapes: input items read as chat messages, turns written as output items and events."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

from pydantic import Field, field_validator

from rlx.envs.openai_shapes import (
    Json,
    Refused,
    Request,
    arguments_of,
    event,
    given,
    messages_of,
    text_of,
    tool_call,
    tools_of,
)
from rlx.envs.rollout import Turn


class ResponsesRequest(Request):
    """POST /v1/responses"""

    @field_validator("text")
    @classmethod
    def plain_text_only(cls, value: Json | None) -> Json | None:
        if ((value or {}).get("format") or {"type": "text"}) != {"type": "text"}:
            raise ValueError("only the format text is supported")
        return value

    input: str | list[Json]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    previous_response_id: str | None = None
    text: Json | None = None

    @property
    def sampling(self) -> Json:
        """The fields of Sampling that the request sets."""
        return given(max_tokens=self.max_output_tokens)

    @property
    def chat_tools(self) -> list[Json] | None:
        """The tools as chat completions have them."""
        return tools_of(
            [
                {"type": tool.get("type"), "function": {k: v for k, v in tool.items() if k not in ("type", "strict")}}
                for tool in self.tools or ()
            ]
        )


def messages_of_input(items: str | list[Json]) -> list[Json]:
    """Input items as chat messages. What one reply put out, text and function calls, is one assistant message again."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[Json] = []
    for i, item in enumerate(items):
        where, kind = f"input.{i}", item.get("type", "message")
        if kind == "message":
            messages += messages_of([item])
        elif kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            call = tool_call(item.get("call_id"), item.get("name"), item.get("arguments"), where)
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            content = text_of(item.get("output"), f"{where}.output")
            messages.append({"role": "tool", "content": content, "tool_call_id": item.get("call_id")})
        else:
            raise Refused(f"{where}.type: {kind!r} is not supported; use message, function_call, function_call_output")
    return messages


def response_answer(request: ResponsesRequest, turn: Turn) -> Json:
    """The answer to `request`."""
    cut = turn.finish_reason == "length"
    calls = () if request.tool_choice == "none" else turn.tool_calls
    status, content = "incomplete" if cut else "completed", turn.message.get("content") or ""
    output: list[Json] = []
    if content or not calls:
        text: Json = {"type": "output_text", "text": content, "annotations": []}
        output.append({"type": "message", "id": _id("msg"), "role": "assistant", "status": status, "content": [text]})
    for call in calls:
        item = {"call_id": call.id, "name": call.name, "arguments": arguments_of(call), "status": "completed"}
        output.append({"type": "function_call", "id": _id("fc"), **item})
    return {
        "id": _id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": request.instructions,
        "model": request.model,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": request.previous_response_id,
        "tool_choice": request.tool_choice or "auto",
        "tools": request.tools or [],
        "text": {"format": {"type": "text"}},
        "metadata": {},
        "usage": {
            "input_tokens": turn.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": len(turn.ids),
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": turn.num_prompt_tokens + len(turn.ids),
        },
    }


def response_events(answer: Json) -> Iterator[str]:
    """`answer` as the server-sent events of a stream."""
    for number, data in enumerate(_events(answer)):
        yield event({**data, "sequence_number": number}, data["type"])


def _events(answer: Json) -> Iterator[Json]:
    begun = {**answer, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    for index, item in enumerate(answer["output"]):
        parts = _text_events(item) if item["type"] == "message" else _call_events(item)
        for data in parts:
            yield {**data, "output_index": index}
    yield {"type": f"response.{answer['status']}", "response": answer}


def _text_events(item: Json) -> Iterator[Json]:
    [part] = item["content"]
    at: dict[str, Any] = {"item_id": item["id"], "content_index": 0}
    yield {"type": "response.output_item.added", "item": {**item, "status": "in_progress", "content": []}}
    yield {"type": "response.content_part.added", **at, "part": {**part, "text": ""}}
    yield {"type": "response.output_text.delta", **at, "delta": part["text"], "logprobs": []}
    yield {"type": "response.output_text.done", **at, "text": part["text"], "logprobs": []}
    yield {"type": "response.content_part.done", **at, "part": part}
    yield {"type": "response.output_item.done", "item": item}


def _call_events(item: Json) -> Iterator[Json]:
    at = {"item_id": item["id"]}
    yield {"type": "response.output_item.added", "item": {**item, "status": "in_progress", "arguments": ""}}
    yield {"type": "response.function_call_arguments.delta", **at, "delta": item["arguments"]}
    yield {"type": "response.function_call_arguments.done", **at, "name": item["name"], "arguments": item["arguments"]}
    yield {"type": "response.output_item.done", "item": item}


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
