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
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from rlx.errors import RlxError
from rlx.samples import parse_steps
from rlx.view.choose import Order, Samples, Wanted, choose
from rlx.view.detail import detail, tokens
from rlx.view.state import Seen

_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
_CHARS = 8_000
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


class Run(Protocol):
    """LiveRun or FolderRun."""

    @property
    def name(self) -> str: ...

    @property
    def samples(self) -> Samples: ...

    def since(self, seen: Seen) -> dict[str, Any]: ...

    def workers_now(self) -> list[Mapping[str, Any]] | None: ...

    def tokenizer_places(self) -> Iterator[str]: ...


def view_app(runs: Sequence[Run]) -> FastAPI:
    """For `rlx view`: answers only who calls it by a loopback name, so that no other web page can read it."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(view_router(runs))
    app.add_middleware(GZipMiddleware, minimum_size=10_000, compresslevel=4)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
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
    async def state(
        run: int = 0, generation: str = "", metrics: int = 0, evaluations: int = 0, events: int = 0
    ) -> Response:
        asked, seen = _run(runs, run), Seen(generation, metrics, evaluations, events)
        workers = asked.workers_now()  # in the event loop, whose state they are; the rest is slow and needs a thread
        more = {} if workers is None else {"workers": workers}
        return await run_in_threadpool(lambda: _json({**asked.since(seen), **more}))

    @guarded.get("/samples")
    def samples(
        run: int = 0,
        step: str = "",
        status: str = "",
        group: str = "",
        low: float | None = None,
        high: float | None = None,
        text: str = "",
        order: Order = "newest",
        after: int | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> Response:
        try:
            steps = parse_steps(step) if step else None
        except RlxError as error:
            raise HTTPException(400, str(error).replace("--step ", "")) from error
        wanted = Wanted(steps, status or None, group or None, low, high, text, order, after, limit)
        return _json(choose(_run(runs, run).samples, wanted))

    @guarded.get("/sample")
    def sample(id: int, run: int = 0, chars: Annotated[int, Query(ge=1)] = _CHARS) -> Response:
        try:
            return _json(detail(id, _record(runs, run, id), chars))
        except ValidationError as error:
            raise HTTPException(422, "this record is no sample that can be shown") from error

    @guarded.get("/tokens")
    def token_range(id: int, run: int = 0, row: int = 0, start: Annotated[int, Query(ge=0)] = 0) -> Response:
        return _json(tokens(_record(runs, run, id), row, start, _run(runs, run).tokenizer_places()))

    router.include_router(guarded)
    return router


def _run(runs: Sequence[Run], number: int) -> Run:
    if not 0 <= number < len(runs):
        raise HTTPException(404, "there is no such run")
    return runs[number]


def _record(runs: Sequence[Run], run: int, place: int) -> dict[str, Any]:
    record = _run(runs, run).samples.record(place)
    if record is None:
        raise HTTPException(404, "this sample is not there any more")
    return record


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
