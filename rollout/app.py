"""The HTTP face of the rollout service.

    data plane      POST /v1/rollouts, /v1/completions, /v1/chat/completions; GET /v1/models, /v1/workers
    control plane   POST /v1/session, /v1/rollouts/cancel, /v1/logprobs; POST and DELETE /v1/workers;
                    POST /v1/weights/announce, PUT /v1/weights/{version}, POST /v1/weights/{version}/commit;
                    POST /v1/observations: with the bearer token, always
    for people      GET /metrics; GET / and /view/...: the run's page (`rlx.view`). All but the page itself need the
                    token where the data plane does, and a loopback name in the URL where not
    GET /health     never needs one

A request that names its session (header `rlx-session`) is refused when another one took over, or when this process was
never told of it. Bodies, errors and the token are `http_bodies.py`'s.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from rlx.errors import WeightSyncError, WireError
from rlx.frame import CONTENT_TYPE, decode_frame, encode_frame
from rlx.rollout.group_app import GroupApp
from rlx.rollout.http_bodies import (
    field,
    for_readers,
    json_object,
    json_response,
    of_session,
    read_body,
    wanted,
    with_token,
)
from rlx.rollout.http_errors import SESSION_HEADER
from rlx.rollout.manifest import Offer, WeightManifest
from rlx.rollout.metrics import exposition
from rlx.rollout.observations import MAX_OBSERVATIONS_BYTES
from rlx.rollout.service import RolloutService
from rlx.view.app import view_router


def create_app(service: RolloutService, token: str | None, require_token_for_data: bool) -> FastAPI:
    """The app around `service`. `token` opens the control plane; also the data plane when that needs it."""
    guarded = [Depends(with_token(token))]
    check_data = [with_token(token)] if require_token_for_data else []
    app = GroupApp("rlx rollout service", service.rollout, [*check_data, of_session(service.check_session)])
    app.include_router(_data_plane(service), dependencies=[Depends(check) for check in check_data])
    app.include_router(_control_plane(service), dependencies=guarded)
    reader = for_readers(token, require_token_for_data)
    app.include_router(_metrics(service), dependencies=[Depends(reader)])
    app.include_router(view_router([service.observations.store], authorize=reader))
    app.add_api_route("/health", _health(service), methods=["GET"])
    return app


def _health(service: RolloutService) -> Any:
    async def health() -> Response:
        ok, body = service.health()
        return json_response(body, 200 if ok else 503)

    return health


def _data_plane(service: RolloutService) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        return await _openai(service, "completions", request)

    @router.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _openai(service, "chat/completions", request)

    @router.get("/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [{"id": service.model, "object": "model", "owned_by": "rlx"}]})

    @router.get("/workers")
    async def workers() -> Response:
        answer = {
            "weight_version": service.fleet.weight_version,
            "instance": service.instance,
            "waiting": service.router.waiting_completions,
            "workers": [asdict(status) for status in service.workers()],
        }
        return json_response(answer)

    return router


def _metrics(service: RolloutService) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        body, content_type = await exposition(service, request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    return router


def _control_plane(service: RolloutService) -> APIRouter:
    router = APIRouter(prefix="/v1")
    router.include_router(_weights(service))

    @router.post("/observations", dependencies=[Depends(of_session(service.check_session))])
    async def observations(request: Request) -> Response:
        return json_response(service.observations.add(await _of_session(service, request, MAX_OBSERVATIONS_BYTES)))

    @router.post("/session")
    async def session(request: Request) -> Response:
        _, body = await read_body(request)
        return json_response(service.begin_session(field(json_object(body), "session", str)))

    @router.post("/rollouts/cancel")
    async def cancel(request: Request) -> Response:
        _, body = await read_body(request)
        keys = field(json_object(body), "keys", list)
        if not all(isinstance(key, str) for key in keys):
            raise WireError("keys must be a list of strings")
        return json_response({"cancelled": service.cancel(keys)})

    @router.post("/workers")
    async def add_workers(request: Request) -> Response:
        _, body = await read_body(request)
        return json_response({"names": service.add_workers(field(json_object(body), "count", int))})

    @router.delete("/workers/{name}")
    async def remove_worker(name: str) -> Response:
        service.remove_worker(name)
        return json_response({"name": name})

    @router.post("/logprobs")
    async def logprobs(request: Request) -> Response:
        kind, body = await read_body(request)
        head, ids = _logprobs_request(kind, body)
        answers = await service.prompt_logprobs(ids, head.get("worker"))
        if wanted(request, kind) == CONTENT_TYPE:
            return Response(encode_frame({"kind": "logprobs"}, answers), media_type=CONTENT_TYPE)
        return json_response({"logprobs": {name: values.tolist() for name, values in answers.items()}})

    return router


def _weights(service: RolloutService) -> APIRouter:
    router = APIRouter(dependencies=[Depends(of_session(service.check_session))])

    @router.post("/weights/announce")
    async def announce(request: Request) -> Response:
        announced = await _of_session(service, request)
        service.check_serving()
        offer = Offer.from_json(announced["offer"]) if announced.get("offer") else None
        manifest = WeightManifest.from_json(announced)
        taken_over = await service.weights.announce(manifest, offer)
        return json_response({"version": manifest.version, "taken_over": taken_over})

    @router.put("/weights/{version:int}")
    async def receive(version: int, request: Request) -> Response:
        try:
            transfer_s = await service.weights.receive(version, request.stream())
        except WeightSyncError:  # also of an update that another learner's session has ended meanwhile
            service.check_session(request.headers.get(SESSION_HEADER))
            raise
        return json_response({"version": version, "transfer_s": transfer_s})

    @router.post("/weights/{version:int}/commit")
    async def commit(version: int) -> Response:
        service.check_serving()
        return json_response((await service.weights.commit(version)).to_json())

    return router


class _Lines(StreamingResponse):
    """Closes what it streams, also when its reader leaves while it is written to: the worker is charged until then."""

    body_iterator: AsyncGenerator[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()


async def _of_session(service: RolloutService, request: Request, most: int | None = None) -> dict[str, Any]:
    """The JSON body; another learner may have begun its session while it came."""
    _, body = await read_body(request, most)
    service.check_session(request.headers.get(SESSION_HEADER))
    return json_object(body)


async def _openai(service: RolloutService, route: str, request: Request) -> Response:
    _, body = await read_body(request)
    answer = await service.openai(route, json_object(body))
    if not isinstance(answer, dict):
        return _Lines(answer, media_type="text/event-stream")
    error = answer.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return json_response(answer, code if isinstance(code, int) and 400 <= code < 600 else 500 if error else 200)


def _logprobs_request(kind: str, body: bytes) -> tuple[dict[str, Any], np.ndarray]:
    head, blocks = decode_frame(body) if kind == CONTENT_TYPE else (json_object(body), {})
    try:
        ids = np.asarray(blocks["ids"] if blocks else head["ids"])
    except (KeyError, ValueError) as error:
        raise WireError('not a log-probability request: {"ids": [...], "worker": optional name} expected') from error
    if ids.ndim != 1 or ids.size < 2 or ids.dtype.kind != "i" or ids.min() < 0 or ids.max() >= 2**31:
        raise WireError("ids must be a list of at least two token ids, each from 0 to 2^31 - 1")
    return head, ids.astype(np.int32)
