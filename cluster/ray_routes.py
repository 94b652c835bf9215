"""Where Ray's dashboard and metrics endpoints are, on the gateway: for `rlx dashboard` and for Prometheus, which asks again
and again and so finds a service that was started anew."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import ray
from fastapi import APIRouter, Depends, FastAPI, Request

from rlx.cluster.ray_runtime import RayRuntime

_TIMEOUT_S = 10.0
_DISCOVERY = "prom_metrics_service_discovery.json"


def add_ray_routes(app: FastAPI, runtime: RayRuntime, reader: Callable[[Request], Awaitable[None]]) -> None:
    """GET /v1/ray: `{"dashboard": its URL, "session": Ray's folder}`, each empty without one. GET /v1/ray/targets: Ray's
    endpoints, as http_sd wants them; none while Ray starts. `reader` lets callers in."""
    router = APIRouter(prefix="/v1/ray", dependencies=[Depends(reader)])

    @router.get("")
    async def about() -> dict[str, str]:
        return {"dashboard": runtime.dashboard_url, "session": runtime.session_dir}

    @router.get("/targets")
    async def targets() -> Any:
        async with asyncio.timeout(_TIMEOUT_S):
            return await asyncio.to_thread(ray_targets, runtime.session_dir)

    app.include_router(router)


def ray_targets(session: str) -> list[dict[str, Any]]:
    """Those of the file that Ray's head node keeps beside its folder `session`; on another node the agents of all."""
    if not session:
        return []
    try:
        found: list[dict[str, Any]] = json.loads((Path(session).parent / _DISCOVERY).read_text())
    except (FileNotFoundError, ValueError):  # not the head's machine, or being written
        alive = [node for node in ray.nodes() if node["Alive"]]
        targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in alive]
        found = [{"labels": {"job": "ray"}, "targets": targets}]
    return found
