"""What runs inside vLLM's worker process: the file transport for weights.

`VllmOptions.worker_extension_cls` makes vLLM import this module in each worker process; the import registers the
transport.
"""

from __future__ import annotations

import atexit
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlx.rollout.manifest import fingerprint, read_layout
from rlx.rollout.vllm_lora import load_adapter
from rlx.rollout.vllm_start import HOST_PID

BACKEND = "rlx_file"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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


class FileWeightTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Loads a whole update from one file. The bytes that are hashed are the bytes that are loaded: one mapping.

    A file that is not what was announced is refused before the model is touched. `report` says how the last
    update went; vLLM's protocol has no way to return it.
    """

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo
    supports_draft_weight_update = False

    report: dict[str, Any]

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Forget the last report; the reload starts in `receive_weights`, once the file has been checked."""
        self.report = {"applied": False, "fingerprint": "", "version": -1}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Without the base class's device synchronisation, which the CPU does not have."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        with open(update_info.path, "rb") as file:
            nbytes = os.fstat(file.fileno()).st_size
            self.report |= {"nbytes": nbytes, "version": update_info.version}
            if nbytes != update_info.nbytes:
                return
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.report["fingerprint"] = fingerprint(memoryview(data))
        if self.report["fingerprint"] != update_info.fingerprint:
            return
        ties = _tied_heads(self.model)
        initialize_layerwise_reload(self.model)
        self.model.load_weights(_tensors(data))
        finalize_layerwise_reload(self.model, self.model_config)
        for head, embedding in ties:
            # The reload restores the head's old packed copy of the shared matrix and says nothing.
            head.weight = embedding.weight
            head.quant_method.process_weights_after_loading(head)
        self.report["applied"] = True

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    def shutdown(self) -> None:
        """Nothing is held."""


class RlxWorkerExtension:
    """Methods that vLLM adds to its worker, called through `collective_rpc`."""

    def rlx_weight_report(self) -> dict[str, Any]:
        """How the last update went on this worker: applied, fingerprint, nbytes, version."""
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


def _tied_heads(model: torch.nn.Module) -> list[tuple[ParallelLMHead, VocabParallelEmbedding]]:
    """Each LM head that shares its matrix with an embedding, with that embedding."""
    layers = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
    heads = [m for m in layers if isinstance(m, ParallelLMHead)]
    embeddings = [m for m in layers if not isinstance(m, ParallelLMHead)]
    return [(h, e) for h in heads for e in embeddings if h.weight.data_ptr() == e.weight.data_ptr() != 0]


def _enter_worker() -> None:
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransferEngine)
    if os.environ.get(HOST_PID, str(os.getpid())) != str(os.getpid()):
        # Without this Python takes seconds to tear down torch after vLLM has freed everything.
        atexit.register(os._exit, 0)


_enter_worker()
