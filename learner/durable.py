"""Files that are there whole or not at all, also when the process is killed or the power goes."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

_PIECE = 2**24


def write_atomically(path: Path, data: str | bytes) -> None:
    """All of `data`, on the disk, or what was there before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as stream:
        stream.write(data.encode() if isinstance(data, str) else data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def settle(folder: Path) -> dict[str, tuple[int, str]]:
    """Have the disk take every file below `folder`; size in bytes and `digest` of each, by relative path."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        files[path.relative_to(folder).as_posix()] = path.stat().st_size, digest(path)
    return files


def digest(path: Path) -> str:
    """XXH3 of what a file holds, in 32 hexadecimal digits."""
    found = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            found.update(piece)
    return found.hexdigest()
