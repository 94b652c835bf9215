"""An app that answers POST /v1/rollouts itself and leaves the rest to FastAPI, whose layers and Starlette's would take
longer for such a request than all that is done for its group."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI, HTTPException, Request
from starlette.types import Receive, Scope, Send

from rlx.rollout.http_bodies import answer_errors, answer_group, answer_of_error
from rlx.wire import GroupRequest, GroupResult

_PATH = "/v1/rollouts"


class GroupApp(FastAPI):
    """`checks` let a request in, or raise; `rollout` makes the group."""

    def __init__(
        self,
        title: str,
        rollout: Callable[[GroupRequest], Awaitable[GroupResult]],
        checks: list[Callable[[Request], Awaitable[None]]],
    ):
        super().__init__(title=title, docs_url=None, redoc_url=None, openapi_url=None)
        self._rollout, self._checks = rollout, checks
        answer_errors(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != _PATH:
            await super().__call__(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            if request.method != "POST":
                raise HTTPException(405, "Method Not Allowed")
            for check in self._checks:
                await check(request)
            answer = await answer_group(request, self._rollout)
        except Exception as error:  # all that Starlette would give to the app's handlers
            answer, is_known = await answer_of_error(request, error)
            await answer(scope, receive, send)
            if not is_known:
                raise
            return
        await answer(scope, receive, send)
