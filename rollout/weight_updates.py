"""Two-phase weight updates.

    announce (every worker checks the manifest) → receive (bytes to one file) → commit (every worker swaps at once)

Between announce and commit the workers go on with the old weights, and a new announce replaces an update that was not
committed: a learner that crashed in between blocks nobody.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from rlx.config.sections import ServiceSection
from rlx.errors import ServiceUnavailable, WeightSyncError
from rlx.rollout.deadline import deadline
from rlx.rollout.fleet import Fleet, Member
from rlx.rollout.weights_store import WeightFile
from rlx.wire import WeightManifest

T = TypeVar("T")


@dataclass(frozen=True)
class UpdateTimes:
    """Seconds: `transfer_s` from the first to the last byte, `commit_s` until the last worker had swapped."""

    version: int
    nbytes: int
    transfer_s: float
    commit_s: float

    def to_json(self) -> dict[str, float | int]:
        return asdict(self)


@dataclass
class _Pending:
    file: WeightFile
    members: list[Member]
    receiving: bool = False
    transfer_s: float | None = None

    @property
    def manifest(self) -> WeightManifest:
        return self.file.manifest


class WeightUpdates:
    def __init__(self, fleet: Fleet, settings: ServiceSection):
        self._fleet = fleet
        self._timeout = settings.publish_timeout
        self._turn = asyncio.Lock()
        self._pending: _Pending | None = None
        self._last: UpdateTimes | None = None

    async def announce(self, manifest: WeightManifest) -> None:
        """Every ready worker says that it can take these weights; nothing that generates changes."""
        async with self._turn:
            current = self._fleet.weight_version
            if manifest.version <= current:
                raise WeightSyncError(
                    f"weights {manifest.version} are not newer than the {current} that the workers have; "
                    f"publish them as {current + 1} or more"
                )
            self.discard()
            members = self._members()
            outcomes = await asyncio.gather(
                *(self._within(m, m.worker.announce(manifest)) for m in members), return_exceptions=True
            )
            if failed := _failures(members, outcomes):
                for member, error in failed:
                    if isinstance(error, ServiceUnavailable):
                        self._fleet.mark_down(member, str(error))
                raise WeightSyncError(f"weights {manifest.version} were refused: {_listed(failed)}")
            self._pending = _Pending(WeightFile(manifest), members)

    async def receive(self, version: int, chunks: AsyncIterator[bytes]) -> float:
        """Write the announced bytes down and compare their fingerprint; returns the seconds it took."""
        pending = self._announced(version)
        if pending.receiving:
            raise WeightSyncError(f"the bytes of weights {version} came already, or are coming")
        pending.receiving = True
        start = time.monotonic()
        try:
            async with deadline(
                self._timeout, lambda: f"the learner did not send weights {version} within {self._timeout:g} s"
            ):
                await pending.file.fill(chunks)
        except BaseException:
            self._drop(pending)
            raise
        if self._pending is not pending:
            pending.file.remove()
            raise WeightSyncError(f"weights {version} were replaced by a later announcement while they came")
        pending.transfer_s = time.monotonic() - start
        return pending.transfer_s

    async def commit(self, version: int) -> UpdateTimes:
        """Every worker swaps. One that fails is quarantined and named; the others serve the new version.
        Asked again for the version that the workers have, it answers as the first time."""
        async with self._turn:
            if self._last is not None and self._last.version == version:
                return self._last
            pending = self._announced(version)
            if pending.transfer_s is None:
                raise WeightSyncError(f"the bytes of weights {version} have not come yet; send them before the commit")
            start = time.monotonic()
            try:
                with self._fleet.updating():
                    failed = await self._swap(pending)
            finally:
                self._drop(pending)
            if failed:
                raise WeightSyncError(f"weights {version} were not taken: {_listed(failed)}")
            self._last = UpdateTimes(version, pending.manifest.nbytes, pending.transfer_s, time.monotonic() - start)
            return self._last

    def discard(self) -> None:
        """Forget an update that was not committed."""
        if self._pending is not None:
            self._drop(self._pending)

    async def _swap(self, pending: _Pending) -> list[tuple[Member, BaseException]]:
        manifest, members = pending.manifest, pending.members
        outcomes = await asyncio.gather(*(self._commit_one(m, pending) for m in members), return_exceptions=True)
        failed = _failures(members, outcomes)
        for member, error in failed:
            self._fleet.mark_down(member, f"did not take weights {manifest.version}: {error}", quarantine=True)
        if len(failed) < len(members):
            self._fleet.weight_version = manifest.version
        lost = {member.name for member, _ in failed}
        for member in members:
            if member.name not in lost:
                member.weight_version = manifest.version
        return failed

    async def _commit_one(self, member: Member, pending: _Pending) -> None:
        if member.state != "ready":
            raise ServiceUnavailable(f"it went down after the announcement: {member.cause}")
        manifest = pending.manifest
        loaded = await self._within(member, member.worker.commit(manifest, str(pending.file.path)))
        if loaded != manifest.fingerprint:
            raise WeightSyncError(f"it loaded bytes with the fingerprint {loaded}, {manifest.fingerprint} was sent")

    def _members(self) -> list[Member]:
        if members := [m for m in self._fleet.members if m.state == "ready"]:
            return members
        raise ServiceUnavailable(f"no rollout worker is ready for weights: {self._fleet.describe()}")

    def _announced(self, version: int) -> _Pending:
        if self._pending is None or self._pending.manifest.version != version:
            raise WeightSyncError(f"weights {version} were not announced, or another announcement replaced them")
        return self._pending

    def _drop(self, pending: _Pending) -> None:
        pending.file.remove()
        if self._pending is pending:
            self._pending = None

    async def _within(self, member: Member, answer: Awaitable[T]) -> T:
        async with deadline(self._timeout, lambda: f"worker {member.name} did not answer within {self._timeout:g} s"):
            return await answer


def _failures(members: list[Member], outcomes: Sequence[object]) -> list[tuple[Member, BaseException]]:
    """Those whose outcome is an error. Being cancelled is not one: it goes on up."""
    failed = []
    for member, outcome in zip(members, outcomes, strict=True):
        if isinstance(outcome, asyncio.CancelledError):
            raise outcome
        if isinstance(outcome, BaseException):
            failed.append((member, outcome))
    return failed


def _listed(failed: list[tuple[Member, BaseException]]) -> str:
    return "; ".join(f"{member.name}: {error}" for member, error in failed)
