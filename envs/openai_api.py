"""The endpoint through which agents that speak the OpenAI API are trained: one server on loopback, an address on it
and a key per episode.

    agent --HTTP, its key--> Endpoint --> Rollout.reply / generate of that episode --> the same tape as native functions

A conversation that goes on continues its training row; another one (a sub-agent, a rewritten context) opens a row.
Here: keys, requests, deadlines, errors. Not here: the shapes (`openai_shapes`, `openai_responses`).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from rlx.envs import openai_responses as responses
from rlx.envs import openai_shapes as shapes
from rlx.envs.errors import EpisodeTruncated
from rlx.envs.openai_shapes import Json, Refused
from rlx.envs.rollout import Rollout
from rlx.errors import RlxError, UserCodeError
from rlx.rollout.gateway import bind, serving

MAX_BODY_BYTES = 16 * 2**20
KEEP_ALIVE_S = 5.0
"""Seconds without an answer after which a stream begins with a comment, and between comments."""
_HOST = "127.0.0.1"


@dataclass(frozen=True)
class OpenAIEndpoint:
    """Where the agent of one episode finds its model. The model's name is the agent's to choose."""

    base_url: str
    api_key: str

    @property
    def env(self) -> dict[str, str]:
        """For agents that run as a process of their own: the variables that OpenAI's clients read."""
        return {"OPENAI_BASE_URL": self.base_url, "OPENAI_API_KEY": self.api_key}


class Endpoint:
    """Serves the episodes that are registered, inside the running event loop. `model` is what /v1/models tells."""

    def __init__(self, model: str):
        self._model = model
        self._episodes: dict[str, _Episode] = {}
        """By key"""
        self._numbers = itertools.count(1)
        self._stack = AsyncExitStack()
        self._url = ""

    async def start(self) -> None:
        """Listen on a free port of loopback; the process's HTTP clients are told to use no proxy for it."""
        _bypass_proxies()
        self._url = await self._stack.enter_async_context(serving(self._app(), bind(_HOST, 0)))

    async def close(self) -> None:
        """Cancel what is running and stop listening."""
        for episode in list(self._episodes.values()):
            self.unregister(episode.ctx)
        await self._stack.aclose()

    def register(self, ctx: Rollout) -> OpenAIEndpoint:
        """An address and a key for the agent of `ctx`; the same when asked again."""
        if not self._url:
            raise RuntimeError("the endpoint is not started")
        key = next(iter(self._keys_of(ctx)), None)
        if key is None:
            key = f"rlx-{secrets.token_urlsafe(24)}"
            self._episodes[key] = _Episode(ctx, next(self._numbers))
        return OpenAIEndpoint(f"{self._url}/{self._episodes[key].number}/v1", key)

    def unregister(self, ctx: Rollout) -> None:
        """The episode has ended: its requests are cancelled, its key is worth nothing from now on."""
        for key in self._keys_of(ctx):
            self._episodes.pop(key).end()

    def _keys_of(self, ctx: Rollout) -> list[str]:
        episodes = list(self._episodes.items())  # at once: another episode may be registering in a thread
        return [key for key, episode in episodes if episode.ctx is ctx]

    def _app(self) -> FastAPI:
        app = FastAPI(title="rlx episode endpoint", docs_url=None, redoc_url=None, openapi_url=None)
        for path, job in (("chat/completions", _chat), ("completions", _text), ("responses", _responses)):
            app.add_route(f"/{{number:int}}/v1/{path}", self._route(job), methods=["POST"])
        app.add_route("/{number:int}/v1/models", self._models, methods=["GET"])
        app.add_route("/{number:int}/v1/models/{model:path}", self._one_model, methods=["GET"])
        app.add_exception_handler(HTTPException, _answer_http_error)
        app.add_exception_handler(Refused, _answer_refused)
        app.add_exception_handler(ClientDisconnect, _answer_nobody)
        return app

    def _episode(self, request: Request) -> _Episode:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        episode = self._episodes.get(key.strip()) if scheme.lower() == "bearer" else None
        if episode is None or episode.number != request.path_params["number"]:
            raise _no_episode()
        return episode

    def _route(self, job: Callable[[Any], _Job]) -> Callable[[Request], Awaitable[Response]]:
        async def route(request: Request) -> Response:
            self._episode(request)
            asked = job(await _body(request))
            return await _answer(request, self._episode(request), asked)  # it may have ended meanwhile

        return route

    async def _models(self, request: Request) -> Response:
        self._episode(request)
        return JSONResponse({"object": "list", "data": [self._model_json(self._model)]})

    async def _one_model(self, request: Request) -> Response:
        self._episode(request)
        return JSONResponse(self._model_json(request.path_params["model"]))

    def _model_json(self, name: str) -> Json:
        return {"id": name, "object": "model", "created": 0, "owned_by": "rlx"}


