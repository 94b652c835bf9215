"""Files of records, followed while they grow: by offset, through rotation, and anew where a resumed run cut them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

_MARK = 256
"""Bytes before an offset that must still be there for the file to be the same."""
LONGEST_LINE = 64 << 20


def parts(folder: Path, name: str) -> list[Path]:
    """The files of `name`, the oldest first: NAME.2.jsonl, NAME.1.jsonl, NAME.jsonl."""
    numbered = []
    for path in folder.glob(f"{name}.*.jsonl"):
        if match := re.fullmatch(r"(\d{1,6})", path.name[len(name) + 1 : -len(".jsonl")]):
            numbered.append((int(match[1]), path))
    newest = folder / f"{name}.jsonl"
    return [path for _, path in sorted(numbered, reverse=True)] + ([newest] if newest.is_file() else [])


@dataclass
class Followed:
    """How far a file was read. Its inode names it: rotation renames it."""

    device_and_inode: tuple[int, int]
    offset: int = 0
    mark: bytes = b""

    def is_same(self, stream: Any) -> bool:
        """Whether what was read is still there."""
        if os.fstat(stream.fileno()).st_size < self.offset:
            return False
        stream.seek(self.offset - len(self.mark))
        return stream.read(len(self.mark)) == self.mark

    def move(self, stream: Any, offset: int) -> None:
        self.offset = offset
        start = max(0, offset - _MARK)
        stream.seek(start)
        self.mark = stream.read(offset - start)


def inode_of(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


class Tail:
    """The whole lines of NAME.jsonl and its older parts. Each call of `new` gives what came since the one before."""

    def __init__(self, folder: Path, name: str):
        self._folder, self._name = folder, name
        self._followed: dict[tuple[int, int], Followed] = {}

    def new(self) -> tuple[bool, Iterator[dict[str, Any]]]:
        """Whether all before is void, and the new records, oldest first. The iterator must be exhausted. Lines that are
        no JSON objects, and a last one without its newline, are left out."""
        paths = parts(self._folder, self._name)
        void = not self._holds(paths)
        if void:
            self._followed = {}
        return void, self._read(paths)

    def _holds(self, paths: list[Path]) -> bool:
        """A part that rotation dropped does not matter; one that shrank or changed does."""
        here: set[tuple[int, int]] = set()
        for path in paths:
            with path.open("rb") as stream:
                status = os.fstat(stream.fileno())
                key = status.st_dev, status.st_ino
                here.add(key)
                if key in self._followed and not self._followed[key].is_same(stream):
                    return False
        gone = [key for key in self._followed if key not in here]
        if gone and (not paths or set(gone) == set(self._followed)):
            return False
        for key in gone:
            del self._followed[key]
        return True

    def _read(self, paths: list[Path]) -> Iterator[dict[str, Any]]:
        for path in paths:
            with path.open("rb") as stream:
                status = os.fstat(stream.fileno())
                key = status.st_dev, status.st_ino
                followed = self._followed.setdefault(key, Followed(key))
                if status.st_size == followed.offset:
                    continue
                stream.seek(followed.offset)
                end = followed.offset
                for line in stream:
                    if not line.endswith(b"\n"):
                        break
                    end += len(line)
                    if (record := parsed(line)) is not None:
                        yield record
                followed.move(stream, end)


def parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = from_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
