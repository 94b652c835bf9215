"""What goes to single workers beside groups: OpenAI-shaped requests, and log-probabilities of given tokens."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

import numpy as np

from rlx.errors import ServiceUnavailable
from rlx.rollout.deadline import deadline
from rlx.rollout.fleet import Fleet, Member
from rlx.rollout.router import Router


class SingleCalls:
    """`timeout_s`: seconds that a worker has for an answer, or for the next piece of one."""

    def __init__(self, fleet: Fleet, router: Router, timeout_s: float):
        self._fleet, self._router, self._timeout_s = fleet, router, timeout_s

    async def openai(self, route: str, body: dict[str, Any]) -> dict[str, Any] | AsyncIterator[str]:
        """An OpenAI-shaped request on the least busy worker; one deadline for the answer or, streamed, its start."""
        seconds = self._timeout_s
        async with deadline(seconds, lambda: f"no worker was free within {seconds:g} s: {self._fleet.describe()}"):
            charge = await self._router.place(1, 1)
        with ExitStack() as held:
            member = held.enter_context(charge)
            async with deadline(seconds, lambda: f"worker {member.name} did not answer within {seconds:g} s"):
                answer = await member.worker.openai(route, body)
            if isinstance(answer, dict):
                return answer
            lines = _hold_while_streaming(answer, held.pop_all(), member.name, seconds)
            weakref.finalize(lines, charge.close)  # also when it is dropped before it began
            return lines

    async def prompt_logprobs(self, ids: np.ndarray, worker: str | None = None) -> dict[str, np.ndarray]:
        """log p of `ids` int32 [T] on every ready worker, or on the named one: float32 [T-1] by worker name."""
        members = [self._fleet.named(worker)] if worker else self._fleet.ready()
        if not members:
            raise ServiceUnavailable(f"no rollout worker is ready: {self._fleet.describe()}")
        return {member.name: await self._prompt_logprobs(member, ids) for member in members}

    async def _prompt_logprobs(self, member: Member, ids: np.ndarray) -> np.ndarray:
        seconds = self._timeout_s
        async with deadline(seconds, lambda: f"worker {member.name} did not answer within {seconds:g} s"):
            with self._fleet.marking(member):
                return await member.worker.prompt_logprobs(ids)


async def _hold_while_streaming(
    lines: AsyncIterator[str], held: ExitStack, name: str, seconds: float
) -> AsyncIterator[str]:
    """`lines`, each within `seconds`; the worker stays charged until the last, or until the generator is dropped."""
    with held:
        while True:
            async with deadline(seconds, lambda: f"worker {name} sent nothing for {seconds:g} s"):
                line = await anext(lines, None)
            if line is None:
                return
            yield line
