"""What the learner announces before a weight update, and the checks of it.

The announcement is a `WeightManifest`, as JSON: the tensors that the bytes will hold, their fingerprint, and the
log-probabilities that a worker is compared by. It is checked against the checkpoint of the service, and the file that
then comes against the announcement.
"""

from __future__ import annotations

import operator
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from rlx.errors import ModelError, WeightSyncError, WireError
from rlx.frame import reading
from rlx.safetensors_layout import TensorSpec, read_specs

_LOADABLE = {"F32", "BF16", "F16"}
_TIED_HEAD = "lm_head.weight"
_SAME_YAML = "start the service from the YAML of the run (adapter, lora_sync, lora_r)"
_SAME_MODEL = "start the service from the YAML of the run, with the same base_model"
_OF_ADAPTER = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<half>[AB])\.weight")
"""PEFT's names"""


@dataclass(frozen=True)
class Offer:
    """The bytes of an update in a file in memory that process `pid` of this machine has open as `fd`."""

    pid: int
    fd: int
    name: str

    @classmethod
    def from_json(cls, body: Any) -> Offer:
        try:
            return cls(int(body["pid"]), int(body["fd"]), str(body["name"]))
        except (TypeError, KeyError, ValueError) as error:
            raise WireError(f"not an offer of weights: {body!r:.100}") from error


@dataclass(frozen=True)
class Probe:
    """Fixed token sequences with the learner's log-probabilities at temperature 1 under the weights of an update:
    `ids[i]` has T_i tokens, `logprobs[i]` the T_i - 1 log-probabilities of all but the first."""

    ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class WeightManifest:
    """What a weight update will bring. `fingerprint` is the xxh3-128 hex digest of the `nbytes` safetensors bytes.

    With `base_fingerprint` only the difference to the update of that fingerprint travels (`rollout/delta.py`), as
    `transfer_nbytes` bytes; size and fingerprint are still those of the whole. `probe` is what a worker's
    log-probabilities are compared with; with `gate` no worker serves these weights before it passed.
    """

    version: int
    nbytes: int
    fingerprint: str
    tensors: tuple[TensorSpec, ...]
    base_fingerprint: str | None = None
    transfer_nbytes: int | None = None
    probe: Probe | None = None
    gate: bool = False

    @property
    def travels(self) -> int:
        """Bytes that the learner sends."""
        return self.nbytes if self.transfer_nbytes is None else self.transfer_nbytes

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(body: Mapping[str, Any]) -> WeightManifest:
        with reading("weight manifest"):
            tensors = tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in body["tensors"])
            base, transfer, probe = body.get("base_fingerprint"), body.get("transfer_nbytes"), body.get("probe")
            return WeightManifest(
                version=int(body["version"]),
                nbytes=int(body["nbytes"]),
                fingerprint=str(body["fingerprint"]),
                tensors=tensors,
                base_fingerprint=None if base is None else str(base),
                transfer_nbytes=None if transfer is None else int(transfer),
                probe=None if probe is None else _probe(probe),
                gate=bool(body.get("gate", False)),
            )


def _probe(body: Mapping[str, Any]) -> Probe:
    ids = tuple(tuple(operator.index(i) for i in sequence) for sequence in body["ids"])
    logprobs = tuple(tuple(float(x) for x in sequence) for sequence in body["logprobs"])
    if [len(i) - 1 for i in ids] != [len(x) for x in logprobs] or not ids or min(map(len, ids)) < 2:
        raise ValueError("a probe needs sequences of two tokens or more, with one log-probability less each")
    return Probe(ids, logprobs)


def fingerprint(data: bytes | memoryview) -> str:
    """xxh3-128 of the bytes, in hex."""
    return xxhash.xxh3_128_hexdigest(data)


