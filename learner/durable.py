"""Files that are there whole or not at all, also when the process is killed or the power goes."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, data: str | bytes) -> None:
    """All of `data`, on the disk, or what was there before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as stream:
        stream.write(data.encode() if isinstance(data, str) else data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def settle(folder: Path) -> dict[str, int]:
    """Have the disk take every file below `folder`; their sizes in bytes, by relative path."""
    sizes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    return sizes
