"""The HTTP face of the rollout service.

    data plane      POST /v1/rollouts, /v1/completions, /v1/chat/completions; GET /v1/models, /v1/workers
    control plane   POST /v1/session, /v1/rollouts/cancel, /v1/logprobs; POST and DELETE /v1/workers;
                    POST /v1/weights/announce, PUT /v1/weights/{version}, POST /v1/weights/{version}/commit:
                    with the bearer token, always; weights not of a session (header `rlx-session`) that was replaced
    GET /health     never needs one

Bodies are frames (`application/x-rlx`) or JSON; the token path reads and writes raw bytes, without pydantic.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from rlx.errors import RlxError, ServiceUnavailable
from rlx.rollout.auth import check_bearer
from rlx.rollout.http_errors import SESSION_HEADER, BodyTooLarge, UnsupportedBody, error_body, status_of
from rlx.rollout.service import RolloutService
from rlx.wire import CONTENT_TYPE, GroupRequest, WeightManifest, WireError, decode_frame, encode_frame

MAX_BODY_BYTES = 64 * 2**20
_JSON = "application/json"
T = TypeVar("T")


def create_app(service: RolloutService, token: str | None, require_token_for_data: bool) -> FastAPI:
    """The app around `service`. `token` opens the control plane; also the data plane when that needs it."""

    async def with_token(request: Request) -> None:
        check_bearer(request.headers.get("authorization"), token)

    app = FastAPI(title="rlx rollout service", docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(_data_plane(service), dependencies=[Depends(with_token)] if require_token_for_data else [])
    app.include_router(_control_plane(service), dependencies=[Depends(with_token)])
    app.add_api_route("/health", _health(service), methods=["GET"])
    app.add_exception_handler(RlxError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(Exception, _answer_bug)
    return app


def _health(service: RolloutService) -> Any:
    async def health() -> Response:
        ok, body = service.health()
        return _json(body, 200 if ok else 503)

    return health


def _data_plane(service: RolloutService) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.post("/rollouts")
    async def rollouts(request: Request) -> Response:
        kind, body = await _body(request)
        group = GroupRequest.decode(body) if kind == CONTENT_TYPE else GroupRequest.from_json(_object(body))
        result = await service.rollout(group)
        if _wants(request, kind) == CONTENT_TYPE:
            return Response(result.encode(), media_type=CONTENT_TYPE)
        return _json(result.to_json())

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        return await _openai(service, "completions", request)

    @router.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _openai(service, "chat/completions", request)

    @router.get("/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [{"id": service.model, "object": "model", "owned_by": "rlx"}]})

    @router.get("/workers")
    async def workers() -> Response:
        version, statuses = service.fleet.weight_version, [asdict(status) for status in service.fleet.statuses()]
        return _json({"weight_version": version, "instance": service.instance, "workers": statuses})

    return router


def _control_plane(service: RolloutService) -> APIRouter:
    async def of_this_session(request: Request) -> None:
        service.check_session(request.headers.get(SESSION_HEADER))

    router = APIRouter(prefix="/v1")
    router.include_router(_weights(service), dependencies=[Depends(of_this_session)])

    @router.post("/session")
    async def session(request: Request) -> Response:
        _, body = await _body(request)
        return _json(service.begin_session(_field(_object(body), "session", str)))

    @router.post("/rollouts/cancel")
    async def cancel(request: Request) -> Response:
        _, body = await _body(request)
        keys = _field(_object(body), "keys", list)
        if not all(isinstance(key, str) for key in keys):
            raise WireError("keys must be a list of strings")
        return _json({"cancelled": service.cancel(keys)})

    @router.post("/workers")
    async def add_workers(request: Request) -> Response:
        _, body = await _body(request)
        return _json({"names": service.add_workers(_field(_object(body), "count", int))})

    @router.delete("/workers/{name}")
    async def remove_worker(name: str) -> Response:
        service.remove_worker(name)
        return _json({"name": name})

    @router.post("/logprobs")
    async def logprobs(request: Request) -> Response:
        kind, body = await _body(request)
        head, ids = _logprobs_request(kind, body)
        answers = await service.prompt_logprobs(ids, head.get("worker"))
        if _wants(request, kind) == CONTENT_TYPE:
            return Response(encode_frame({"kind": "logprobs"}, answers), media_type=CONTENT_TYPE)
        return _json({"logprobs": {name: values.tolist() for name, values in answers.items()}})

    return router


def _weights(service: RolloutService) -> APIRouter:
    router = APIRouter()

    @router.post("/weights/announce")
    async def announce(request: Request) -> Response:
        _, body = await _body(request)
        service.check_serving()
        manifest = WeightManifest.from_json(_object(body))
        await service.weights.announce(manifest)
        return _json({"version": manifest.version})

    @router.put("/weights/{version:int}")
    async def receive(version: int, request: Request) -> Response:
        transfer_s = await service.weights.receive(version, request.stream())
        return _json({"version": version, "transfer_s": transfer_s})

    @router.post("/weights/{version:int}/commit")
    async def commit(version: int) -> Response:
        service.check_serving()
        return _json((await service.weights.commit(version)).to_json())

    return router


async def _openai(service: RolloutService, route: str, request: Request) -> Response:
    _, body = await _body(request)
    answer = await service.openai(route, _object(body))
    if not isinstance(answer, dict):
        return StreamingResponse(answer, media_type="text/event-stream")
    error = answer.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return _json(answer, code if isinstance(code, int) and 400 <= code < 600 else 500 if error else 200)


def _logprobs_request(kind: str, body: bytes) -> tuple[dict[str, Any], np.ndarray]:
    head, blocks = decode_frame(body) if kind == CONTENT_TYPE else (_object(body), {})
    try:
        ids = np.asarray(blocks["ids"] if blocks else head["ids"])
    except (KeyError, ValueError) as error:
        raise WireError('not a log-probability request: {"ids": [...], "worker": optional name} expected') from error
    if ids.ndim != 1 or ids.size < 2 or ids.dtype.kind != "i" or ids.min() < 0 or ids.max() >= 2**31:
        raise WireError("ids must be a list of at least two token ids, each from 0 to 2^31 - 1")
    return head, ids.astype(np.int32)


async def _body(request: Request) -> tuple[str, bytes]:
    """Content type and bytes. A type that a web page may send without being asked is refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (CONTENT_TYPE, _JSON):
        raise UnsupportedBody(f"the content type must be {_JSON} or {CONTENT_TYPE}, got {kind or 'none'}")
    parts, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise BodyTooLarge(f"a request may have {MAX_BODY_BYTES} bytes, this one has more")
        parts.append(chunk)
    return kind, b"".join(parts)


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WireError(f"the body must be a JSON object, got {type(value).__name__}")
    return value


def _field(body: dict[str, Any], name: str, kind: type[T]) -> T:
    value = body.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise WireError(f"{name!r} must be a {kind.__name__}, got {value!r:.100}")
    return value


def _wants(request: Request, kind: str) -> str:
    """The form of the answer: what `Accept` names, else that of the request."""
    accept = request.headers.get("accept", "")
    return next((form for form in (CONTENT_TYPE, _JSON) if form in accept), kind)


def _json(body: Any, status: int = 200) -> Response:
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
    return _json(error_body(error), status_of(error))


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _json({"error": {"type": "ServiceError", "message": message}}, error.status_code)


async def _answer_nobody(_: Request, error: Exception) -> Response:
    """The client went away while it sent: nobody reads this."""
    return _json(error_body(ServiceUnavailable("the client went away")), 400)


async def _answer_bug(_: Request, error: Exception) -> Response:
    """A defect of the service; uvicorn logs its traceback."""
    message = f"the rollout service has a defect, its log has the traceback: {type(error).__name__}: {error}"
    return _json({"error": {"type": "ServiceError", "message": message}}, 500)