def checkpoint_specs(folder: Path) -> tuple[TensorSpec, ...]:
    """Every tensor of the safetensors files in a model's folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no *.safetensors file; save the model with save_pretrained to get one")
    return tuple(spec for file in files for spec in read_specs(file))


def check_file(manifest: WeightManifest, path: Path) -> None:
    """WeightSyncError unless `path` is a safetensors file with exactly the announced tensors. Reads its header only."""
    label = f"weights {manifest.version}"
    try:
        found = set(read_specs(path, at_most=manifest.nbytes))
    except (OSError, struct.error, ValueError) as error:
        raise WeightSyncError(f"{label}: {path} cannot be read as safetensors: {error}") from error
    if odd := sorted(found ^ set(manifest.tensors), key=lambda t: t.name):
        raise WeightSyncError(f"{label}: {path} does not hold the tensors announced, the first is {odd[0].name!r}")


def check_manifest(manifest: WeightManifest, expected: Iterable[TensorSpec], tied: bool, current_version: int) -> None:
    """WeightSyncError unless the update is newer than `current_version` and brings exactly the `expected` tensors.

    A tied model's LM head is the embedding, so it may be sent or not. Any floating dtype that can be converted is fine.
    """
    label = _newer(manifest, current_version)
    want = {t.name: t.shape for t in expected if not (tied and t.name == _TIED_HEAD)}
    have = {t.name: t.shape for t in manifest.tensors if not (tied and t.name == _TIED_HEAD)}
    if any(_OF_ADAPTER.fullmatch(name) for name in have):
        raise WeightSyncError(f"{label} are an adapter, this worker takes whole models; {_SAME_YAML}")
    if unknown := sorted(have.keys() - want.keys()):
        raise WeightSyncError(
            f"{label}: {len(unknown)} tensors are not in this model, the first is {unknown[0]!r}; {_SAME_MODEL}"
        )
    if missing := sorted(want.keys() - have.keys()):
        raise WeightSyncError(
            f"{label}: {len(missing)} tensors of this model are missing, the first is {missing[0]!r}; {_SAME_MODEL}"
        )
    for tensor in manifest.tensors:
        _loadable(label, tensor)
        if tensor.name in want and tensor.shape != want[tensor.name]:
            raise WeightSyncError(
                f"{label}: {tensor.name!r} has the shape {tensor.shape}, this model needs {want[tensor.name]}; {_SAME_MODEL}"
            )


def check_adapter(manifest: WeightManifest, model: Iterable[TensorSpec], max_rank: int, current_version: int) -> None:
    """WeightSyncError unless the update is newer than `current_version` and brings low-rank updates of matrices of
    `model`: for each an A [rank, in] and a B [out, rank], under PEFT's names."""
    label = _newer(manifest, current_version)
    shapes = {t.name: t.shape for t in model}
    halves: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor in manifest.tensors:
        _loadable(label, tensor)
        if (found := _OF_ADAPTER.fullmatch(tensor.name)) is None:
            raise WeightSyncError(
                f"{label}: {tensor.name!r} is of no adapter, this worker takes nothing else; {_SAME_YAML}"
            )
        halves.setdefault(found["layer"], {})[found["half"]] = tensor.shape
    for layer, half in halves.items():
        if half.keys() != {"A", "B"}:
            raise WeightSyncError(f"{label}: of the update of {layer!r} one half is missing")
        shape, rank = shapes.get(f"{layer}.weight"), half["A"][0]
        if shape is None:
            raise WeightSyncError(f"{label}: this model has no layer {layer!r}")
        if half != {"A": (rank, shape[-1]), "B": (shape[0], rank)}:
            raise WeightSyncError(f"{label}: {half} is no low-rank update of {layer!r}, which has the shape {shape}")
        if rank > max_rank:
            raise WeightSyncError(
                f"{label}: {layer!r} has rank {rank}, this worker was started for {max_rank}; {_SAME_YAML}"
            )


def _newer(manifest: WeightManifest, current_version: int) -> str:
    label = f"weights {manifest.version}"
    if manifest.version <= current_version:
        raise WeightSyncError(f"{label}: version {current_version} is already serving; send a greater one")
    return label


def _loadable(label: str, tensor: TensorSpec) -> None:
    if tensor.dtype not in _LOADABLE:
        raise WeightSyncError(f"{label}: {tensor.name!r} has the dtype {tensor.dtype}, send one of {sorted(_LOADABLE)}")
