"""Where a weight update lies between the network and the workers: one file in a private folder in memory."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import xxhash

from rlx.errors import WeightSyncError
from rlx.rollout import delta
from rlx.rollout.manifest import Offer, WeightManifest

SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "rlx-weights-"
_PIECE = 4 * 2**20
"""Bytes that are written down at once."""


class WeightFile:
    """The bytes of one update. The folder has mode 0700 and goes with `remove`, or with the last that holds it."""

    def __init__(self, manifest: WeightManifest):
        self.manifest = manifest
        self._folder, self._lock = _locked_folder(_root_with_space(manifest.nbytes))
        self._holders, self._unwanted, self._theirs = 0, False, -1
        self.path = self._folder / f"{manifest.version}.safetensors"

    def take_over(self, offer: Offer) -> bool:
        """Read the bytes where the learner has them, if that is on this machine. Nothing compares them here: the
        workers compare what they load."""
        theirs, name = f"/proc/{offer.pid}/fd/{offer.fd}", f"/memfd:{offer.name} (deleted)"
        try:
            if not offer.name.startswith(_PREFIX) or os.readlink(theirs) != name:
                return False
            fd = os.open(theirs, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as long as this is held the learner does not write there
            if os.readlink(f"/proc/self/fd/{fd}") == name and os.fstat(fd).st_size == self.manifest.nbytes:
                self._theirs, self.path = fd, Path(f"/proc/{os.getpid()}/fd/{fd}")
                return True
        except OSError:
            pass
        os.close(fd)
        return False

    async def fill(self, chunks: AsyncIterator[bytes], base: WeightFile | None = None) -> None:
        """Write the stream down, or, with `base`, what the stream makes of it (`rollout/delta.py`).

        WeightSyncError unless as many bytes came as announced and the file has the announced fingerprint.
        """
        if base is None:
            await self._fill_whole(chunks)
            return
        label = f"weights {self.manifest.version}"
        difference = bytearray()
        async for chunk in chunks:
            difference += chunk
            self._check_size(len(difference), ended=False)
        self._check_size(len(difference), ended=True)
        with base.held():
            await asyncio.to_thread(delta.apply, base.path, difference, self.path)
        found = await asyncio.to_thread(_fingerprint, self.path)
        if found != self.manifest.fingerprint:
            raise WeightSyncError(
                f"{label}: the difference makes weights with the fingerprint {found}, "
                f"{self.manifest.fingerprint} was announced; it was made for another update"
            )

    async def _fill_whole(self, chunks: AsyncIterator[bytes]) -> None:
        """What came is written and hashed in a thread, piece by piece, while more comes; a small rest here."""
        size, waiting, digest = 0, 0, xxhash.xxh3_128()
        batch: list[bytes] = []
        with self.path.open("wb", buffering=0) as file, ThreadPoolExecutor(1, "rlx-weights") as thread:

            def write(chunks: list[bytes]) -> None:
                for chunk in chunks:
                    digest.update(chunk)
                    view = memoryview(chunk)
                    while view:
                        view = view[file.write(view) :]

            writing: Future[None] | None = None
            async for chunk in chunks:
                size, waiting = size + len(chunk), waiting + len(chunk)
                self._check_size(size, ended=False)
                batch.append(chunk)
                if waiting >= _PIECE:
                    if writing is not None:
                        await asyncio.wrap_future(writing)
                    writing = thread.submit(write, batch)
                    batch, waiting = [], 0
            if writing is not None:
                await asyncio.wrap_future(writing)
            write(batch)
        self._check_size(size, ended=True)
        if digest.hexdigest() != self.manifest.fingerprint:
            raise WeightSyncError(
                f"weights {self.manifest.version}: the bytes that came have the fingerprint {digest.hexdigest()}, "
                f"{self.manifest.fingerprint} was announced; they changed on the way"
            )

    def _check_size(self, came: int, ended: bool) -> None:
        label, announced = f"weights {self.manifest.version}", self.manifest.travels
        if came > announced:
            raise WeightSyncError(f"{label}: more than the {announced} announced bytes came")
        if ended and came != announced:
            raise WeightSyncError(f"{label}: {announced} bytes were announced, {came} came")

    @contextmanager
    def held(self) -> Iterator[Path]:
        """The file stays while the body runs, also when it is removed meanwhile."""
        self._holders += 1
        try:
            yield self.path
        finally:
            self._holders -= 1
            if self._unwanted:
                self.remove()

    def remove(self) -> None:
        """Idempotent."""
        self._unwanted = True
        if self._lock >= 0 and self._holders == 0:
            shutil.rmtree(self._folder)
            os.close(self._lock)
            self._lock = -1
            if self._theirs >= 0:
                os.close(self._theirs)


def remove_leftovers() -> None:
    """Remove the folders of this user's services that were killed before they could: nobody holds their lock."""
    for root in {SHARED_MEMORY, Path(tempfile.gettempdir())}:
        for folder in root.glob(f"{_PREFIX}*"):
            try:
                if folder.stat().st_uid == os.getuid():
                    _remove_unless_held(folder)
            except FileNotFoundError:
                pass  # somebody else removed it meanwhile


def _remove_unless_held(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)


def _locked_folder(root: Path) -> tuple[Path, int]:
    """A new private folder, and the descriptor that holds its lock. Another one when `remove_leftovers` of another
    process took the first before it was locked."""
    for _ in range(10):
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        lock = -1
        try:
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.is_dir():
                return folder, lock
        except (FileNotFoundError, BlockingIOError):
            pass
        if lock >= 0:
            os.close(lock)
    raise WeightSyncError(f"the folders for weights in {root} are removed as soon as they are made; who does that?")


def _fingerprint(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def _root_with_space(nbytes: int) -> Path:
    """Shared memory where it has room for `nbytes`, else the temporary folder."""
    roots = [SHARED_MEMORY, Path(tempfile.gettempdir())]
    for root in roots:
        if root.is_dir() and shutil.disk_usage(root).free > nbytes:
            return root
    raise WeightSyncError(f"no room for {nbytes} bytes of weights in {' or '.join(map(str, roots))}; free some")
