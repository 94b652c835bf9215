"""A weight update in the steps of vLLM's weight-transfer protocol. `client` has AsyncLLM's methods for it."""

from __future__ import annotations

import asyncio
from typing import Any

from rlx.rollout.manifest import WeightManifest

_FIRST_LOOK_S, _LAST_LOOK_S = 0.001, 0.01
_TORCH_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


async def stage_file(client: Any, manifest: WeightManifest, path: str) -> None:
    """Every worker reads the file, compares its fingerprint and prepares what it can, while it generates."""
    await client.collective_rpc("rlx_stage", args=(_file(manifest, path),))
    pause_s = _FIRST_LOOK_S
    while not all(await client.collective_rpc("rlx_staged")):
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 1.3, _LAST_LOOK_S)


async def update_from_file(client: Any, manifest: WeightManifest, path: str) -> list[dict[str, Any]]:
    """Have every worker load the file; their reports: applied, fingerprint, nbytes, version. Generation is paused."""
    reports: list[dict[str, Any]] = await client.collective_rpc("rlx_take", args=(_file(manifest, path),))
    return reports


async def adapter_from_file(client: Any, manifest: WeightManifest, path: str) -> list[dict[str, Any]]:
    """The same for an adapter, which takes the place of the one before."""
    return await client.collective_rpc("rlx_load_adapter", kwargs=_file(manifest, path))


async def join_nccl(client: Any, init_info: dict[str, Any]) -> None:
    """Join the trainer's NCCL group. Not yet run on GPUs."""
    from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

    await client.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))


async def update_over_nccl(client: Any, manifest: WeightManifest) -> None:
    """Receive the manifest's tensors, in its order, while the trainer broadcasts them. Not yet run on GPUs.

    NCCL brings tensors, not bytes: there is no fingerprint to compare, and the parity probe is the only proof.
    """
    info = {
        "names": [t.name for t in manifest.tensors],
        "dtype_names": [_TORCH_DTYPES[t.dtype] for t in manifest.tensors],
        "shapes": [list(t.shape) for t in manifest.tensors],
    }
    from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

    await client.start_weight_update()
    await client.update_weights(WeightTransferUpdateRequest(update_info=info))
    await client.finish_weight_update()


def _file(manifest: WeightManifest, path: str) -> dict[str, Any]:
    return {
        "path": path,
        "nbytes": manifest.nbytes,
        "fingerprint": manifest.fingerprint,
        "version": manifest.version,
    }
