"""The learner's side of the direct token path: asks the gateway for a place, then the worker for the group.

    rollout(request) ─► asked ─► one POST /v1/routes for all that came in _GATHER_S ─► address of a worker
                          ▲                                                                  │
                          └── the worker is lost, or stopped: the same key again ◄── POST /v1/rollouts ─► answer

It has no event loop and no connections of its own: `client.py` lends both.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from rlx.errors import GroupCancelled, RlxError, ServiceUnavailable
from rlx.rollout.deadline import deadline
from rlx.rollout.http_errors import raise_answer
from rlx.wire import GroupRequest

_GATHER_S = 0.003
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.1, 2.0


@dataclass
class _Asked:
    group: dict[str, Any]
    """As POST /v1/routes wants it."""
    url: asyncio.Future[str]


class DirectRollouts:
    """`ask`: POST /v1/routes at the gateway, JSON in and out; `post`: a group request to the worker at a URL. `margin_s`:
    how long to wait after a group's deadline, so that the service's own message arrives."""

    def __init__(
        self,
        ask: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]],
        post: Callable[[str, bytes], Awaitable[tuple[int, bytes]]],
        margin_s: float,
    ):
        self._ask, self._post, self._margin_s = ask, post, margin_s
        self._asked: list[_Asked] = []
        self._done: list[str] = []
        self._sending: set[asyncio.Task[None]] = set()
        self._is_gathering = False

    async def rollout(self, request: GroupRequest) -> bytes:
        """The worker's answer. A worker that is lost is replaced, within the deadline of the group."""
        seconds, doing = request.deadline_s, "the gateway named no worker"
        group, body, pause = _sizes(request), request.encode(), _FIRST_PAUSE_S
        try:
            async with deadline(
                seconds + self._margin_s, lambda: f"group {request.key!r} got no answer within {seconds:g} s: {doing}"
            ):
                while True:
                    url = await self._place(group)
                    doing = f"{url} was asked last"
                    try:
                        status, answer = await self._post(url, body)
                        if status >= 400:
                            raise_answer(status, answer, url)
                        return answer
                    except (aiohttp.ClientError, ServiceUnavailable, GroupCancelled) as error:
                        # A lost worker; or the gateway stopped the group there, and says why when it is asked again.
                        doing = f"{url}: {error or type(error).__name__}"
                        await asyncio.sleep(pause)
                        pause = min(2 * pause, _LAST_PAUSE_S)
        finally:
            self._done.append(request.key)
            self._news()

    async def _place(self, group: dict[str, Any]) -> str:
        """The address of the worker that the gateway chose."""
        asked = _Asked(group, asyncio.get_running_loop().create_future())
        self._asked.append(asked)
        self._news()
        return await asked.url

    def _news(self) -> None:
        if not self._is_gathering:
            self._is_gathering = True
            task = asyncio.create_task(self._send())
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _send(self) -> None:
        """Ask for all that came together, again and again until each has its place or its error."""
        await asyncio.sleep(_GATHER_S)
        self._is_gathering = False
        asked, self._asked = [item for item in self._asked if not item.url.done()], []
        done, self._done = self._done, []
        while asked or done:
            try:
                answer = await self._ask({"groups": [item.group for item in asked], "done": done})
            except RlxError as error:
                for item in asked:
                    _settle(item.url, error)
                self._done += done
                return
            done = []
            urls: dict[str, str | RlxError] = {route["key"]: route["url"] for route in answer["routes"]}
            urls |= {failed["key"]: _error(failed) for failed in answer["errors"]}
            for item in asked:
                if (found := urls.get(item.group["key"])) is not None:
                    _settle(item.url, found)
            asked = [item for item in asked if not item.url.done()]


def _sizes(request: GroupRequest) -> dict[str, Any]:
    return {
        "key": request.key,
        "n": request.num_generations,
        "prompt_tokens": int(request.prompt_ids.size),
        "max_tokens": request.sampling.max_tokens,
        "deadline_s": request.deadline_s,
    }


def _settle(url: asyncio.Future[str], found: str | RlxError) -> None:
    if url.done():
        return
    if isinstance(found, str):
        url.set_result(found)
    else:
        url.set_exception(found)


def _error(failed: dict[str, Any]) -> RlxError:
    try:
        raise_answer(500, json.dumps(failed).encode(), "the gateway")
    except RlxError as error:
        return error
    raise AssertionError("raise_answer raises")
