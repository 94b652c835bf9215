"""Where a weight update lies between the network and the workers: one file in a private folder in memory."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import xxhash

from rlx.errors import WeightSyncError
from rlx.wire import WeightManifest

SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "rlx-weights-"


class WeightFile:
    """The bytes of one update. The folder has mode 0700 and goes with `remove`."""

    def __init__(self, manifest: WeightManifest):
        self.manifest = manifest
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_folder_with_space(manifest.nbytes)))
        self._lock = os.open(self._folder, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.path = self._folder / f"{manifest.version}.safetensors"

    async def fill(self, chunks: AsyncIterator[bytes]) -> None:
        """Write the stream down; WeightSyncError unless it is exactly the bytes that the manifest announced."""
        size, digest = 0, xxhash.xxh3_128()
        with self.path.open("wb", buffering=0) as file:
            async for chunk in chunks:
                size += len(chunk)
                if size > self.manifest.nbytes:
                    raise WeightSyncError(
                        f"weights {self.manifest.version}: more than the {self.manifest.nbytes} announced bytes came"
                    )
                digest.update(chunk)
                view = memoryview(chunk)
                while view:
                    view = view[file.write(view) :]
        if size != self.manifest.nbytes:
            raise WeightSyncError(
                f"weights {self.manifest.version}: {self.manifest.nbytes} bytes were announced, {size} came"
            )
        if digest.hexdigest() != self.manifest.fingerprint:
            raise WeightSyncError(
                f"weights {self.manifest.version}: the bytes that came have the fingerprint {digest.hexdigest()}, "
                f"{self.manifest.fingerprint} was announced; they changed on the way"
            )

    def remove(self) -> None:
        """Idempotent."""
        if self._lock >= 0:
            shutil.rmtree(self._folder)
            os.close(self._lock)
            self._lock = -1


def remove_leftovers() -> None:
    """Remove the folders of this user's services that were killed before they could: nobody holds their lock."""
    for root in {SHARED_MEMORY, Path(tempfile.gettempdir())}:
        for folder in root.glob(f"{_PREFIX}*"):
            if folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            except BlockingIOError:
                pass
            finally:
                os.close(lock)


def _folder_with_space(nbytes: int) -> Path:
    """Shared memory where it has room for `nbytes`, else the temporary folder."""
    roots = [SHARED_MEMORY, Path(tempfile.gettempdir())]
    for root in roots:
        if root.is_dir() and shutil.disk_usage(root).free > nbytes:
            return root
    raise WeightSyncError(f"no room for {nbytes} bytes of weights in {' or '.join(map(str, roots))}; free some")
