"""A reward that another process computes: the group as JSON to a URL, the rewards back.

    POST {"prompts": [G], "completions": [G], "completion_ids": [G], "max_completion_length": int,
          "trainer_state": {"global_step": int}, COLUMN: [G], ...}   ─►   {"rewards": [G]}  or  [G], null for None

The body is the keyword arguments of a reward function. RLX_REWARD_TOKEN, where set, is sent as bearer token.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

import httpx

from rlx.errors import ServiceError, ServiceUnavailable, UserCodeError

TOKEN_VARIABLE = "RLX_REWARD_TOKEN"
ATTEMPTS = 3
_FIRST_PAUSE_S = 0.5
_CONNECT_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 600.0  # the deadline of the reward, rewards.timeout, comes first
_NOT_JSON = ("log_extra", "log_metric")


class RemoteReward:
    """Calls `url`, many groups at a time. Tried again when nobody answers, and for the statuses 429 and 5xx."""

    def __init__(self, url: str):
        self.url = url
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout = httpx.Timeout(_ANSWER_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)

    async def __call__(self, prompts: list[Any], completions: list[Any], **arguments: Any) -> Any:
        """The rewards as the server gave them. ServiceError and ServiceUnavailable when it did not; UserCodeError when
        it never will at this address or with this token."""
        body = {name: value for name, value in arguments.items() if name not in _NOT_JSON}
        body |= {"prompts": prompts, "completions": completions}
        if "trainer_state" in arguments:
            body["trainer_state"] = {"global_step": arguments["trainer_state"].global_step}
        async with httpx.AsyncClient(timeout=self._timeout, headers=self._headers) as client:
            response = await self._post(client, body)
        return self._rewards(response)

    async def _post(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> httpx.Response:
        trouble = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
            try:
                response = await client.post(self.url, json=body)
            except httpx.ReadTimeout as error:
                raise ServiceUnavailable(f"{self.url} did not answer within {_ANSWER_TIMEOUT_S:g} s") from error
            except httpx.TransportError as error:
                trouble = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                continue
            if response.status_code != 429 and response.status_code < 500:
                return response
            trouble = _told(response)
        raise ServiceUnavailable(f"{self.url} failed {ATTEMPTS} times; the last time: {trouble}")

    def _rewards(self, response: httpx.Response) -> Any:
        if response.status_code in (401, 403, 404, 405):
            hint = f"check {TOKEN_VARIABLE}" if response.status_code in (401, 403) else "check the address"
            raise UserCodeError(f"is refused: {_told(response)}; {hint}.")
        if response.status_code != 200:
            raise ServiceError(f"{self.url} answered {_told(response)}")
        try:
            answer = response.json()
        except ValueError as error:
            raise ServiceError(f"{self.url} answered something that is not JSON: {_told(response)}") from error
        if isinstance(answer, dict) and "rewards" in answer:
            return answer["rewards"]
        return answer


def _told(response: httpx.Response) -> str:
    return f"{response.status_code} {response.text[:300]!r}"
