"""An `Engine` without a model, for tests and benchmarks: numpy only, real log-probabilities of a toy distribution.

One loop decodes for all sequences, a step at a time, as a real engine does: a step takes `decode_s(batch size)`
seconds, those beyond `max_num_seqs` or `kv_tokens` wait, and the youngest is preempted when the others need its room.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlx.errors import RequestTooLong, ServiceUnavailable, WeightSyncError
from rlx.rollout.manifest import WeightManifest, check_adapter, check_file, check_manifest, fingerprint
from rlx.rollout.worker import EngineLoad, Taken
from rlx.safetensors_layout import TensorSpec
from rlx.wire import Completion, Sampling

END = 0
"""The token that ends a sequence."""


@dataclass(eq=False)
class _Sequence:
    prompt_size: int
    last: int
    room: int
    """Tokens after which it ends, with the finish reason `at_room`."""
    at_room: str
    temperature: float
    uniform: Callable[[], float]
    done: asyncio.Future[Completion]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[list[int]] = field(default_factory=list)
    runs: bool = False

    @property
    def tokens(self) -> int:
        return self.prompt_size + len(self.ids)


class FakeEngine:
    """p(next | last token) is a random table that the weights' fingerprint determines; of the sampling parameters it
    honours `max_tokens` and `temperature`.

    `specs` are the tensors that an update must bring, or with `lora_rank` those that an adapter may update.
    A step of the whole batch takes `seconds_per_token`, or `decode_s(batch size)` seconds; up to `stride` steps are
    taken at once (cheaper, less exact).
    `length_of(request_id, index)` fixes the lengths of completions, in tokens; END is then a token like any other.
    `deterministic`: what is sampled depends on the request id, the index in it and the weights alone.
    `kv_tokens`: tokens, prompts included, that the key-value cache holds.
    `fail_next` holds an exception that the next `start`, `generate` or `commit` raises.
    `close` and `start` make a fresh process: version 0, nothing running.
    """

    def __init__(
        self,
        specs: tuple[TensorSpec, ...] = (),
        seconds_per_token: float = 0.0,
        seed: int = 0,
        vocab_size: int = 64,
        *,
        decode_s: Callable[[int], float] | None = None,
        length_of: Callable[[str, int], int] | None = None,
        deterministic: bool = False,
        stride: int = 1,
        max_num_seqs: int | None = None,
        kv_tokens: int | None = None,
        max_model_len: int | None = None,
        lora_rank: int | None = None,
    ):
        self._specs, self._lora_rank = specs, lora_rank
        self._decode_s = decode_s or (lambda batch: seconds_per_token)
        self._length_of, self._deterministic, self._stride = length_of, deterministic, stride
        self._max_num_seqs, self._kv_tokens, self._max_model_len = max_num_seqs, kv_tokens, max_model_len
        self._vocab_size = vocab_size
        self._random = random.Random(seed)
        self._sequences: list[_Sequence] = []
        self._decoding: asyncio.Task[None] | None = None
        self._generated = self._preemptions = 0
        self._busy_s = 0.0
        self._open = asyncio.Event()
        self._last_token = time.monotonic()
        self._closed = False
        self._load_weights(0, "")
        self.fail_next: Exception | None = None
        self.in_flight = 0
        """Requests that are generating now."""

    async def start(self) -> None:
        self._fail()
        await self.close()
        self._closed = False
        self._load_weights(0, "")
        self._open.set()

    async def generate(self, request_id: str, prompt_ids: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        self._fail()
        if self._closed:
            raise ServiceUnavailable("this engine was closed")
        if self._max_model_len is not None and prompt_ids.size >= self._max_model_len:
            raise RequestTooLong(f"a prompt of {prompt_ids.size} tokens leaves no room in {self._max_model_len}")
        sequences = [self._sequence(request_id, index, prompt_ids, sampling) for index in range(n)]
        self._sequences += sequences
        if self._decoding is None or self._decoding.done():
            self._decoding = asyncio.create_task(self._decode(), name="decode")
            self._decoding.add_done_callback(self._stopped)
        self.in_flight += 1
        try:
            return list(await asyncio.gather(*[s.done for s in sequences]))
        finally:
            self.in_flight -= 1
            gone = set(sequences)
            self._sequences = [s for s in self._sequences if s not in gone]

    async def prompt_logprobs(self, ids: np.ndarray) -> np.ndarray:
        rows = self._logprobs(1.0)[ids[:-1] % self._vocab_size]
        return np.take_along_axis(rows, (ids[1:] % self._vocab_size)[:, None], axis=1)[:, 0].astype(np.float32)

    async def announce(self, manifest: WeightManifest) -> None:
        if self._lora_rank is not None:
            check_adapter(manifest, self._specs, self._lora_rank, self._version)
        else:
            check_manifest(manifest, self._specs, tied=False, current_version=self._version)

    async def commit(self, manifest: WeightManifest, path: str) -> Taken:
        self._fail()
        await self.announce(manifest)
        self._open.clear()
        closed_at = time.monotonic()
        try:
            await asyncio.to_thread(check_file, manifest, Path(path))
            received = fingerprint(await asyncio.to_thread(Path(path).read_bytes))
            if received != manifest.fingerprint:
                raise WeightSyncError(
                    f"weights {manifest.version}: the fingerprint {manifest.fingerprint} was announced, {path} has "
                    f"{received}; version {self._version} keeps serving"
                )
            self._load_weights(manifest.version, received)
        finally:
            self._open.set()
        return Taken(received, time.monotonic() - closed_at)

    def weight_version(self) -> int:
        return self._version

    def seconds_since_token(self) -> float:
        return time.monotonic() - self._last_token

    def load(self) -> EngineLoad:
        running = [s.tokens for s in self._sequences if s.runs]
        return EngineLoad(
            running=len(running),
            waiting=len(self._sequences) - len(running),
            kv_cache_usage=min(1.0, sum(running) / self._kv_tokens) if self._kv_tokens else 0.0,
            preemptions=self._preemptions,
            generated_tokens=self._generated,
            busy_s=self._busy_s,
        )

    async def openai(self, route: str, body: dict[str, Any]) -> dict[str, Any] | AsyncIterator[str]:
        if route not in ("completions", "chat/completions"):
            return {"error": {"code": 404, "message": f"{route!r} is not served here"}}
        [completion] = await self.generate("openai", np.ones(1, np.int32), 1, Sampling(body.get("max_tokens", 16)))
        chat = route == "chat/completions"
        said = {"message": {"role": "assistant", "content": completion.text}} if chat else {"text": completion.text}
        answer = {"object": "fake", "choices": [{"index": 0, **said, "finish_reason": completion.finish_reason}]}
        return _one_event(answer) if body.get("stream") else answer

    async def close(self) -> None:
        self._closed = True
        self._open.set()
        if self._decoding is not None and not self._decoding.done():
            self._decoding.cancel()
            await asyncio.wait([self._decoding])

    def _sequence(self, request_id: str, index: int, prompt_ids: np.ndarray, sampling: Sampling) -> _Sequence:
        room, at_room = sampling.max_tokens, "length"
        if self._max_model_len is not None:
            room = min(room, self._max_model_len - prompt_ids.size)
        if self._length_of is not None and (length := max(1, self._length_of(request_id, index))) <= room:
            room, at_room = length, "stop"
        return _Sequence(
            prompt_size=prompt_ids.size,
            last=int(prompt_ids[-1]) % self._vocab_size,
            room=room,
            at_room=at_room,
            temperature=sampling.temperature,
            uniform=(random.Random(f"{request_id}/{index}") if self._deterministic else self._random).random,
            done=asyncio.get_running_loop().create_future(),
        )

    async def _decode(self) -> None:
        """Steps until no sequence is left. They are due by the clock, so that late wake-ups do not add up."""
        due = time.monotonic()
        while self._sequences:
            began, batch = time.monotonic(), self._batch()
            steps = min(self._stride, *(s.room - len(s.ids) for s in batch)) if self._stride > 1 else 1
            due += steps * self._decode_s(len(batch))
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if not self._open.is_set():
                await self._open.wait()
                due = time.monotonic()
            for sequence in batch:
                if not sequence.done.done():
                    self._advance(sequence, steps)
            self._last_token = time.monotonic()
            self._busy_s += self._last_token - began
            self._sequences = [s for s in self._sequences if not s.done.done()]

    def _stopped(self, decoding: asyncio.Task[None]) -> None:
        """Whoever still waits for a loop that failed, or that `close` ended, hears of it."""
        closed = ServiceUnavailable("this engine was closed")
        cause = closed if decoding.cancelled() else decoding.exception()
        for sequence in self._sequences:
            if cause is not None and not sequence.done.done():
                sequence.done.set_exception(cause)

    def _batch(self) -> list[_Sequence]:
        """Those that decode now: the oldest, as many as have room."""
        batch: list[_Sequence] = []
        held = 0
        for sequence in self._sequences:
            held += sequence.tokens + 1
            no_room = self._kv_tokens is not None and held > self._kv_tokens and len(batch) > 0
            if no_room or len(batch) == self._max_num_seqs:
                self._preemptions += sequence.runs
                sequence.runs = False
            else:
                sequence.runs = True
                batch.append(sequence)
        return batch

    def _advance(self, sequence: _Sequence, steps: int) -> None:
        logprobs_VV, cumulative_VV = self._distribution(sequence.temperature)
        last, before = sequence.last, len(sequence.ids)
        for _ in range(steps):
            row = last
            last = min(bisect_right(cumulative_VV[row], sequence.uniform()), self._vocab_size - 1)
            sequence.ids.append(last)
            sequence.logprobs.append(logprobs_VV[row][last])
            if last == END and self._length_of is None:
                break
        sequence.last, sampled = last, len(sequence.ids) - before
        self._generated += sampled
        if not sequence.versions or sequence.versions[-1][0] != self._version:
            sequence.versions.append([self._version, 0])
        sequence.versions[-1][1] += sampled
        if last == END and self._length_of is None:
            sequence.done.set_result(_completion(sequence, "stop"))
        elif len(sequence.ids) >= sequence.room:
            sequence.done.set_result(_completion(sequence, sequence.at_room))

    def _load_weights(self, version: int, weights: str) -> None:
        """Logits [V, V] of the next token given the last one, of the weights with this fingerprint."""
        rng = np.random.default_rng(list(weights.encode()))
        self._logits_VV = rng.normal(size=(self._vocab_size, self._vocab_size))
        self._logits_VV[:, END] -= 4.0
        self._version = version
        self._distributions: dict[float, tuple[list[list[float]], list[list[float]]]] = {}

    def _logprobs(self, temperature: float) -> np.ndarray:
        scaled = self._logits_VV / temperature
        top = scaled.max(axis=1, keepdims=True)
        return scaled - top - np.log(np.exp(scaled - top).sum(axis=1, keepdims=True))

    def _distribution(self, temperature: float) -> tuple[list[list[float]], list[list[float]]]:
        """Log-probabilities and cumulative probabilities [V, V]; lists, as single look-ups in an array are slow."""
        if temperature not in self._distributions:
            logprobs_VV = self._logprobs(temperature)
            cumulative_VV = np.cumsum(np.exp(logprobs_VV), axis=1)
            self._distributions[temperature] = logprobs_VV.tolist(), cumulative_VV.tolist()
        return self._distributions[temperature]

    def _fail(self) -> None:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error


def _completion(sequence: _Sequence, finish_reason: str) -> Completion:
    return Completion(
        ids=np.asarray(sequence.ids, np.int32),
        logprobs=np.asarray(sequence.logprobs, np.float32),
        versions=tuple((v, c) for v, c in sequence.versions),
        finish_reason=finish_reason,
        text="".join(chr(97 + i % 26) for i in sequence.ids if i != END),
    )


async def _one_event(answer: dict[str, Any]) -> AsyncIterator[str]:
    yield f"data: {json.dumps(answer)}\n\n"
    yield "data: [DONE]\n\n"
