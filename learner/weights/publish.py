"""The learner's side of a weight update: parameters to bytes to every worker, with a version that only grows.

    snapshot (main thread): parameters ─► safetensors bytes in the rollout dtype, and the probe's log-probs
    send (any thread):      the difference to what the service holds, or all ─► announce ─► transfer ─► commit

Not here: when to publish (`incoming/feed.py`), the format of a difference (`rollout/delta.py`).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import nn

from rlx.errors import WeightBaseMismatch
from rlx.learner.policy.adapter_weights import Weight, adapter_weights, published_weights
from rlx.learner.policy.adapters import adapter_files
from rlx.learner.policy.sharding import is_sharded, whole
from rlx.learner.weights.handoff import Buffers
from rlx.learner.weights.parity import ProbeIds, probe_logprobs
from rlx.rollout import delta
from rlx.rollout.client import PhaseTimes, RolloutClient
from rlx.rollout.manifest import Offer, Probe, WeightManifest, fingerprint
from rlx.safetensors_layout import TensorSpec, layout_of

LoraSync = Literal["adapter", "merged"]
_CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class PublishTimes:
    """Seconds of one update: `total_s` for all of `send` or `publish`, `transfer_s` while the bytes were on their way,
    `pause_s` for the longest pause of a worker.

    `nbytes` were sent. `changed_fraction` of the elements differ from the update before, NaN where that is not known.
    `behind` names the workers that did not take it.
    """

    total_s: float
    transfer_s: float
    pause_s: float
    nbytes: int
    changed_fraction: float
    behind: tuple[str, ...] = ()
    announce_s: float = 0.0
    commit_s: float = 0.0
    ended_at: float = 0.0
    """On time.monotonic(), when it was committed"""
    snapshot_s: float = 0.0
    """Before it: copying the parameters, and the probe's log-probs; of `total_s` only in `publish`"""

    def metrics(self) -> dict[str, float]:
        """`weights/…` by their names in metrics.jsonl."""
        known = {} if math.isnan(self.changed_fraction) else {"weights/changed_fraction": self.changed_fraction}
        return {"weights/bytes_sent": float(self.nbytes)} | known


@dataclass(frozen=True)
class Packed:
    """The weights at one moment.

    `payload`, read-only, is a safetensors file: the whole model, with its adapter merged in where it has one, or with
    `lora_sync: adapter` the adapter alone. `itemsize`: bytes of one element. `adapter`: the adapter's files as PEFT
    saves them, by name; None without one. `offer`: where a service on this machine can read the payload.
    """

    payload: memoryview
    tensors: tuple[TensorSpec, ...]
    itemsize: int
    probe: Probe | None = None
    adapter: dict[str, bytes] | None = None
    snapshot_s: float = 0.0
    offer: Offer | None = None

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.payload)


@dataclass
class _Service:
    """What one process of the service is known to have."""

    base: Packed | None = None
    """What it committed last."""
    version_known: bool = False


