"""What a rollout worker needs of a generation engine. vLLM implements it (`vllm_engine.py`), and so does the fake
that tests and benchmarks use (`fake_engine.py`); one contract test runs on both."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

import numpy as np

from rlx.rollout.manifest import WeightManifest
from rlx.rollout.worker import EngineLoad, Taken
from rlx.wire import Completion, Sampling


class Engine(Protocol):
    """One model on one worker. Every method is called from one event loop; none blocks it for long.

    The life of a weight update is `announce` → `commit` (pause, swap, resume): between the two the engine goes on
    generating with the old weights. Errors are `rlx.errors` (ModelError, WeightSyncError, DeadlineExceeded).
    """

    async def start(self) -> None:
        """Load the model and warm up until the first token came out. ModelError carries the engine's first cause."""

    async def generate(self, request_id: str, prompt_ids: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        """`n` completions of one prompt, `prompt_ids` int32 [P]. Cancelling the coroutine aborts them in the engine."""

    async def prompt_logprobs(self, ids: np.ndarray) -> np.ndarray:
        """log p(ids[t] | ids[:t]) for t = 1 … T-1 at temperature 1: `ids` int32 [T] → float32 [T-1]."""

    async def announce(self, manifest: WeightManifest) -> None:
        """Phase one: check that version, names, dtypes and shapes can be taken. Changes nothing that generates."""

    async def commit(self, manifest: WeightManifest, path: str) -> Taken:
        """Phase two: read the safetensors file at `path` and get ready, swap while generation is paused, keep what is
        in flight, clear the prefix cache, stamp tokens with the new version from here on."""

    def weight_version(self) -> int:
        """The version that the next sampled token will carry."""

    def seconds_since_token(self) -> float:
        """Age of the newest token that this engine really generated, in seconds."""

    def load(self) -> EngineLoad:
        """How busy it is now; cheap, asked for a few times a second."""

    async def openai(self, route: str, body: dict[str, Any]) -> dict[str, Any] | AsyncIterator[str]:
        """Serve an OpenAI-shaped request (`completions` or `chat/completions`); an iterator of server-sent-event
        lines when `body["stream"]`. Errors come back as a dict with an `error` key holding `code` and `message`."""

    async def close(self) -> None:
        """Stop everything the engine started; idempotent."""
