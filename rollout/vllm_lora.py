"""An adapter as the policy of a vLLM engine: the request that names it, and how a worker process loads it.

There is one adapter, number 1, and an update replaces it where it is: whatever is in flight goes on with the new one,
as with whole models. Its name and path hold the version, because they are vLLM's key to cached prefixes.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.model_executor.models.interfaces import supports_lora
from vllm.model_executor.models.registry import ModelRegistry

from rlx.rollout import manifest
from rlx.safetensors_layout import read_layout

_NUMBER = 1


def takes_adapters(architecture: str) -> bool | None:
    """Whether vLLM serves models of this class with adapters; None of a class that it has under another name, or not."""
    model = ModelRegistry.models.get(architecture)
    return None if model is None else bool(supports_lora(model.load_model_cls()))


def policy(version: int) -> LoRARequest:
    """What a request is made with, once the adapter of this version was loaded."""
    return LoRARequest(f"policy-{version}", _NUMBER, f"policy-{version}")


def load_adapter(worker: Any, path: str, nbytes: int, fingerprint: str, version: int) -> dict[str, Any]:
    """The report of vLLM's `worker`: applied, fingerprint, nbytes, version. A file that is not what was announced is
    refused, and the adapter before stays. Its A and B are multiplied as they are, without a scale of their own."""
    report = {"applied": False, "fingerprint": "", "nbytes": os.path.getsize(path), "version": version}
    if report["nbytes"] != nbytes:
        return report
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        report["fingerprint"] = manifest.fingerprint(memoryview(data))
        layout = read_layout(memoryview(data))
    if report["fingerprint"] != fingerprint:
        return report
    with tempfile.TemporaryDirectory(prefix="rlx-adapter-") as folder:
        rank = max(spec.shape[0] for name, (spec, _, _) in layout.items() if ".lora_A." in name)
        settings = {"r": rank, "lora_alpha": rank, "target_modules": []}
        (Path(folder) / "adapter_config.json").write_text(json.dumps(settings))
        (Path(folder) / "adapter_model.safetensors").symlink_to(path)
        worker.add_lora(LoRARequest(f"policy-{version}", _NUMBER, folder, load_inplace=True))
    return report | {"applied": True}
