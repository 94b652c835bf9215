"""The samples of a folder, without ever holding them: columns of 29 bytes a sample, and records by their offset.

    samples.jsonl, samples.1.jsonl, … ─► new lines forward, older ones backward, for as long as is asked ─► columns

A place is the number of the file, by its inode and so through rotation, and the offset of the line in it.
"""

from __future__ import annotations

import os
import time
from array import array
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydantic import BaseModel, ValidationError

from rlx.samples import parts
from rlx.view.choose import Samples, Table, group_number, reward_of, status_number
from rlx.view.tail import LONGEST_LINE, Followed, inode_of, parsed

_OFFSET_BITS = 44
_BLOCK = 1 << 20
_MAX_SAMPLES = 5_000_000


class _Line(BaseModel):
    step: int
    key: str = ""
    status: str = "ok"
    rewards: dict[str, float | None] = {}


class _Columns:
    """In the order of reading."""

    def __init__(self) -> None:
        self.places, self.steps, self.rewards = array("q"), array("q"), array("d")
        self.statuses, self.groups = array("b"), array("I")

    def add(self, place: int, line: bytes) -> None:
        try:
            found = _Line.model_validate_json(line)
        except ValidationError:
            return
        if abs(found.step) >= 2**62:
            return
        self.places.append(place)
        self.steps.append(found.step)
        self.rewards.append(reward_of(found.rewards))
        self.statuses.append(status_number(found.status))
        self.groups.append(group_number(found.key))

    def arrays(self, backward: bool) -> list[np.ndarray]:
        step = -1 if backward else 1
        kept = (self.places, self.steps, self.rewards, self.statuses, self.groups)
        types = (np.int64, np.int64, np.float64, np.int8, np.uint32)
        return [np.array(column, kind)[::step] for column, kind in zip(kept, types, strict=True)]


class _File:
    """One file: `older` is indexed from where it ended at first sight towards its beginning, `newer` as it grows."""

    def __init__(self, number: int, path: Path, stream: BinaryIO):
        self.number, self.path = number, path
        self.older, self.newer = _Columns(), _Columns()
        self.inode = inode_of(stream)
        self.top = Followed()
        self.top.move(stream, _last_line_end(stream))
        self.bottom = self.top.offset

    def grow(self, stream: BinaryIO) -> None:
        stream.seek(self.top.offset)
        end = self.top.offset
        for line in stream:
            if not line.endswith(b"\n"):
                break
            self.newer.add(self._place(end), line)
            end += len(line)
        if end > self.top.offset:
            self.top.move(stream, end)

    def dig(self, stream: BinaryIO, until: float) -> None:
        """Index further towards the beginning, block by block, until `until` of time.monotonic() or the beginning; at
        first until there is a sample."""
        size = _BLOCK
        while self.bottom > 0 and (time.monotonic() < until or not self.older.places):
            begin = max(0, self.bottom - size)
            stream.seek(begin)
            block = stream.read(self.bottom - begin)
            cut = 0 if begin == 0 else block.find(b"\n") + 1
            if begin > 0 and not 0 < cut < len(block):
                if size > LONGEST_LINE:
                    self.bottom = begin  # no record is that long
                size *= 4
                continue
            size, at = _BLOCK, self.bottom
            for line in reversed(_lines(block[cut:])):
                at -= len(line)
                self.older.add(self._place(at), line)
            self.bottom = begin + cut

    def _place(self, offset: int) -> int:
        return self.number << _OFFSET_BITS | offset


class SampleFiles(Samples):
    """Not thread-safe: its owner holds a lock."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[tuple[int, int], _File] = {}
        self._next = 0

    def table(self, seconds: float) -> Table:
        until = time.monotonic() + seconds
        ordered = self._refresh()
        for file in reversed(ordered):
            if file.bottom > 0 and self._count() < _MAX_SAMPLES:
                with file.path.open("rb") as stream:
                    file.dig(stream, until)
        columns = [part for file in ordered for part in (file.older.arrays(True), file.newer.arrays(False))]
        places, steps, rewards, statuses, groups = (
            (np.concatenate(same) for same in zip(*columns, strict=True)) if columns else _Columns().arrays(False)
        )
        size = sum(file.top.offset for file in ordered)
        left = sum(file.bottom for file in ordered)
        indexed = 1.0 if not left else min(0.999, 1 - left / size)
        return Table(places, steps, rewards, statuses, groups, indexed)

    def record(self, place: int) -> dict[str, Any] | None:
        number, offset = place >> _OFFSET_BITS, place & (1 << _OFFSET_BITS) - 1
        file = next((file for file in self._files.values() if file.number == number), None)
        try:
            if file is None or offset >= file.top.offset:
                return None
            with file.path.open("rb") as stream:
                stream.seek(offset)
                return parsed(stream.readline(LONGEST_LINE))
        except OSError:
            return None

    def _count(self) -> int:
        return sum(len(file.older.places) + len(file.newer.places) for file in self._files.values())

    def _refresh(self) -> list[_File]:
        """The files, the oldest first, each with its new lines."""
        ordered = []
        for path in parts(self._folder, "samples"):
            try:
                with path.open("rb") as stream:
                    ordered.append(self._seen(path, stream))
            except FileNotFoundError:  # rotated away just now
                continue
        self._files = {file.inode: file for file in ordered}
        return ordered

    def _seen(self, path: Path, stream: BinaryIO) -> _File:
        file = self._files.get(inode_of(stream))
        if file is None or not file.top.is_same(stream):
            file = _File(self._next, path, stream)
            self._next += 1
        file.path = path
        file.grow(stream)
        return file


def _last_line_end(stream: BinaryIO) -> int:
    """Behind the last newline."""
    end = stream.seek(0, os.SEEK_END)
    while end > 0:
        begin = max(0, end - _BLOCK)
        stream.seek(begin)
        place = stream.read(end - begin).rfind(b"\n")
        if place >= 0:
            return begin + place + 1
        end = begin
    return 0


def _lines(block: bytes) -> list[bytes]:
    """With their newlines; `block` ends with one."""
    return [line + b"\n" for line in block[:-1].split(b"\n")]
