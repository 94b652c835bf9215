"""Frames: the binary form of what crosses the network between learner and service.

A frame is `b"RLX1"`, a little-endian uint32 header length, a JSON header, then raw blocks. The header lists each
block as `[name, dtype, count]`; token ids are int32, log-probabilities and rewards float32, all little-endian, so
that 1,000 tokens with their log-probabilities cost 8,000 bytes and no per-token Python object. Decoding gives views
on the received bytes. What the headers and blocks mean is in `rlx.wire`.
"""

from __future__ import annotations

import json
import operator
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from rlx.errors import WireError

CONTENT_TYPE = "application/x-rlx"
_MAGIC = b"RLX1"
_MALFORMED = (KeyError, TypeError, ValueError, OverflowError)
_ENCODER = json.JSONEncoder(separators=(",", ":"))
_DTYPES: dict[str, np.dtype[Any]] = {"i4": np.dtype("<i4"), "f4": np.dtype("<f4"), "u1": np.dtype("u1")}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def encode_frame(header: Mapping[str, Any], blocks: Mapping[str, np.ndarray]) -> bytes:
    """One frame. `blocks` are one-dimensional arrays of int32, float32 or uint8."""
    for name, array in blocks.items():
        if array.dtype not in _CODES or array.ndim != 1:
            raise WireError(
                f"block {name!r}: one-dimensional int32, float32 or uint8 expected, got {array.dtype} {array.shape}"
            )
    return encode_parts(header, [(name, _CODES[array.dtype], [array]) for name, array in blocks.items()])


def encode_parts(header: Mapping[str, Any], blocks: list[tuple[str, str, list[np.ndarray]]]) -> bytes:
    """One frame whose blocks come in parts: name, type (i4, f4 or u1), and the arrays that one after the other are the
    content of the block, converted to its type."""
    table, payload = [], []
    for name, code, arrays in blocks:
        dtype = _DTYPES[code]
        table.append([name, code, sum([array.size for array in arrays])])
        payload += [array.astype(dtype, copy=False).tobytes() for array in arrays]
    head = _ENCODER.encode({**header, "blocks": table}).encode()
    return b"".join([_MAGIC, struct.pack("<I", len(head)), head, *payload])


def decode_frame(frame: bytes | memoryview) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and blocks of a frame; the arrays are read-only views on `frame`."""
    view = memoryview(frame)
    if len(view) < 8 or bytes(view[:4]) != _MAGIC:
        raise WireError("not an rlx frame: it does not start with RLX1")
    (head_size,) = struct.unpack("<I", view[4:8])
    try:
        header = json.loads(str(view[8 : 8 + head_size], "utf-8"))
        table = [(str(name), str(code), operator.index(count)) for name, code, count in header.pop("blocks")]
    except (*_MALFORMED, AttributeError, RecursionError) as error:
        raise WireError(f"the header of the frame is not readable: {error}") from error
    offset, blocks = 8 + head_size, {}
    for name, code, count in table:
        if code not in _DTYPES:
            raise WireError(f"block {name!r} has the unknown type {code!r}")
        size = _DTYPES[code].itemsize * count
        if count < 0 or offset + size > len(view):
            raise WireError(f"block {name!r} needs {size} bytes, the frame ends after {len(view) - offset}")
        blocks[name] = np.frombuffer(view, _DTYPES[code], count, offset)
        offset += size
    if offset != len(view):
        raise WireError(f"{len(view) - offset} bytes too many after the last block")
    return header, blocks


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns the errors of a body that does not have the form of `what` into a WireError that says so."""
    try:
        yield
    except KeyError as error:
        raise WireError(f"not a {what}: the field {error.args[0]!r} is missing") from error
    except _MALFORMED as error:
        raise WireError(f"not a {what}: {type(error).__name__}: {error}") from error
