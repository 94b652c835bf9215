"""What runs inside vLLM's worker process: the file transport for weights.

`VllmOptions.worker_extension_cls` makes vLLM import this module in each worker process; the import registers the
transport.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlx.imports import loaded
from rlx.rollout.manifest import fingerprint
from rlx.rollout.vllm_lora import load_adapter
from rlx.rollout.vllm_shadow import Shadow, has_room, share, tied_heads
from rlx.rollout.vllm_start import HOST_PID
from rlx.safetensors_layout import read_layout

BACKEND = "rlx_file"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_log = logging.getLogger("vllm.rlx")
_STAGING, _HASHING = ThreadPoolExecutor(1, "rlx-weights"), ThreadPoolExecutor(1, "rlx-fingerprint")


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """The file transport needs no handshake."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """A safetensors file, and the size and xxh3-128 fingerprint that its bytes must have."""

    path: str
    nbytes: int
    fingerprint: str
    version: int


@dataclass(frozen=True)
class _Opened:
    """A file as it was found. `shadow` has its weights already, where that is possible."""

    info: FileUpdateInfo
    nbytes: int
    fingerprint: str = ""
    data: mmap.mmap | None = None
    shadow: Shadow | None = None

    @property
    def as_announced(self) -> bool:
        return (self.nbytes, self.fingerprint) == (self.info.nbytes, self.info.fingerprint)


class FileWeightTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Loads a whole update from one file. The bytes that are hashed are the bytes that are loaded: one mapping.

    A file that is not what was announced is refused before the model is touched. `stage` does beforehand, in a thread,
    what does not need the model to stand still. `report` says how the last update went; vLLM's protocol has no way to
    return it.
    """

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo
    supports_draft_weight_update = False

    report: dict[str, Any]
    _staging: Future[_Opened] | None = None

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """Nothing to connect."""

    def stage(self, info: FileUpdateInfo) -> None:
        """Begin to read the file; returns at once."""
        self._staging = _STAGING.submit(self._open, info, True)

    def staged(self) -> bool:
        return self._staging is None or self._staging.done()

    def start_weight_update(self) -> None:
        """Forget the last report; the reload starts in `receive_weights`, once the file has been checked."""
        self.report = {"applied": False, "fingerprint": "", "version": -1}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Without the base class's device synchronisation, which the CPU does not have."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        staging, self._staging = self._staging, None
        # as long as it takes: the gateway bounds the whole update, and restarts a worker that does not answer
        opened = staging.result() if staging is not None else None
        if opened is None or opened.info != update_info:
            opened = self._open(update_info, False)
        self.report |= {"nbytes": opened.nbytes, "version": update_info.version, "fingerprint": opened.fingerprint}
        if not opened.as_announced:
            return
        self.report["beside"] = opened.shadow is not None
        if opened.shadow is not None:
            opened.shadow.exchange()
        elif opened.data is not None:
            self._reload(opened.data)
        self.report["applied"] = True

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    def shutdown(self) -> None:
        """Nothing is held."""

    def _open(self, info: FileUpdateInfo, beside: bool) -> _Opened:
        """Map and hash the file; `beside` the weights that serve, load it too."""
        with open(info.path, "rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            if nbytes != info.nbytes:
                return _Opened(info, nbytes)
            fcntl.flock(
                file, fcntl.LOCK_SH | fcntl.LOCK_NB
            )  # the learner's own memory is not written again while this mapping lives
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        hashing = _HASHING.submit(fingerprint, memoryview(data))
        opened = _Opened(info, nbytes, data=data)
        if beside and has_room(self.vllm_config, self.device, nbytes):
            shadow = Shadow(self.model, self.vllm_config)
            try:
                shadow.load(_tensors(data))
                opened = replace(opened, shadow=shadow)
            except Exception:  # a model of vLLM's that does not load beside itself is reloaded in its pause
                _log.warning("weights %d are loaded while generation pauses", info.version, exc_info=True)
        return replace(opened, fingerprint=hashing.result())

    def _reload(self, data: mmap.mmap) -> None:
        ties = tied_heads(self.model)
        initialize_layerwise_reload(self.model)
        self.model.load_weights(_tensors(data))
        finalize_layerwise_reload(self.model, self.model_config)
        for head, embedding in ties:
            share(head, embedding)


class RlxWorkerExtension:
    """Methods that vLLM adds to its worker, called through `collective_rpc`."""

    def rlx_stage(self, update_info: dict[str, Any]) -> None:
        """Begin with an update that `rlx_take` then finishes."""
        engine = self.weight_transfer_engine  # type: ignore[attr-defined]
        engine.stage(engine.parse_update_info(update_info))

    def rlx_staged(self) -> bool:
        return bool(self.weight_transfer_engine.staged())  # type: ignore[attr-defined]

    def rlx_take(self, update_info: dict[str, Any]) -> dict[str, Any]:
        """The steps of vLLM's protocol in one call. How it went: applied, fingerprint, nbytes, version."""
        self.start_weight_update()  # type: ignore[attr-defined]
        self.update_weights(update_info)  # type: ignore[attr-defined]
        self.finish_weight_update()  # type: ignore[attr-defined]
        return self.rlx_weight_report()

    def rlx_weight_report(self) -> dict[str, Any]:
        """How the last update went; `beside`: it was loaded while the weights before it served."""
        return self.weight_transfer_engine.report  # type: ignore[attr-defined]

    def rlx_load_adapter(self, path: str, nbytes: int, fingerprint: str, version: int) -> dict[str, Any]:
        """Take the adapter in the file for the one before; the report is as above."""
        return load_adapter(self, path, nbytes, fingerprint, version)


def _tensors(data: mmap.mmap) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor as a view on the mapped file."""
    for name, (spec, start, end) in read_layout(memoryview(data)).items():
        dtype = _DTYPES[spec.dtype]
        count = (end - start) // dtype.itemsize
        yield name, torch.frombuffer(data, dtype=dtype, count=count, offset=start).view(spec.shape)


def _enter_worker() -> None:
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransferEngine)
    if os.environ.get(HOST_PID, str(os.getpid())) != str(os.getpid()):
        # Without this Python takes seconds to tear down torch after vLLM has freed everything.
        atexit.register(os._exit, 0)
        loaded()


_enter_worker()