class _Episode:
    """One address and key: their rollout, and the requests that run."""

    def __init__(self, ctx: Rollout, number: int):
        self.ctx, self.number = ctx, number
        self.texts = shapes.TextPrompts(ctx.chat.tokenizer)
        self.conversations: dict[str, list[Json]] = {}
        """Of /v1/responses, by the id of the response that they end with."""
        self._running: set[asyncio.Task[Json]] = set()

    def token(self, token_id: int) -> str:
        return str(self.ctx.chat.tokenizer.decode([token_id]))

    def begin(self, job: _Job) -> asyncio.Task[Json]:
        """Work on `job` until the deadline of the episode. The task raises Refused, whatever goes wrong."""
        task = asyncio.create_task(self._bounded(job))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def end(self) -> None:
        for task in self._running:
            task.cancel()

    async def _bounded(self, job: _Job) -> Json:
        scope = asyncio.timeout(self.ctx.deadline - time.monotonic())
        try:
            async with scope:
                return await job.work(self)
        except Refused:
            raise
        except EpisodeTruncated as error:
            self.ctx.fail(error)
            raise Refused(str(error), 400, "context_length_exceeded") from error
        except UserCodeError as error:  # the chat template does not render these messages
            raise Refused(str(error), 400) from error
        except Exception as error:  # whatever it is, an agent that swallows the answer must not hide it
            if isinstance(error, TimeoutError) and scope.expired():
                raise Refused("the episode has reached its deadline", 504, "timeout") from None
            self.ctx.fail(error)
            raise Refused(f"{type(error).__name__}: {error}", 503 if isinstance(error, RlxError) else 500) from error


@dataclass(frozen=True)
class _Job:
    """One request: what it does in its episode, and its answer as the events of a stream."""

    stream: bool
    work: Callable[[_Episode], Awaitable[Json]]
    events: Callable[[Json], Iterator[str]]


def _chat(body: Any) -> _Job:
    request = shapes.read(shapes.ChatRequest, body)
    messages, tools = shapes.messages_of(request.messages), shapes.tools_of(request.tools)

    async def work(episode: _Episode) -> Json:
        turn = await episode.ctx.reply(messages, tools, **request.sampling)
        return shapes.chat_answer(request, turn, episode.token)

    return _Job(bool(request.stream), work, lambda answer: shapes.chat_events(answer, request.usage_in_stream))


def _text(body: Any) -> _Job:
    request = shapes.read(shapes.TextRequest, body)

    async def work(episode: _Episode) -> Json:
        ids = episode.texts.ids(request.prompt)
        turn = await episode.ctx.generate(ids, **request.sampling)
        episode.texts.remember(request.prompt, ids, turn.ids.tolist())
        return shapes.text_answer(request, turn, episode.token)

    return _Job(bool(request.stream), work, lambda answer: shapes.text_events(answer, request.usage_in_stream))


def _responses(body: Any) -> _Job:
    request = shapes.read(responses.ResponsesRequest, body)
    new, tools = responses.messages_of_input(request.input), request.chat_tools
    system = [{"role": "system", "content": request.instructions}] if request.instructions else []

    async def work(episode: _Episode) -> Json:
        before = episode.conversations.get(request.previous_response_id or "")
        if before is None and request.previous_response_id:
            raise Refused(f"previous_response_id: there is no {request.previous_response_id!r} in this episode", 404)
        messages = [*(before or []), *new]
        turn = await episode.ctx.reply([*system, *messages], tools, **request.sampling)
        answer = responses.response_answer(request, turn)
        episode.conversations[answer["id"]] = [*messages, turn.message]
        return answer

    return _Job(bool(request.stream), work, responses.response_events)


async def _answer(request: Request, episode: _Episode, job: _Job) -> Response:
    """The answer of `job`; a stream that waits longer than KEEP_ALIVE_S for it begins without. Nobody is answered
    when the agent hangs up: its sampling is cancelled."""
    task = episode.begin(job)
    gone = asyncio.create_task(_hung_up(request))
    try:
        patience = KEEP_ALIVE_S if job.stream else None
        await asyncio.wait({task, gone}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            answer = _result(task)
            return _Stream(task, job) if job.stream else JSONResponse(answer)
        if job.stream and not gone.done():
            return _Stream(task, job)
        task.cancel()
        return Response(status_code=499)
    finally:
        gone.cancel()


def _result(task: asyncio.Task[Json]) -> Json:
    if task.cancelled():
        raise _no_episode()
    return task.result()


class _Stream(StreamingResponse):
    """The events of the answer, comments while it is sampled."""

    def __init__(self, task: asyncio.Task[Json], job: _Job):
        super().__init__(self._events(task, job), media_type="text/event-stream")
        self._task = task

    async def __call__(self, *asgi: Any) -> None:
        try:
            await super().__call__(*asgi)
        finally:
            self._task.cancel()

    async def _events(self, task: asyncio.Task[Json], job: _Job) -> AsyncIterator[str]:
        try:
            while not (await asyncio.wait({task}, timeout=KEEP_ALIVE_S))[0]:
                yield ": the reply is being sampled\n\n"
            for event in job.events(_result(task)):
                yield event
        except Refused as error:
            yield shapes.event(shapes.error_body(str(error), error.status, error.code))


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> Any:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise Refused(f"the body is larger than {MAX_BODY_BYTES} bytes", 413)
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {error}") from None


def _no_episode() -> Refused:
    return Refused(
        "the key belongs to no running episode at this address: one of them is wrong, or the episode has ended",
        401,
        "invalid_api_key",
    )


def _error(message: str, status: int, code: str | None = None) -> Response:
    # Another try cannot go better: sampling again is the framework's business, at the level of episodes.
    return JSONResponse(shapes.error_body(message, status, code), status, {"x-should-retry": "false"})


async def _answer_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _error(str(error), error.status, error.code)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(f"{request.method} {request.url.path}: {error.detail}", error.status_code)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


def _bypass_proxies() -> None:
    hosts = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if _HOST not in hosts.split(","):
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{hosts},{_HOST}".lstrip(",")
