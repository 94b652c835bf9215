"""The beginning of a safetensors file, read and written: the name, type, shape and place of each tensor.

A file is the length of its header, a little-endian uint64, the header as JSON, then the tensors' bytes. Only the first
two are read here, so that a file of any size costs nothing.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (safetensors code such as BF16) and shape of one parameter, in the Hugging Face naming."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def read_layout(data: bytes | memoryview) -> dict[str, tuple[TensorSpec, int, int]]:
    """name → (spec, first byte, end byte) of each tensor in the bytes of a safetensors file, of which the header is
    enough. struct.error or ValueError where they are none."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(bytes(data[8 : 8 + size]))
    header.pop("__metadata__", None)
    start = 8 + size
    return {
        name: (
            TensorSpec(name, entry["dtype"], tuple(entry["shape"])),
            start + entry["data_offsets"][0],
            start + entry["data_offsets"][1],
        )
        for name, entry in header.items()
    }


def read_specs(file: Path, at_most: int | None = None) -> list[TensorSpec]:
    """The tensors of `file`, of whose header no more than `at_most` bytes are read. OSError, struct.error or ValueError
    where it is no safetensors file."""
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", head := stream.read(8))
        layout = read_layout(head + stream.read(size if at_most is None else min(size, at_most)))
    return [spec for spec, _, _ in layout.values()]


def layout_of(tensors: Sequence[TensorSpec], ends: Sequence[int]) -> bytes:
    """The beginning of a file whose tensor i has the bytes ends[i] to ends[i + 1] of what follows. Its length is a
    multiple of 8."""
    entries = {
        t.name: {"dtype": t.dtype, "shape": t.shape, "data_offsets": [start, end]}
        for t, start, end in zip(tensors, ends, ends[1:], strict=False)
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
