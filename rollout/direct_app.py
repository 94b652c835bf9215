"""The HTTP of the direct token path: POST /v1/rollouts of a worker, POST /v1/routes of the gateway.

Who may call is the same as for the gateway's data plane: with the bearer token on any address but loopback.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import Depends, FastAPI, Request, Response

from rlx.errors import WireError
from rlx.rollout.direct import Leases, WorkerGroups
from rlx.rollout.group_app import GroupApp
from rlx.rollout.http_bodies import (
    json_object,
    json_response,
    of_session,
    read_body,
    with_token,
)
from rlx.wire import GroupRequest, Sampling


def worker_app(groups: WorkerGroups, token: str | None, require_token: bool) -> FastAPI:
    """The endpoint of one worker."""
    return GroupApp("rlx rollout worker", groups.rollout, [with_token(token)] if require_token else [])


def add_routes(app: FastAPI, leases: Leases, token: str | None, require_token: bool) -> None:
    """POST /v1/routes `{"groups": [{"key", "n", "prompt_tokens", "max_tokens", "deadline_s"}], "done": [keys]}` on the
    gateway's app; the answer is that of `Leases.route`."""

    guards = [Depends(of_session(leases.check_session)), *([Depends(with_token(token))] if require_token else [])]

    @app.post("/v1/routes", dependencies=guards)
    async def routes(request: Request) -> Response:
        body = json_object((await read_body(request))[1])
        groups, done = body.get("groups", []), body.get("done", [])
        if not isinstance(groups, list) or not isinstance(done, list):
            raise WireError("groups and done must be lists")
        return json_response(await leases.route([_group(entry) for entry in groups], done))


def _group(entry: Any) -> GroupRequest:
    """A request of the same size, without its content."""
    try:
        return GroupRequest(
            key=str(entry["key"]),
            prompt="",
            prompt_ids=np.zeros(int(entry["prompt_tokens"]), np.int32),
            num_generations=int(entry["n"]),
            sampling=Sampling(int(entry["max_tokens"])),
            deadline_s=float(entry["deadline_s"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(
            "each of groups must have key, n, prompt_tokens, max_tokens and deadline_s; got "
            f"{entry!r:.200} ({type(error).__name__}: {error})"
        ) from error
