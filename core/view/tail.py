"""Files of records, followed while they grow: by offset, through rotation, and anew where a resumed run cut them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic_core import from_json

from rlx.samples import parts

_MARK = 256
"""Bytes before an offset that must still be there for the file to be the same."""
LONGEST_LINE = 64 << 20


@dataclass
class Followed:
    """How far a file was read."""

    offset: int = 0
    mark: bytes = b""

    def is_same(self, stream: BinaryIO) -> bool:
        """Whether what was read is still there."""
        if os.fstat(stream.fileno()).st_size < self.offset:
            return False
        stream.seek(self.offset - len(self.mark))
        return stream.read(len(self.mark)) == self.mark

    def move(self, stream: BinaryIO, offset: int) -> None:
        self.offset = offset
        start = max(0, offset - _MARK)
        stream.seek(start)
        self.mark = stream.read(offset - start)


def inode_of(stream: BinaryIO) -> tuple[int, int]:
    """With the device: what names a file through rotation."""
    status = os.fstat(stream.fileno())
    return status.st_dev, status.st_ino


class Tail:
    """The whole lines of NAME.jsonl and its older parts. Each call of `follow` gives what came since the one before."""

    def __init__(self, folder: Path, name: str):
        self._folder, self._name = folder, name
        self._followed: dict[tuple[int, int], Followed] = {}
        self._newest: tuple[int, int] | None = None

    def follow(self, forget: Callable[[], None], take: Callable[[dict[str, Any]], None]) -> None:
        """Give `take` the records that are new, oldest first, after `forget` where all before is void. Lines that are no
        JSON objects, and a last one without its newline, are left out."""
        with ExitStack() as opened:
            try:
                streams = [opened.enter_context(path.open("rb")) for path in parts(self._folder, self._name)]
            except FileNotFoundError:  # rotated just now: next time
                return
            by_inode = {inode_of(stream): stream for stream in streams}
            if not self._holds(by_inode):
                self._followed = {}
                forget()
            self._newest = next(reversed(by_inode), None)
            for inode, stream in by_inode.items():
                for record in self._read(inode, stream):
                    take(record)

    def _holds(self, by_inode: Mapping[tuple[int, int], BinaryIO]) -> bool:
        """That the oldest part went does not matter; that the newest did, or one shrank or changed, does."""
        return (self._newest is None or self._newest in by_inode) and all(
            inode not in self._followed or self._followed[inode].is_same(stream) for inode, stream in by_inode.items()
        )

    def _read(self, inode: tuple[int, int], stream: BinaryIO) -> Iterator[dict[str, Any]]:
        followed = self._followed.setdefault(inode, Followed())
        stream.seek(followed.offset)
        end = followed.offset
        for line in stream:
            if not line.endswith(b"\n"):
                break
            end += len(line)
            if (record := parsed(line)) is not None:
                yield record
        if end > followed.offset:
            followed.move(stream, end)


def parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = from_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