class Publisher:
    """Publishes the model of one learner. `version` is what the service last committed, None before the first.

    With `buffers` the service reads the bytes where they are, if it can. Else they are sent, and the next as the
    difference to them. The first update, and the first after `forget`, brings everything and is verified on every
    worker before that generates. Any thread may call `send` and `forget`; one update is on its way at a time.
    """

    def __init__(
        self,
        client: RolloutClient,
        dtype: torch.dtype,
        last_version: int = 0,
        *,
        probe_ids: ProbeIds = (),
        transfer: Literal["auto", "full"] = "auto",
        lora_sync: LoraSync = "merged",
        call_ranks: Callable[[], None] = lambda: None,
        buffers: Buffers | None = None,
    ):
        """`call_ranks` has the other ranks `join_snapshot`, where the model is cut over them."""
        self._call_ranks = call_ranks
        self._client, self._dtype, self._floor = client, dtype, last_version
        self._buffers = buffers
        self._probe_ids, self._transfer, self._lora_sync = probe_ids, transfer, lora_sync
        self._turn = threading.Lock()
        self._service = _Service()
        self._committed: Packed | None = None
        self.version: int | None = None

    def publish(self, model: nn.Module) -> PublishTimes:
        """`snapshot` and `send`; `total_s` is of both."""
        started = time.perf_counter()
        packed = self.snapshot(model)
        return replace(self.send(packed), total_s=time.perf_counter() - started)

    def snapshot(self, model: nn.Module) -> Packed:
        """A copy of the parameters of `model`, which is not wrapped for data parallelism, and the probe's log-probs."""
        started = time.perf_counter()
        if is_sharded(model):
            self._call_ranks()
        probe = probe_logprobs(model, self._probe_ids) if self._probe_ids else None
        packed = pack(model, self._dtype, probe, self._lora_sync, self._buffers)
        return replace(packed, snapshot_s=time.perf_counter() - started)

    def send(self, packed: Packed, on_version: Callable[[int], None] = lambda version: None) -> PublishTimes:
        """The service serves these weights when this returns; `on_version` hears their version before the service does.

        Weights that were committed last keep their version where the service has an older one: a service that was
        started anew gets them back. Raises ServiceUnavailable, WeightSyncError (also ParityError) or DeadlineExceeded;
        `version` is then as before, and `send` may be called again.
        """
        with self._turn:
            started, service = time.perf_counter(), self._service
            version = self._next_version(packed, service)
            on_version(version)
            try:
                manifest, times, changed = self._transmit(packed, version, service)
            except BaseException:  # whatever it was, what was asked for may have happened all the same
                service.version_known = False
                raise
            service.base = self._committed = packed
            self.version = version
        total_s = time.perf_counter() - started
        return PublishTimes(
            total_s, times.transfer_s, times.pause_s, manifest.travels, changed, times.behind,
            times.announce_s, times.commit_s, time.monotonic(), packed.snapshot_s,
        )  # fmt: skip

    def forget(self) -> None:
        """The service is another process than before: it has nothing, and its workers are to be verified."""
        self._service = _Service()

    def _next_version(self, packed: Packed, service: _Service) -> int:
        if not service.version_known:
            serving = int(self._client.workers()["weight_version"])
            service.version_known = True
            if packed is self._committed and self.version is not None and serving < self.version:
                return self.version
            self._floor = max(self._floor, serving)
        return max(self._floor, self.version or 0) + 1

    def _transmit(self, packed: Packed, version: int, service: _Service) -> tuple[WeightManifest, PhaseTimes, float]:
        """The manifest that was committed, its times, and the changed fraction."""
        whole = WeightManifest(
            version, len(packed.payload), packed.fingerprint, packed.tensors,
            probe=packed.probe, gate=service.base is None,
        )  # fmt: skip
        if self._buffers is not None and packed.offer is not None:
            self._buffers.open(packed.offer)
            times = self._client.publish(whole, packed.payload, packed.offer)
            if not times.taken_over:  # it is on another machine behind this address, or may not look
                self._buffers = None
            return whole, times, math.nan
        changed = math.nan
        if service.base is not None and self._transfer == "auto":
            found = delta.encode(service.base.payload, packed.payload, packed.itemsize)
            changed = found.changed_fraction
            if found.data is not None:
                part = replace(whole, base_fingerprint=service.base.fingerprint, transfer_nbytes=len(found.data))
                try:
                    return part, self._client.publish(part, found.data), changed
                except WeightBaseMismatch:
                    pass  # it holds other weights; it gets everything
        return whole, self._client.publish(whole, packed.payload), changed


def join_snapshot(model: nn.Module, probe_ids: ProbeIds, lora_sync: LoraSync) -> None:
    """What the other ranks do while rank 0 takes a snapshot of a model that is cut over all of them."""
    if probe_ids:
        probe_logprobs(model, probe_ids)
    for weight in _weights(model, lora_sync).values():
        whole(weight.value())
    adapter_files(model)


def _weights(model: nn.Module, lora_sync: LoraSync) -> dict[str, Weight]:
    return adapter_weights(model) if lora_sync == "adapter" else published_weights(model)


def pack(
    model: nn.Module,
    dtype: torch.dtype,
    probe: Probe | None = None,
    lora_sync: LoraSync = "merged",
    buffers: Buffers | None = None,
) -> Packed:
    """The parameters of `model` in Hugging Face naming as safetensors bytes of `dtype`; with `lora_sync` adapter those of
    its adapter, in PEFT's naming.

    A tied head is one parameter and travels once, under the embedding's name. One copy: each parameter is converted
    into its place. An adapter is merged in float32, layer by layer, and the model stays as it is.
    """
    weights = _weights(model, lora_sync)
    tensors = tuple(TensorSpec(name, _CODES[dtype], w.shape) for name, w in weights.items())
    ends = np.cumsum([0, *(math.prod(t.shape) * dtype.itemsize for t in tensors)]).tolist()
    head = layout_of(tensors, ends)
    nbytes, offer = len(head) + ends[-1], None
    if buffers is not None:
        payload, offer = buffers.take(nbytes)
    else:
        payload = memoryview(np.empty(nbytes, np.uint8))  # type: ignore[arg-type]
    payload[: len(head)] = head
    for weight, tensor, start, end in zip(weights.values(), tensors, ends, ends[1:], strict=False):
        value = whole(weight.value())
        if start < end:
            place = torch.frombuffer(payload, dtype=dtype, count=value.numel(), offset=len(head) + start)
            place.view(tensor.shape).copy_(value)
    return Packed(payload.toreadonly(), tensors, dtype.itemsize, probe, adapter_files(model), offer=offer)
