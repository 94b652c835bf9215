"""An `Engine` without a model, for tests and benchmarks: numpy only, real log-probabilities of a toy distribution."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np

from rlx.errors import WeightSyncError
from rlx.rollout.manifest import check_file, check_manifest, fingerprint
from rlx.wire import Completion, Sampling, TensorSpec, WeightManifest

END = 0
"""The token that ends a sequence."""


class FakeEngine:
    """p(next | last token) is a random table that the weights' fingerprint determines; of the sampling parameters it
    honours `max_tokens` and `temperature`.

    `specs` are the tensors that an update must bring. A generated token takes `seconds_per_token`, whatever the
    batch. `fail_next` holds an exception that the next `start`, `generate` or `commit` raises.
    """

    def __init__(
        self,
        specs: tuple[TensorSpec, ...] = (),
        seconds_per_token: float = 0.0,
        seed: int = 0,
        vocab_size: int = 64,
    ):
        self._specs = specs
        self._seconds_per_token = seconds_per_token
        self._vocab_size = vocab_size
        self._rng = np.random.default_rng(seed)
        self._version = 0
        self._logprobs_VV: dict[float, np.ndarray] = {}
        self._logits_VV = self._table("")
        self._open = asyncio.Event()
        self._last_token = time.monotonic()
        self.fail_next: Exception | None = None
        self.in_flight = 0
        """Requests that are generating now."""

    async def start(self) -> None:
        self._fail()
        self._open.set()

    async def generate(self, request_id: str, prompt_ids: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        self._fail()
        self.in_flight += 1
        try:
            return list(await asyncio.gather(*[self._sequence(int(prompt_ids[-1]), sampling) for _ in range(n)]))
        finally:
            self.in_flight -= 1

    async def prompt_logprobs(self, ids: np.ndarray) -> np.ndarray:
        rows = self._logprobs(1.0)[ids[:-1] % self._vocab_size]
        return np.take_along_axis(rows, (ids[1:] % self._vocab_size)[:, None], axis=1)[:, 0].astype(np.float32)

    async def announce(self, manifest: WeightManifest) -> None:
        check_manifest(manifest, self._specs, tied=False, current_version=self._version)

    async def commit(self, manifest: WeightManifest, path: str) -> str:
        self._fail()
        await self.announce(manifest)
        self._open.clear()
        try:
            await asyncio.to_thread(check_file, manifest, Path(path))
            received = fingerprint(await asyncio.to_thread(Path(path).read_bytes))
            if received != manifest.fingerprint:
                raise WeightSyncError(
                    f"weights {manifest.version}: the fingerprint {manifest.fingerprint} was announced, {path} has "
                    f"{received}; version {self._version} keeps serving"
                )
            self._logits_VV = self._table(received)
            self._logprobs_VV.clear()
            self._version = manifest.version
        finally:
            self._open.set()
        return received

    def weight_version(self) -> int:
        return self._version

    def seconds_since_token(self) -> float:
        return time.monotonic() - self._last_token

    async def openai(self, route: str, body: dict[str, Any]) -> dict[str, Any] | AsyncIterator[str]:
        if route not in ("completions", "chat/completions"):
            return {"error": {"code": 404, "message": f"{route!r} is not served here"}}
        [completion] = await self.generate("openai", np.ones(1, np.int32), 1, Sampling(body.get("max_tokens", 16)))
        chat = route == "chat/completions"
        said = {"message": {"role": "assistant", "content": completion.text}} if chat else {"text": completion.text}
        answer = {"object": "fake", "choices": [{"index": 0, **said, "finish_reason": completion.finish_reason}]}
        return _one_event(answer) if body.get("stream") else answer

    async def close(self) -> None:
        self._open.set()

    async def _sequence(self, last: int, sampling: Sampling) -> Completion:
        ids: list[int] = []
        logprobs: list[float] = []
        versions: list[list[int]] = []
        last %= self._vocab_size
        while len(ids) < sampling.max_tokens and (not ids or ids[-1] != END):
            await asyncio.sleep(self._seconds_per_token)
            await self._open.wait()
            row = self._logprobs(sampling.temperature)[last]
            last = min(int(np.searchsorted(np.cumsum(np.exp(row)), self._rng.random())), self._vocab_size - 1)
            ids.append(last)
            logprobs.append(row[last])
            if not versions or versions[-1][0] != self._version:
                versions.append([self._version, 0])
            versions[-1][1] += 1
            self._last_token = time.monotonic()
        return Completion(
            ids=np.asarray(ids, np.int32),
            logprobs=np.asarray(logprobs, np.float32),
            versions=tuple((v, c) for v, c in versions),
            finish_reason="stop" if ids[-1] == END else "length",
            text="".join(chr(97 + i % 26) for i in ids if i != END),
        )

    def _table(self, weights: str) -> np.ndarray:
        """Logits [V, V] of the next token given the last one."""
        rng = np.random.default_rng(list(weights.encode()))
        logits_VV = rng.normal(size=(self._vocab_size, self._vocab_size))
        logits_VV[:, END] -= 4.0
        return logits_VV

    def _logprobs(self, temperature: float) -> np.ndarray:
        if temperature not in self._logprobs_VV:
            scaled = self._logits_VV / temperature
            top = scaled.max(axis=1, keepdims=True)
            self._logprobs_VV[temperature] = scaled - top - np.log(np.exp(scaled - top).sum(axis=1, keepdims=True))
        return self._logprobs_VV[temperature]

    def _fail(self) -> None:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error


async def _one_event(answer: dict[str, Any]) -> AsyncIterator[str]:
    yield f"data: {json.dumps(answer)}\n\n"
    yield "data: [DONE]\n\n"
