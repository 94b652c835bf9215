"""The learner's side of a weight update: parameters to bytes to every worker, with a version that only grows.

rank 0: parameters → safetensors bytes (rollout dtype) → announce → transfer → commit on every worker's ack
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import xxhash
from safetensors.torch import save
from torch import nn

from rlx.rollout.client import RolloutClient
from rlx.wire import TensorSpec, WeightManifest

_CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class PublishTimes:
    """Seconds: all of it, and the part in which workers were paused to swap."""

    total_s: float
    pause_s: float


class Publisher:
    """Publishes the model of one learner. `version` is what every worker serves, or None before the first publish."""

    def __init__(self, client: RolloutClient, dtype: torch.dtype, last_version: int = 0):
        self._client, self._dtype = client, dtype
        self._floor = last_version
        self.version: int | None = None

    def publish(self, model: nn.Module) -> PublishTimes:
        """Every worker serves these parameters when this returns. Raises WeightSyncError or DeadlineExceeded."""
        started = time.perf_counter()
        if self.version is None:
            self._floor = max(self._floor, int(self._client.workers()["weight_version"]))
        version = (self.version if self.version is not None else self._floor) + 1
        manifest, payload = pack(model, self._dtype, version)
        times = self._client.publish(manifest, payload)
        self.version = version
        return PublishTimes(time.perf_counter() - started, times.commit_s)


def pack(model: nn.Module, dtype: torch.dtype, version: int) -> tuple[WeightManifest, bytes]:
    """The parameters of `model` in Hugging Face naming as safetensors bytes of `dtype`, and their manifest.

    A tied head is one parameter and travels once, under the embedding's name.
    """
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in model.named_parameters()}
    payload = save(tensors)
    specs = tuple(TensorSpec(name, _CODES[dtype], tuple(t.shape)) for name, t in tensors.items())
    return WeightManifest(version, len(payload), xxhash.xxh3_128_hexdigest(payload), specs), payload
