"""The page over HTTP: static files, and JSON about the runs.

GET /                            the page; /view/page/NAME its parts
GET /view/runs                   names
GET /view/state?run=&...         what is new (`state.py`)
GET /view/samples?run=&...       one page of the list (`choose.py`)
GET /view/sample?run=&id=&...    one sample with its tokens (`detail.py`)
"""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any, Protocol

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from rlx.view.choose import Samples
from rlx.view.state import Seen

_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


class Run(Protocol):
    """LiveRun or FolderRun."""

    @property
    def name(self) -> str: ...

    @property
    def samples(self) -> Samples: ...

    def since(self, seen: Seen) -> dict[str, Any]: ...

    def tokenizer_places(self) -> Iterator[str]: ...


def view_app(runs: Sequence[Run]) -> FastAPI:
    """For `rlx view`: answers only who calls it by a loopback name, so that no other web page can read it."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(view_router(runs))
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    return app


def view_router(runs: Sequence[Run], authorize: Callable[[Request], Awaitable[None]] | None = None) -> APIRouter:
    """The page and its data. `authorize` guards the data; the page itself has none, and asks for the token."""
    router = APIRouter()
    guarded = APIRouter(prefix="/view", dependencies=[Depends(authorize)] if authorize is not None else [])
    parts = {part.name: part.read_bytes() for part in files("rlx.view").joinpath("page").iterdir() if part.is_file()}

    @router.get("/")
    async def page() -> Response:
        return _static(parts, "index.html")

    @router.get("/view/page/{name}")
    async def part(name: str) -> Response:
        return _static(parts, name)

    @guarded.get("/runs")
    async def names() -> Response:
        return _json([{"name": run.name} for run in runs])

    @guarded.get("/state")
    def state(run: int = 0, generation: str = "", metrics: int = 0, evaluations: int = 0, events: int = 0) -> Response:
        return _json(_run(runs, run).since(Seen(generation, metrics, evaluations, events)))

    router.include_router(guarded)
    return router


def _run(runs: Sequence[Run], number: int) -> Run:
    if not 0 <= number < len(runs):
        raise HTTPException(404, "there is no such run")
    return runs[number]


def _static(parts: dict[str, bytes], name: str) -> Response:
    if name not in parts:
        raise HTTPException(404, "there is no such part of the page")
    return Response(parts[name], media_type=_TYPES[name.rpartition(".")[2]], headers=_HEADERS)


def _json(body: Any) -> Response:
    try:
        text = json.dumps(body, allow_nan=False)
    except ValueError:  # a number that JSON has not
        text = json.dumps(_finite(body), allow_nan=False)
    return Response(text, media_type="application/json", headers=_HEADERS)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
