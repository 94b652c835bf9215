"""Two-phase weight updates, and the same for one worker that has to catch up.

    announce (every worker checks the manifest) → receive (bytes to one file) → commit (every worker swaps)

Between announce and commit the workers go on with the old weights, and a new announce replaces an update that was not
committed: a learner that crashed in between blocks nobody. A worker that fails, is late or reports other bytes is
quarantined, and the supervisor takes over; the commit goes on without it. The file of the last committed update is
kept: the supervisor's workers catch up from it, and it is the base of the next difference.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rlx.config.sections import AsyncSection, ServiceSection
from rlx.errors import (
    DeadlineExceeded,
    ParityError,
    RlxError,
    ServiceUnavailable,
    WeightBaseMismatch,
    WeightSyncError,
)
from rlx.rollout import parity
from rlx.rollout.deadline import answer_of, deadline
from rlx.rollout.fleet import Fleet, Member
from rlx.rollout.manifest import Offer, WeightManifest
from rlx.rollout.weights_store import WeightFile


@dataclass(frozen=True)
class UpdateTimes:
    """`nbytes` came in `transfer_s` seconds; `commit_s` until the last worker had swapped or was given up, `pause_s`
    the longest that one of those that took it did not generate. `workers`: the version of each; `behind`: name and
    cause of those that are to catch up."""

    version: int
    nbytes: int
    transfer_s: float
    commit_s: float
    pause_s: float = 0.0
    workers: dict[str, int] = field(default_factory=dict)
    behind: list[dict[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Pending:
    file: WeightFile
    accepted: dict[Member, int]
    """Who said that it can take them, in which incarnation."""
    receiving: bool = False
    transfer_s: float | None = None

    @property
    def manifest(self) -> WeightManifest:
        return self.file.manifest


class WeightUpdates:
    def __init__(self, fleet: Fleet, settings: ServiceSection, async_settings: AsyncSection | None = None):
        async_settings = async_settings or AsyncSection()
        self._fleet = fleet
        self._timeout = settings.publish_timeout
        self._rolling = async_settings.publish == "rolling"
        self._threshold = async_settings.parity_threshold
        self._turn = asyncio.Lock()
        self._pending: _Pending | None = None
        self._current: WeightFile | None = None
        self._last: UpdateTimes | None = None

    @property
    def last(self) -> UpdateTimes | None:
        """Of the last committed update."""
        return self._last

    # --- the learner's calls --------------------------------------------------------------------------------------

    async def announce(self, manifest: WeightManifest, offer: Offer | None = None) -> bool:
        """Ask every worker whether it can take these weights; nothing that generates changes. Those that cannot are
        quarantined, unless none can: then it is the weights, WeightSyncError, and nothing changes.

        True where what is on `offer` could be opened here: then no bytes have to come."""
        async with self._turn:
            self._check_new(manifest)
            self.discard()
            members = await self._takers()
            asked = {m: m.incarnation for m in members}
            outcomes = await asyncio.gather(*(self._outcome(m, m.worker.announce(manifest)) for m in members))
            failed = [(m, error) for m, error in zip(members, outcomes, strict=True) if error is not None]
            if len(failed) == len(members):
                self._nobody_accepts(manifest, asked, failed)
            for member, error in failed:
                self._lose(member, asked.pop(member), f"cannot take weights {manifest.version}: {error}", error)
            self._pending = pending = _Pending(WeightFile(manifest), asked)
            if offer is not None and manifest.base_fingerprint is None and pending.file.take_over(offer):
                pending.receiving, pending.transfer_s = True, 0.0
            return pending.receiving

    async def receive(self, version: int, chunks: AsyncIterator[bytes]) -> float:
        """Write the announced bytes down and compare their fingerprint; returns the seconds it took."""
        pending = self._announced(version)
        if pending.receiving:
            raise WeightSyncError(f"the bytes of weights {version} came already, or are coming")
        pending.receiving = True
        start = _now()
        base = self._current if pending.manifest.base_fingerprint is not None else None
        try:
            async with deadline(
                self._timeout, lambda: f"the learner did not send weights {version} within {self._timeout:g} s"
            ):
                await pending.file.fill(chunks, base)
        except BaseException as error:  # whatever ends it, also a cancellation, leaves no file behind
            self._drop(pending)
            if isinstance(error, OSError) and not isinstance(error, RlxError):
                raise WeightSyncError(f"weights {version} could not be written down: {error}") from error
            raise
        if self._pending is not pending:
            pending.file.remove()
            raise WeightSyncError(f"weights {version} were replaced by a later announcement while they came")
        pending.transfer_s = _now() - start
        return pending.transfer_s

    async def commit(self, version: int) -> UpdateTimes:
        """Every worker swaps; returns once one serves the new version and each of the others does or is quarantined.
        Asked again for the last committed version, it answers as the first time."""
        async with self._turn:
            if self._last is None or self._last.version != version:
                pending = self._announced(version)
                if pending.transfer_s is None:
                    raise WeightSyncError(
                        f"the bytes of weights {version} have not come yet; send them before the commit"
                    )
                await self._swap(pending, pending.transfer_s)
            return await self._served(version)

    def discard(self) -> None:
        """Forget an update that was not committed."""
        if self._pending is not None:
            self._drop(self._pending)

    def close(self) -> None:
        """Forget every update; nothing stays in memory."""
        self.discard()
        if self._current is not None:
            self._current.remove()
            self._current = None

    # --- for a worker that has to catch up ------------------------------------------------------------------------

    async def restore(self, member: Member) -> float | None:
        """From catching_up to ready: the last committed weights, and the probe that came with them. It is behind again
        when newer weights were committed meanwhile. Returns how far its log-probabilities are off, None without a probe.

        Its errors are the worker's: it did not answer, took other bytes, or does not compute what the learner does.
        """
        off = None
        if (file := self._current) is not None:
            with file.held() as path:
                await answer_of(member.name, self._timeout, member.worker.announce(file.manifest))
                await self._load(member, file.manifest, str(path))
            self._fleet.took(member, file.manifest.version)
            self._fleet.move(member, "caught_up")
            off = await self._verify(member, file.manifest)
        elif member.weight_version != self._fleet.weight_version:
            raise WeightSyncError(f"it has weights {member.weight_version}, which nobody published here")
        else:
            self._fleet.move(member, "caught_up")
        self._fleet.move(member, "verified")
        return off

    # --- inside ---------------------------------------------------------------------------------------------------

    def _check_new(self, manifest: WeightManifest) -> None:
        current = self._fleet.weight_version
        if manifest.version <= current:
            raise WeightSyncError(
                f"weights {manifest.version} are not newer than the {current} that the workers have; "
                f"publish them as {current + 1} or more"
            )
        base = self._current.manifest.fingerprint if self._current is not None else None
        if manifest.base_fingerprint not in (None, base):
            raise WeightBaseMismatch(
                f"weights {manifest.version} are a difference to the update with the fingerprint "
                f"{manifest.base_fingerprint}, the service holds {base or 'none'}; send them whole"
            )

    async def _takers(self) -> list[Member]:
        """Those with a running engine; waits for one, within `service.publish_timeout`."""
        if not (members := self._running()):
            try:
                async with deadline(
                    self._timeout, lambda: f"no worker was ready for weights: {self._fleet.describe()}"
                ):
                    await self._fleet.wait_ready()
            except DeadlineExceeded as error:
                raise ServiceUnavailable(str(error)) from None
            members = self._running()
        return members

    def _running(self) -> list[Member]:
        return [m for m in self._fleet.members if _runs(m)]

    def _nobody_accepts(
        self, manifest: WeightManifest, asked: dict[Member, int], failed: list[tuple[Member, RlxError]]
    ) -> None:
        reasons = "; ".join(f"{member.name}: {error}" for member, error in failed)
        if any(isinstance(error, WeightSyncError) for _, error in failed):
            raise WeightSyncError(f"weights {manifest.version} were refused: {reasons}")
        for member, error in failed:
            self._lose(member, asked[member], str(error), error)
        raise ServiceUnavailable(f"no rollout worker is ready for weights {manifest.version}: {reasons}")

    async def _swap(self, pending: _Pending, transfer_s: float) -> None:
        """Nothing is awaited before the fleet has the new version and the file is the one to catch up from. Workers
        whose turn has not come after `service.publish_timeout` swap together: the learner waits."""
        manifest, members = pending.manifest, self._running()
        start = _now()
        with self._fleet.moving_to(manifest.version):
            self._keep(pending)
            pauses = []
            while members and self._rolling and not manifest.gate and _now() - start < self._timeout:
                pauses.append(await self._take(members.pop(0), pending))
            pauses += await asyncio.gather(*(self._take(member, pending) for member in members))
        self._last = UpdateTimes(
            manifest.version, manifest.travels, transfer_s, _now() - start, max(pauses, default=0.0)
        )

    async def _take(self, member: Member, pending: _Pending) -> float:
        """One worker swaps; returns the seconds for which it paused. What goes wrong is noted on the member."""
        manifest, incarnation = pending.manifest, member.incarnation
        if not _runs(member) or member.weight_version == manifest.version:
            return 0.0  # the supervisor has it, or had it meanwhile
        try:
            if pending.accepted.get(member) != incarnation:
                await answer_of(member.name, self._timeout, member.worker.announce(manifest))
            pause_s = await self._load(member, manifest, str(pending.file.path))
        except RlxError as error:
            self._lose(member, incarnation, f"did not take weights {manifest.version}: {error}")
            return 0.0
        if member.incarnation == incarnation and _runs(member):
            self._fleet.took(member, manifest.version)
            if manifest.gate or member.kept:
                await self._admit(member, manifest)
            if not self._rolling:
                self._fleet.settled()
        return pause_s

    async def _load(self, member: Member, manifest: WeightManifest, path: str) -> float:
        """Seconds for which it paused."""
        taken = await answer_of(member.name, self._timeout, member.worker.commit(manifest, path))
        if taken.fingerprint != manifest.fingerprint:
            raise WeightSyncError(
                f"it loaded bytes with the fingerprint {taken.fingerprint}, {manifest.fingerprint} was sent"
            )
        return taken.pause_s

    async def _admit(self, member: Member, manifest: WeightManifest) -> None:
        """The gate: verified before it serves."""
        self._fleet.move(member, "swapped")
        error = None
        try:
            await self._verify(member, manifest)
        except RlxError as caught:
            error = caught
        if member.state == "verifying":
            if error is None:
                self._fleet.move(member, "verified")
            elif isinstance(error, ParityError):
                self._fleet.fail(member, str(error), "refused", kept=True)
            else:
                self._fleet.fail(member, str(error))

    async def _verify(self, member: Member, manifest: WeightManifest) -> float | None:
        if manifest.probe is None:
            return None
        return await parity.verify(member.worker, manifest.version, manifest.probe, self._threshold, self._timeout)

    async def _served(self, version: int) -> UpdateTimes:
        """The outcome, once somebody serves `version`. When nobody does the supervisor has `service.publish_timeout`
        to bring one back; a failed gate is an error at once."""
        assert self._last is not None
        if far := [m for m in self._fleet.members if m.kept]:
            raise ParityError("; ".join(m.cause.removesuffix(parity.CAUSES) for m in far) + parity.CAUSES)
        try:
            async with deadline(self._timeout, lambda: f"none came back within {self._timeout:g} s"):
                await self._fleet.wait_ready()
        except (DeadlineExceeded, ServiceUnavailable) as error:
            causes = "; ".join(f"{m.name} is {m.state}: {m.cause}" for m in self._fleet.members)
            raise WeightSyncError(f"weights {version} were not taken: {causes}; {error}") from error
        members = [m for m in self._fleet.members if m.state not in ("gone", "draining")]
        behind = [m for m in members if m.state != "ready" or m.weight_version != version]
        return replace(
            self._last,
            workers={m.name: m.weight_version for m in members},
            behind=[{"name": m.name, "cause": m.cause or m.state} for m in behind],
        )

    def _lose(self, member: Member, incarnation: int, cause: str, error: RlxError | None = None) -> None:
        """What that process of it answered: it gets no more work, quarantined, or down when it says itself that it is
        gone."""
        if member.incarnation == incarnation and _runs(member):
            down = isinstance(error, ServiceUnavailable) and member.state == "ready"
            self._fleet.fail(member, cause, "failed" if down else "refused")

    async def _outcome(self, member: Member, answer: Awaitable[None]) -> RlxError | None:
        try:
            await answer_of(member.name, self._timeout, answer)
        except RlxError as error:
            return error
        return None

    def _announced(self, version: int) -> _Pending:
        if self._pending is None or self._pending.manifest.version != version:
            raise WeightSyncError(f"weights {version} were not announced, or another announcement replaced them")
        return self._pending

    def _keep(self, pending: _Pending) -> None:
        if self._current is not None:
            self._current.remove()
        self._current, self._pending = pending.file, None

    def _drop(self, pending: _Pending) -> None:
        pending.file.remove()
        if self._pending is pending:
            self._pending = None


def _runs(member: Member) -> bool:
    """Its engine is up, and the supervisor does not work on it."""
    return member.state == "ready" or member.kept


def _now() -> float:
    return asyncio.get_running_loop().time()
