"""The difference between two weight updates: which elements changed, and by how much. Bytes in, bytes out; numpy only.

After one optimizer step at usual learning rates most bfloat16 weights are what they were: the step is smaller than
half of the last place. Elements are compared and added as unsigned integers of their width, so NaN payloads and -0.0
survive bit by bit.

Format, little-endian (`_HEADER`):

    magic "RLXD" | xxh3-128 of all that follows | version | bytes an element | elements a piece | bytes of the file
    | xxh3-128 of the base | xxh3-128 of the result

then for each piece of the file, in order: `changed` (uint32), `length` (uint32) and `length` bytes, deflated:

    gaps     unchanged elements before each changed one, in base 255: a gap of g is g // 255 times the byte 255 and then
             the byte g % 255
    planes   new - base modulo 2^bits of each changed element, zigzag (0, -1, 1, -2, … become 0, 1, 2, 3, …), first
             the lowest byte of all of them, then the next
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from rlx.errors import WeightBaseMismatch, WeightSyncError

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview | mmap.mmap

MAX_CHANGED = 0.2
"""Fraction of changed elements above which everything is sent: finding, packing and adding them takes longer."""

_MAGIC, _VERSION = b"RLXD", 1
_SEAL = struct.Struct("<4s16s")
_HEADER = struct.Struct("<BBxxIQ16s16s")
_PIECE = struct.Struct("<II")
_ELEMENTS = 2**20
_TYPES: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
_THREADS = min(8, len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class Difference:
    """`data` is for `apply`, None where sending everything is cheaper. `changed_fraction` is of all elements."""

    data: bytes | None
    changed_fraction: float


def encode(base: Buffer, new: Buffer, itemsize: int = 2) -> Difference:
    """What makes `new` of `base`, both of elements of `itemsize` bytes (2 or 4). Other sizes have nothing in common."""
    dtype = _TYPES[itemsize]
    nbytes = len(new)
    if len(base) != nbytes or nbytes == 0 or nbytes % itemsize:
        return Difference(None, 1.0)
    old, now = (np.frombuffer(data, dtype) for data in (base, new))
    budget = int(MAX_CHANGED * now.size)
    body: list[bytes] = []
    changed = 0

    def one(start: int) -> tuple[int, bytes]:
        a, b = old[start : start + _ELEMENTS], now[start : start + _ELEMENTS]
        if changed > budget:  # all that is left to know is how many
            return int(np.count_nonzero(a != b)), b""
        at = np.flatnonzero(a != b)
        return at.size, _pack(at, b[at] - a[at])

    for count, packed in _threaded(one, range(0, now.size, _ELEMENTS)):
        changed += count
        if changed > budget:
            body.clear()
        else:
            body += [_PIECE.pack(count, len(packed)), packed]
    fraction = changed / now.size
    if changed > budget:
        return Difference(None, fraction)
    head = _HEADER.pack(_VERSION, itemsize, _ELEMENTS, nbytes, _digest(base), _digest(new))
    rest = b"".join([head, *body])
    data = _SEAL.pack(_MAGIC, _digest(rest)) + rest
    return Difference(data if len(data) < nbytes else None, fraction)


def apply(base_path: Path, delta: Buffer, out_path: Path) -> None:
    """Write base + delta to `out_path`. On an error nothing is left there.

    Raises WeightBaseMismatch when the file is not the base of `delta`, WeightSyncError when the bytes are damaged.
    """
    view = memoryview(delta)
    try:
        head, pieces = _parse(view)
    except (ValueError, struct.error, KeyError) as error:
        raise WeightSyncError(f"the difference of {len(view)} bytes is damaged: {error}") from error
    with base_path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != head.nbytes:
            raise WeightBaseMismatch(f"the difference is for {head.nbytes} bytes, the weights here are {size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as base:
            if (found := _digest(base)) != head.base:
                raise WeightBaseMismatch(
                    f"the difference is to weights with the fingerprint {head.base.hex()}, those here have {found.hex()}"
                )
            try:
                with out_path.open("wb") as out:
                    _write(base, view, head, pieces, out.fileno())
                _check_result(out_path, head)
            except BaseException:  # whatever ends it, half a file must not stay
                out_path.unlink(missing_ok=True)
                raise


@dataclass(frozen=True)
class _Head:
    dtype: np.dtype
    elements: int
    nbytes: int
    base: bytes
    result: bytes


@dataclass(frozen=True)
class _Piece:
    first: int
    """Its first element."""
    size: int
    changed: int
    start: int
    stop: int
    """Its bytes in the difference."""


def _parse(view: memoryview) -> tuple[_Head, list[_Piece]]:
    magic, seal = _SEAL.unpack_from(view)
    if magic != _MAGIC:
        raise ValueError(f"it begins with {magic!r}, not {_MAGIC!r}")
    if _digest(view[_SEAL.size :]) != seal:
        raise ValueError("its checksum is another")
    version, itemsize, elements, nbytes, base, result = _HEADER.unpack_from(view, _SEAL.size)
    if version != _VERSION:
        raise ValueError(f"it has the format {version}, this is {_VERSION}; run the same rlx on both sides")
    head = _Head(_TYPES[itemsize], elements, nbytes, base, result)
    return head, list(_pieces(view, head))


def _pieces(view: memoryview, head: _Head) -> Iterator[_Piece]:
    at, total = _SEAL.size + _HEADER.size, head.nbytes // head.dtype.itemsize
    for first in range(0, total, head.elements):
        changed, length = _PIECE.unpack_from(view, at)
        at += _PIECE.size
        size = min(head.elements, total - first)
        if at + length > len(view):
            raise ValueError(f"the piece at element {first} is longer than it can be")
        yield _Piece(first, size, changed, at, at + length)
        at += length
    if at != len(view):
        raise ValueError(f"{len(view) - at} bytes follow the last piece")


def _write(base: mmap.mmap, view: memoryview, head: _Head, pieces: list[_Piece], out: int) -> None:
    width = head.dtype.itemsize

    def one(piece: _Piece) -> None:
        values = np.frombuffer(base, head.dtype, piece.size, piece.first * width)
        if piece.changed:
            values = values.copy()
            at, steps = _unpack(view[piece.start : piece.stop], piece, head.dtype)
            values[at] += steps
        data, offset = values.data.cast("B"), piece.first * width
        while data:
            written = os.pwrite(out, data, offset)
            data, offset = data[written:], offset + written

    try:
        for _ in _threaded(one, pieces):
            pass
    except (ValueError, IndexError, zlib.error) as error:
        raise WeightSyncError(f"the difference cannot be unpacked: {error}") from error


def _check_result(path: Path, head: _Head) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if (found := _digest(data)) != head.result:
            raise WeightSyncError(
                f"base and difference make weights with the fingerprint {found.hex()}, not {head.result.hex()}"
            )


def _pack(at: np.ndarray, steps: np.ndarray) -> bytes:
    """`at` int64 [K], ascending; `steps` unsigned [K], new - base."""
    if not at.size:
        return b""
    gaps = np.diff(at, prepend=-1) - 1
    runs, rest = np.divmod(gaps, 255)
    ends = np.cumsum(runs + 1) - 1
    coded = np.full(ends[-1] + 1, 255, np.uint8)
    coded[ends] = rest
    bits = 8 * steps.itemsize
    zigzag = (steps << 1) ^ (0 - (steps >> (bits - 1)))
    planes = np.ascontiguousarray(zigzag.view(np.uint8).reshape(-1, steps.itemsize).T)
    # Gaps and steps hardly repeat: run lengths and Huffman codes are as small as a search, and faster.
    deflate = zlib.compressobj(1, strategy=zlib.Z_RLE)
    return deflate.compress(coded.data) + deflate.compress(planes.data) + deflate.flush()


def _unpack(packed: memoryview, piece: _Piece, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `_pack`: positions in the piece, and steps."""
    count, planes_size = piece.changed, piece.changed * dtype.itemsize
    raw = zlib.decompressobj().decompress(packed, count + piece.size // 255 + planes_size + 1)
    coded, planes = np.frombuffer(raw, np.uint8, len(raw) - planes_size), np.frombuffer(raw, np.uint8)[-planes_size:]
    ends = np.flatnonzero(coded != 255)
    if ends.size != count:
        raise ValueError(f"{ends.size} positions for {count} elements")
    at = np.cumsum(coded, dtype=np.int64)[ends] + np.arange(count)
    zigzag = np.ascontiguousarray(planes.reshape(dtype.itemsize, count).T).view(dtype)[:, 0]
    return at, (zigzag >> 1) ^ (0 - (zigzag & 1))


def _digest(data: Any) -> bytes:
    return xxhash.xxh3_128_digest(data)


def _threaded(work: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
    """In order; numpy and zlib let the threads run at once. What has not begun when an item fails never does."""
    with ThreadPoolExecutor(_THREADS, "rlx-delta") as pool:
        yield from pool.map(work, items)
