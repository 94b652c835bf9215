"""Chat and text completions in OpenAI's shapes: requests read into what a Rollout takes, turns written as answers.

The chunks of a stream are cut from the finished answer, so that both say the same. Here too: the errors. Not here:
HTTP and the episodes (`openai_api`), `/v1/responses` (`openai_responses`).
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator

from rlx.envs.messages import whole
from rlx.envs.rollout import ToolCall, Turn
from rlx.errors import RlxError

Json = dict[str, Any]

DONE = "data: [DONE]\n\n"
_ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_TEXT_PARTS = ("text", "input_text", "output_text")
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "top_logprobs": (0,), "presence_penalty": (0,), "frequency_penalty": (0,),
    "logit_bias": ({},), "functions": ([],), "function_call": ("none",), "audio": (), "modalities": (["text"],),
    "response_format": ({"type": "text"},), "echo": (False,),
    "suffix": ("",), "background": (False,), "conversation": (), "prompt_cache_options": (),
}  # fmt: skip
"""Fields that would change the reply, and the values beside null that ask for nothing. Fields that change nothing
(`user`, `metadata`, `store`, `seed`, ...) are ignored."""


class Refused(RlxError):
    """A request that the endpoint does not serve, as HTTP `status`; `code` as OpenAI's clients know it."""

    def __init__(self, message: str, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


def error_body(message: str, status: int, code: str | None = None) -> Json:
    """OpenAI's error object."""
    kind = "server_error" if status >= 500 else "authentication_error" if status == 401 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Request(BaseModel):
    """What all routes read. `temperature` and `top_p` are checked and not used: the run's own hold."""

    model: str = ""
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    stream: bool | None = None
    tools: list[Json] | None = None
    tool_choice: Literal["none", "auto"] | None = None


class _Completion(Request):
    max_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    stream_options: Json | None = None

    @property
    def usage_in_stream(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))

    @property
    def sampling(self) -> Json:
        """The fields of Sampling that the request sets."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return given(max_tokens=self.max_tokens, stop=stop or None)


class ChatRequest(_Completion):
    """POST /v1/chat/completions"""

    messages: list[Json] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None

    @property
    def sampling(self) -> Json:
        return super().sampling | given(max_tokens=self.max_completion_tokens)


class TextRequest(_Completion):
    """POST /v1/completions. `prompt` is text or token ids."""

    prompt: str | list[int]
    logprobs: int | None = Field(None, ge=0, le=1)

    @field_validator("prompt", mode="before")
    @classmethod
    def one_prompt(cls, value: Any) -> Any:
        return value[0] if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], int) else value


R = TypeVar("R", bound=Request)


def read(kind: type[R], body: Any) -> R:
    """The request in a JSON body; Refused with the field that is wrong or that cannot be served."""
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    for name, values in _ONLY.items():
        if (value := body.get(name)) is not None and value not in values:
            raise Refused(f"{name}: {json.dumps(value)[:200]} is not supported here; remove it")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise Refused(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def tools_of(items: list[Json] | None) -> list[Json] | None:
    """Functions that the policy may call, as chat templates take them; None for no tools."""
    for i, item in enumerate(items or ()):
        function = item.get("function")
        if (
            item.get("type") != "function"
            or not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
        ):
            raise Refused(f"tools.{i}: only functions with a name are supported, not {item.get('type')!r}")
    return items or None


def messages_of(items: list[Json]) -> list[Json]:
    """Chat messages as chat templates take them: contents are strings, arguments of tool calls objects."""
    return [_message(item, f"messages.{i}") for i, item in enumerate(items)]


def text_of(content: Any, where: str) -> str:
    """A content: a string, a list of text parts, or nothing."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise Refused(f"{where}: a string or a list of text parts is expected")
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise Refused(f"{where}: a part of type {kind!r} is not supported; the model reads text only")
    return "".join(part["text"] for part in content)


def tool_call(call_id: Any, name: Any, arguments: Any, where: str) -> Json:
    """A tool call of an assistant message; arguments that are no JSON object stay a string."""
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise Refused(f"{where}: a tool call needs `name` and `arguments`, both strings")
    try:
        parsed = json.loads(arguments)
    except ValueError:
        parsed = None
    function = {"name": name, "arguments": parsed if isinstance(parsed, dict) else arguments}
    return {"id": call_id, "type": "function", "function": function}


def _message(item: Json, where: str) -> Json:
    role = _ROLES.get(str(item.get("role")))
    if role is None:
        raise Refused(f"{where}.role: {item.get('role')!r} is not supported; write one of {', '.join(_ROLES)}")
    message: Json = {"role": role, "content": text_of(item.get("content"), f"{where}.content")}
    if calls := item.get("tool_calls"):
        if not isinstance(calls, list):
            raise Refused(f"{where}.tool_calls: a list is expected")
        message["tool_calls"] = [_tool_call(call, f"{where}.tool_calls") for call in calls]
    return message | given(name=item.get("name"), tool_call_id=item.get("tool_call_id"))


