"""The devices of one engine in the Ray cluster: a placement group of one bundle, so that workers come and go one by
one. Ray's autoscaler sees one that waits; one whose node died goes back to waiting by itself."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlx.errors import ServiceUnavailable

_FIRST_LOOK_S, _TELLING_S, _LOOK_S = 0.05, 0.2, 1.0


class Reservation:
    """`ask` → `wait` → `strategy` for the actor → `release`; after that it may begin again. `name` is what Ray's dashboard
    calls it."""

    def __init__(self, bundle: dict[str, float], name: str):
        self.bundle = bundle
        self._name, self._lives = name, itertools.count()
        self._group: PlacementGroup | None = None

    @property
    def strategy(self) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=0)

    def ask(self) -> None:
        """Ask Ray for the devices, unless that was done."""
        if self._group is None:
            life = next(self._lives)  # the one before may still be there, with its name
            self._group = placement_group([self.bundle], name=f"{self._name}.{life}" if life else self._name)

    def release(self) -> None:
        """Give the devices back, which ends what runs on them, or stop asking. Idempotent."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    async def held(self) -> bool:
        """Whether the devices are there now: not while Ray looks for them, and not after their node died."""
        if self._group is None:
            return False
        table = await asyncio.to_thread(placement_group_table, self._group)
        return table["state"] == "CREATED"

    async def wait(self, timeout_s: float, on_wait: Callable[[str], None] = lambda _: None) -> None:
        """Until the devices are there; `on_wait` hears about once a second what is missing. ServiceUnavailable says so
        after `timeout_s` seconds, and gives the request back."""
        self.ask()
        end, pause = time.monotonic() + timeout_s, _FIRST_LOOK_S
        while not await self.held():
            if time.monotonic() >= end:
                self.release()
                raise ServiceUnavailable(f"no {await self.missing()}, within {timeout_s:g} s")
            await asyncio.sleep(min(pause, max(end - time.monotonic(), 0)))
            if pause >= _TELLING_S:
                on_wait(await self.missing())
            pause = min(2 * pause, _LOOK_S)

    async def missing(self) -> str:
        """`1 GPU on one node of the Ray cluster, where 0 of 4 are free`."""
        [(resource, count)] = self.bundle.items()
        free, total = await asyncio.to_thread(counts, resource)
        plural = "s" if count > 1 else ""
        return f"{count:g} {resource}{plural} on one node of the Ray cluster, where {free:g} of {total:g} are free"


def counts(resource: str) -> tuple[float, float]:
    """How many of `resource` are free in the cluster, and how many there are."""
    return ray.available_resources().get(resource, 0.0), ray.cluster_resources().get(resource, 0.0)
