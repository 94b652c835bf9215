"""Bodies, errors and the token of an HTTP app of ours: what the gateway and the workers' own endpoints share.

Bodies are frames (`application/x-rlx`) or JSON; the token path reads and writes raw bytes, without pydantic.
"""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from rlx.errors import RlxError, ServiceUnavailable, WireError
from rlx.frame import CONTENT_TYPE
from rlx.hosts import is_loopback
from rlx.rollout.auth import Unauthorized, check_bearer
from rlx.rollout.http_errors import SESSION_HEADER, BodyTooLarge, UnsupportedBody, error_body, status_of
from rlx.wire import GroupRequest, GroupResult

MAX_BODY_BYTES = 64 * 2**20
_JSON = "application/json"
T = TypeVar("T")


def with_token(token: str | None) -> Callable[[Request], Awaitable[None]]:
    """A dependency that lets only requests with the bearer token in."""

    async def check(request: Request) -> None:
        check_bearer(request.headers.get("authorization"), token)

    return check


def for_readers(token: str | None, needs_token: bool) -> Callable[[Request], Awaitable[None]]:
    """A dependency for what people and their tools read: with the token, or, where none is needed, by a loopback name,
    so that no web page can lead its own name to this machine and read along."""

    async def by_loopback_name(request: Request) -> None:
        name = request.url.hostname
        if not is_loopback(name):
            raise Unauthorized(f"this is read by a loopback name, as http://127.0.0.1, not {name!r:.100}")

    return with_token(token) if needs_token else by_loopback_name


def of_session(check: Callable[[str | None], None]) -> Callable[[Request], Awaitable[None]]:
    """A dependency that gives `check` the session which the request names, None where it names none."""

    async def dependency(request: Request) -> None:
        check(request.headers.get(SESSION_HEADER))

    return dependency


def answer_errors(app: FastAPI) -> None:
    """Errors in the form of `http_errors`."""
    for kind, answer in _ANSWERS.items():
        app.add_exception_handler(kind, answer)


async def answer_of_error(request: Request, error: Exception) -> tuple[Response, bool]:
    """The same without an app; and whether it is known, no defect of ours."""
    kind = next(kind for kind in _ANSWERS if isinstance(error, kind))
    return await _ANSWERS[kind](request, error), kind is not Exception


async def answer_group(request: Request, rollout: Callable[[GroupRequest], Awaitable[GroupResult]]) -> Response:
    """POST /v1/rollouts: the group of the body, in the form that is wanted."""
    kind, body = await read_body(request)
    group = GroupRequest.decode(body) if kind == CONTENT_TYPE else GroupRequest.from_json(json_object(body))
    result = await rollout(group)
    if wanted(request, kind) == CONTENT_TYPE:
        return Response(result.encode(), media_type=CONTENT_TYPE)
    return json_response(result.to_json())


async def read_body(request: Request, most: int | None = None) -> tuple[str, bytes]:
    """Content type and bytes, at most `most` (MAX_BODY_BYTES). A type that a web page may send without being asked is
    refused."""
    most = MAX_BODY_BYTES if most is None else most
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (CONTENT_TYPE, _JSON):
        raise UnsupportedBody(f"the content type must be {_JSON} or {CONTENT_TYPE}, got {kind or 'none'}")
    parts, size, more = [], 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise BodyTooLarge(f"a request to {request.url.path} may have {most} bytes, this one has more")
        more = message.get("more_body", False)
    return kind, b"".join(parts)


def json_object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WireError(f"the body must be a JSON object, got {type(value).__name__}")
    return value


def field(body: dict[str, Any], name: str, kind: type[T]) -> T:
    if name not in body:
        raise WireError(f"the field {name!r} is missing, a {kind.__name__}")
    value = body[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise WireError(f"{name!r} must be a {kind.__name__}, got {value!r:.100}")
    return value


def wanted(request: Request, kind: str) -> str:
    """The form of the answer: what `Accept` names, else that of the request."""
    accept = request.headers.get("accept", "")
    return next((form for form in (CONTENT_TYPE, _JSON) if form in accept), kind)


def json_response(body: Any, status: int = 200) -> Response:
    return Response(json.dumps(_finite(body), allow_nan=False), status, media_type=_JSON)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


async def _answer_error(_: Request, error: Exception) -> Response:
    return json_response(error_body(error), status_of(error))


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return json_response({"error": {"type": "ServiceError", "message": message}}, error.status_code)


async def _answer_nobody(_: Request, error: Exception) -> Response:
    """The client went away while it sent: nobody reads this."""
    return json_response(error_body(ServiceUnavailable("the client went away")), 400)


async def _answer_bug(_: Request, error: Exception) -> Response:
    """A defect of the service; uvicorn logs its traceback."""
    message = f"the rollout service has a defect, its log has the traceback: {type(error).__name__}: {error}"
    return json_response({"error": {"type": "ServiceError", "message": message}}, 500)


_ANSWERS: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    RlxError: _answer_error,
    HTTPException: _answer_http_error,
    ClientDisconnect: _answer_nobody,
    Exception: _answer_bug,
}