def _tool_call(call: Any, where: str) -> Json:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise Refused(f"{where}: only calls of type function are supported")
    return tool_call(call.get("id"), function.get("name"), function.get("arguments"), where)


class TextPrompts:
    """Prompts that are text. What was sampled in this episode is not tokenised again where a prompt begins with it."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._known: list[tuple[str, list[int]]] = []

    def ids(self, prompt: str | list[int]) -> list[int]:
        """Token ids [P] of `prompt`. Special tokens in its text are special tokens, as in vLLM's own server."""
        if not isinstance(prompt, str):
            return prompt
        begins = [(text, ids) for text, ids in self._known if prompt.startswith(text)]
        text, ids = max(begins, key=lambda known: len(known[0]), default=("", []))
        return [*ids, *self._tokenizer.encode(whole(prompt[len(text) :]), add_special_tokens=not ids)]

    def remember(self, prompt: str | list[int], ids: list[int], sampled: list[int]) -> None:
        """`sampled` came after `prompt`, whose ids are `ids`. The next prompt may or may not repeat the end marker."""
        if isinstance(prompt, str):
            self._known.append((prompt + self._tokenizer.decode(sampled), ids + sampled))
            if sampled and sampled[-1] in self._tokenizer.all_special_ids:
                self._known.append((prompt + self._tokenizer.decode(sampled[:-1]), ids + sampled[:-1]))


def chat_answer(request: ChatRequest, turn: Turn, token: Callable[[int], str]) -> Json:
    """The answer to `request`. `token` gives the text of a token id."""
    calls = () if request.tool_choice == "none" else turn.tool_calls
    content = turn.message.get("content") or ""
    message: Json = {"role": "assistant", "content": None if calls and not content else content}
    if calls:
        message["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": arguments_of(c)}} for c in calls
        ]
    logprobs = {"content": [_logprob(token(int(i)), float(x)) for i, x in zip(turn.ids, turn.logprobs, strict=True)]}
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": "tool_calls" if calls and turn.finish_reason == "stop" else turn.finish_reason,
        "logprobs": logprobs if request.logprobs else None,
    }
    return _answer("chat.completion", "chatcmpl", request, choice, _usage(turn))


def text_answer(request: TextRequest, turn: Turn, token: Callable[[int], str]) -> Json:
    """The answer to `request`, with the text of the turn as it was sampled."""
    logprobs = {
        "tokens": [token(int(i)) for i in turn.ids],
        "token_logprobs": [float(x) for x in turn.logprobs],
        "top_logprobs": None,
        "text_offset": [],
    }
    choice = {
        "index": 0,
        "text": turn.text,
        "finish_reason": turn.finish_reason,
        "logprobs": None if request.logprobs is None else logprobs,
    }
    return _answer("text_completion", "cmpl", request, choice, _usage(turn))


def chat_events(answer: Json, with_usage: bool) -> Iterator[str]:
    """`answer` as the server-sent events of a stream."""
    [choice] = answer["choices"]
    message = choice["message"]
    deltas: list[Json] = [{"role": "assistant", "content": ""}]
    if message["content"]:
        deltas.append({"content": message["content"]})
    deltas += [{"tool_calls": [{"index": i, **call}]} for i, call in enumerate(message.get("tool_calls", ()))]
    parts: list[Json] = [{"delta": delta, "finish_reason": None, "logprobs": None} for delta in deltas]
    parts[-1]["logprobs"] = choice["logprobs"]
    parts.append({"delta": {}, "finish_reason": choice["finish_reason"], "logprobs": None})
    yield from _chunks(answer, "chat.completion.chunk", parts, with_usage)


def text_events(answer: Json, with_usage: bool) -> Iterator[str]:
    """`answer` as the server-sent events of a stream."""
    yield from _chunks(answer, "text_completion", answer["choices"], with_usage)


def arguments_of(call: ToolCall) -> str:
    """The arguments of a call as OpenAI's clients take them: JSON, or what the model wrote where it is none."""
    return call.raw if call.arguments is None else json.dumps(call.arguments, ensure_ascii=False)


def given(**fields: Any) -> Json:
    """The fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def event(data: Mapping[str, Any], name: str | None = None) -> str:
    """One server-sent event."""
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _usage(turn: Turn) -> Json:
    prompt, sampled = turn.num_prompt_tokens, len(turn.ids)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def _logprob(text: str, logprob: float) -> Json:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}


def _answer(kind: str, prefix: str, request: Request, choice: Json, usage: Json) -> Json:
    head = {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time())}
    return {**head, "model": request.model, "choices": [choice], "usage": usage}


def _chunks(answer: Json, kind: str, parts: list[Json], with_usage: bool) -> Iterator[str]:
    head = {name: answer[name] for name in ("id", "created", "model")} | {"object": kind}
    head |= {"usage": None} if with_usage else {}
    for part in parts:
        yield event({**head, "choices": [{**part, "index": 0}]})
    if with_usage:
        yield event({**head, "choices": [], "usage": answer["usage"]})
    yield DONE
