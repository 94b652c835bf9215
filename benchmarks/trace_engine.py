"""An engine that replays a trace of completion lengths in the time a real one would take, for any server around it.

A decode step of `batch` sequences takes `Decode.step_s(batch)`; every sequence of the batch gets a token in it, and
at most `slots` are in the batch, as with vLLM's `max_num_seqs`. Between two changes of the batch nothing happens but
one sleep, so that thousands of tokens a second cost no processor time. Not a model: ids and log-probabilities are
constants. `Trace` says how long each completion of each prompt is; `floor_s`, `bounded_floor_s` and `makespan_s` say what
is possible at all.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlx.rollout.manifest import WeightManifest, fingerprint
from rlx.rollout.worker import EngineLoad, Taken
from rlx.wire import Completion, Sampling

FIRST_TICKET = 16
"""Token id of prompt 0: the largest id in a prompt says which prompt it is."""
TOKEN = 7
"""What every completion consists of."""


@dataclass(frozen=True)
class Decode:
    """Seconds of one decode step: `base_s` for the weights, `each_s` more per sequence of the batch."""

    base_s: float
    each_s: float

    def step_s(self, batch: int) -> float:
        return self.base_s + self.each_s * batch


@dataclass(frozen=True)
class Trace:
    """Lengths of `prompts` × `generations` completions: log-normal around `mean` tokens with `sigma`, at most `longest`;
    a share `outliers` is 20 times as long. The same arguments give the same lengths."""

    prompts: int
    generations: int
    mean: float
    sigma: float
    longest: int
    outliers: float = 0.0
    seed: int = 0

    def lengths(self) -> np.ndarray:
        """int64 [prompts, generations]."""
        rng = np.random.default_rng(self.seed)
        drawn = rng.lognormal(-(self.sigma**2) / 2, self.sigma, (self.prompts, self.generations)) * self.mean
        cut = np.minimum(drawn, self.longest)
        cut[rng.random(cut.shape) < self.outliers] *= 20
        return np.maximum(np.rint(cut).astype(np.int64), 1)


def floor_s(tokens: int, decode: Decode, slots: int, speeds: Iterable[float]) -> float:
    """Seconds in which engines with full batches generate `tokens`; `speeds` are 1 for an engine as it should be."""
    return tokens * decode.step_s(slots) / (slots * sum(speeds))


def bounded_floor_s(tokens: Sequence[int], longest: Sequence[int], max_staleness: int, train_s: float, decode: Decode,
                    slots: int, speeds: Sequence[float]) -> float:  # fmt: skip
    """Seconds from the end of step 0 to that of the last, which no schedule with these batches goes below: step s
    consumes `tokens[s]`, and `longest[s]` in one completion.

    The end E of each step is bounded from below, whatever is known in advance. What s consumes was begun after
    E[s - max_staleness - 1], when the weights that it may be of were trained, and was there when s began, E[s] − train_s
    at the latest. So in between fit its longest completion, alone in the fastest engine, and, for each u ≤ s, the tokens
    of steps u to s after E[u - max_staleness - 1], with all batches full. E of the last step is the longest path through
    these. What is consumed in the first steps may have been sampled before, and costs nothing here: a bound, but one that
    a whole run cannot quite reach, as it knows neither lengths nor tails.
    """
    per_token = floor_s(1, decode, slots, speeds)
    alone, ends = decode.step_s(1) / max(speeds), [0.0]
    for s in range(1, len(tokens)):
        least = [ends[s - 1]]
        if s > max_staleness:
            least.append(ends[s - max_staleness - 1] + longest[s] * alone)
        for u in range(max_staleness + 1, s + 1):
            least.append(ends[u - max_staleness - 1] + sum(tokens[u : s + 1]) * per_token)
        ends.append(max(least) + train_s)
    return ends[-1]


def makespan_s(lengths: np.ndarray, decode: Decode, slots: int, engines: int) -> float:
    """Seconds from nothing to the last token of `lengths`, each taken in turn by the engine with the most free slots
    (the tail's smaller batches are faster steps): generation of one synchronous step."""
    waiting = deque(int(length) for length in lengths)
    running: list[list[float]] = [[] for _ in range(engines)]
    clock, at, now = [0.0] * engines, [0.0] * engines, 0.0
    while True:
        while waiting and min(map(len, running)) < slots:
            index = min(range(engines), key=lambda i: len(running[i]))
            heapq.heappush(running[index], clock[index] + waiting.popleft())
        ends = [
            at[i] + (batch[0] - clock[i]) * decode.step_s(len(batch)) if batch else float("inf")
            for i, batch in enumerate(running)
        ]
        now = min(ends)
        if now == float("inf"):
            return max(at)
        for i, batch in enumerate(running):
            if batch:
                clock[i] = batch[0] if ends[i] == now else clock[i] + (now - at[i]) / decode.step_s(len(batch))
                at[i] = now
                while batch and batch[0] <= clock[i] + 1e-9:
                    heapq.heappop(batch)


@dataclass
class _Sequence:
    length: int
    answer: asyncio.Future[Completion]
    begin: float = 0.0
    cuts: list[tuple[float, int]] | None = None
    """The engine's token clock at which each version began to sample this sequence."""


class TraceEngine:
    """Keeps the Engine protocol. `lengths` [prompts, generations]; `speed` 0.1 is ten times slower; a commit pauses
    for `swap_s`. `kill()` fails everything from then on until `start`, as a process that died does."""

    def __init__(
        self, lengths: np.ndarray, decode: Decode, slots: int, *, speed: float = 1.0, swap_s: float = 0.0, seed: int = 0
    ):
        self._lengths, self._decode, self._slots = lengths, decode, slots
        self._speed, self._swap_s = speed, swap_s
        self._running: list[tuple[float, int, _Sequence]] = []
        self._waiting: deque[_Sequence] = deque()
        self._order = itertools.count()
        self._clock, self._at, self._paused = 0.0, time.monotonic(), False
        self._timer: asyncio.TimerHandle | None = None
        self._version, self._generated, self._busy_s = 0, 0.0, 0.0
        self._token_at = time.monotonic()
        self._single: dict[int, int] = {}
        self._dead: Exception | None = None

    # --- the Engine protocol --------------------------------------------------------------------------------------

    async def start(self) -> None:
        self._dead, self._version = None, 0
        self._at = self._token_at = time.monotonic()

    async def generate(self, request_id: str, prompt_ids: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        ticket = int(prompt_ids.max()) - FIRST_TICKET
        if not 0 <= ticket < len(self._lengths):
            return [await self._sequence(1)]
        return list(await asyncio.gather(*(self._sequence(int(self._lengths[ticket, i])) for i in range(n))))

    async def generate_one(self, ticket: int, index: int) -> Completion:
        """Completion `index` of a prompt, for a server that is asked for one at a time."""
        return await self._sequence(int(self._lengths[ticket, index]))

    async def prompt_logprobs(self, ids: np.ndarray) -> np.ndarray:
        return np.full(ids.size - 1, -1.0, np.float32)

    async def announce(self, manifest: WeightManifest) -> None:
        self._check_alive()

    async def commit(self, manifest: WeightManifest, path: str) -> Taken:
        self._check_alive()
        await self.pause()
        try:
            received = fingerprint(await asyncio.to_thread(Path(path).read_bytes))
            await asyncio.sleep(self._swap_s)
        finally:
            self.resume(manifest.version)
        return Taken(received, self._swap_s)

    def weight_version(self) -> int:
        return self._version

    def seconds_since_token(self) -> float:
        return time.monotonic() - (time.monotonic() if self._running and not self._paused else self._token_at)

    def load(self) -> EngineLoad:
        running = len(self._running)
        return EngineLoad(running, len(self._waiting), running / self._slots, 0, int(self._generated), self._busy_s)

    async def openai(self, route: str, body: dict[str, Any]) -> dict[str, Any] | AsyncIterator[str]:
        return {"error": {"code": 404, "message": "not served here"}}

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    # --- what a benchmark does to it ------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        return len(self._running) + len(self._waiting)

    async def pause(self) -> None:
        self._advance()
        self._paused = True

    def resume(self, version: int) -> None:
        self._version, self._paused, self._at = version, False, time.monotonic()
        for _, _, sequence in self._running:
            assert sequence.cuts is not None
            sequence.cuts.append((self._clock, version))
        self._schedule()

    def kill(self, error: Exception) -> None:
        self._advance()
        self._dead = error
        for sequence in [*self._waiting, *(s for _, _, s in self._running)]:
            if not sequence.answer.done():
                sequence.answer.set_exception(error)
        self._waiting.clear()
        self._running.clear()

    # --- time -----------------------------------------------------------------------------------------------------

    async def _sequence(self, length: int) -> Completion:
        self._check_alive()
        sequence = _Sequence(length, asyncio.get_running_loop().create_future())
        self._advance()
        self._waiting.append(sequence)
        self._admit()
        try:
            return await sequence.answer
        finally:
            if sequence.answer.cancelled():
                self._drop(sequence)

    def _drop(self, sequence: _Sequence) -> None:
        self._advance()
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        self._running = [entry for entry in self._running if entry[2] is not sequence]
        heapq.heapify(self._running)
        self._admit()

    def _advance(self) -> None:
        """Give every running sequence the tokens of the time that has passed. Those that ended in it did so at their
        moment, and the next began then, however late this is called: an engine's process does not wait for ours."""
        now = time.monotonic()
        while self._running and not self._paused:
            end, _, sequence = self._running[0]
            ends_at = self._at + max(end - self._clock, 0.0) * self._step_s()
            if ends_at > now:
                break
            self._pass(ends_at)
            heapq.heappop(self._running)
            if not sequence.answer.done():
                sequence.answer.set_result(_completion(sequence))
            self._fill()
        self._pass(now)

    def _pass(self, now: float) -> None:
        if self._running and not self._paused:
            passed = now - self._at
            tokens = passed / self._step_s()
            self._clock += tokens
            self._generated += tokens * len(self._running)
            self._busy_s += passed
            self._token_at = now
        self._at = now

    def _step_s(self) -> float:
        return self._decode.step_s(len(self._running)) / self._speed

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._slots:
            sequence = self._waiting.popleft()
            sequence.begin, sequence.cuts = self._clock, [(self._clock, self._version)]
            heapq.heappush(self._running, (self._clock + sequence.length, next(self._order), sequence))

    def _admit(self) -> None:
        self._fill()
        self._schedule()

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running and not self._paused:
            left = (self._running[0][0] - self._clock) * self._step_s()
            self._timer = asyncio.get_running_loop().call_later(max(left, 0.0), self._wake)

    def _wake(self) -> None:
        self._advance()
        self._admit()

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise self._dead


def _completion(sequence: _Sequence) -> Completion:
    assert sequence.cuts is not None
    ends = [min(round(clock - sequence.begin), sequence.length) for clock, _ in sequence.cuts[1:]] + [sequence.length]
    versions, done = [], 0
    for (_, version), end in zip(sequence.cuts, ends, strict=True):
        if end > done:
            versions.append((version, end - done))
            done = end
    n = sequence.length
    return Completion(np.full(n, TOKEN, np.int32), np.full(n, -1.0, np.float32), tuple(versions), "stop", "")
