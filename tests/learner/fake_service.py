"""The real service and gateway on a real port, around a worker whose completions are a function of ticket and prompt
alone: two runs get the same rollouts. And a tiny run's folder: model, data, YAML."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tiny_models import make_tiny_model

from rlx.config import Config, load_config
from rlx.config.sections import ServiceSection
from rlx.envs.single_turn import SingleTurn
from rlx.episode import Episode
from rlx.rollout.app import create_app
from rlx.rollout.gateway import bind, serving
from rlx.rollout.manifest import WeightManifest, fingerprint
from rlx.rollout.service import RolloutService
from rlx.rollout.worker import Taken, WorkerStatus
from rlx.wire import Completion, GroupRequest, RewardOutcome, Sampling

TOKEN = "a-token-of-the-tests"
EOS = 256
"""`<|im_end|>` of the tiny tokenizer; the ids below are its bytes."""
START_TIMEOUT_S = 120.0


def place(key: str) -> str:
    """`12ab.../eval3/0` → `eval3/0`, `12ab.../7.1` → `7`: a key without the run and the attempt that it belongs to."""
    return key.partition("/")[2].partition(".")[0]


class ScriptedWorker:
    """Draws each completion from a generator seeded with place, prompt and index. `events` tells what it was asked,
    in order: ("publish", version) and ("generate", place, prompt ids). `lie` is added to the versions it stamps; with
    `slow` it takes up to that many seconds for a group, by chance."""

    name = "worker-0"

    def __init__(self, finish_reason: str = "stop", slow: float = 0.0):
        self.version, self.lie, self._finish_reason = 0, 0, finish_reason
        self._slow, self._rng = slow, random.Random(0)
        self.events: list[tuple[Any, ...]] = []
        self.published: dict[int, bytes] = {}
        self.manifests: dict[int, WeightManifest] = {}

    async def start(self) -> None: ...

    async def status(self) -> WorkerStatus:
        return WorkerStatus(self.name, "ready", self.version, 0.0, 0)

    async def generate(self, request_id: str, prompt_ids: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        self.events.append(("generate", place(request_id), tuple(prompt_ids.tolist())))
        if self._slow:
            await asyncio.sleep(self._rng.random() * self._slow)
        return [self._completion(request_id, prompt_ids, index, sampling) for index in range(n)]

    def _completion(self, request_id: str, prompt_ids: np.ndarray, index: int, sampling: Sampling) -> Completion:
        rng = np.random.default_rng([*place(request_id).encode(), *prompt_ids.tolist(), index])
        ids = rng.integers(33, 127, rng.integers(2, sampling.max_tokens + 1)).astype(np.int32)
        if self._finish_reason == "stop":
            ids[-1] = EOS
        logprobs = rng.normal(-5.5, 0.1, ids.size).astype(np.float32)
        versions = ((self.version + self.lie, ids.size),)
        return Completion(ids, logprobs, versions, self._finish_reason, bytes(i for i in ids if i != EOS).decode())

    async def prompt_logprobs(self, ids: np.ndarray) -> np.ndarray:
        """What the learner said of them."""
        probe = self.manifests[self.version].probe
        assert probe is not None
        return np.array(probe.logprobs[probe.ids.index(tuple(ids.tolist()))], np.float32)

    async def announce(self, manifest: WeightManifest) -> None: ...

    async def commit(self, manifest: WeightManifest, path: str) -> Taken:
        began = time.monotonic()
        data = await asyncio.to_thread(Path(path).read_bytes)
        self.version, self.published[manifest.version] = manifest.version, data
        self.manifests[manifest.version] = manifest
        self.events.append(("publish", manifest.version))
        return Taken(fingerprint(data), time.monotonic() - began)

    async def openai(self, route: str, body: dict[str, Any]) -> dict[str, Any] | AsyncIterator[str]:
        return {}

    async def close(self) -> None: ...


Score = Callable[[GroupRequest, list[Episode]], tuple[dict[str, list[float]], dict[str, float]]]
"""Rewards by function name, NaN for None, and logged metrics; may raise."""


def length_reward(request: GroupRequest, episodes: list[Episode]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Tokens / 10."""
    return {"rewards.length": [e.num_sampled / 10 for e in episodes]}, {}


class ScriptedScorer:
    def __init__(self, score: Score):
        self._score = score

    async def start(self) -> None: ...

    async def score(
        self, request: GroupRequest, episodes: list[Episode]
    ) -> tuple[list[RewardOutcome], dict[str, float]]:
        values, metrics = self._score(request, episodes)
        return [RewardOutcome(name, np.array(v, np.float32), 0.001) for name, v in values.items()], metrics

    async def close(self) -> None: ...


@dataclass
class Served:
    worker: ScriptedWorker
    port: int = 0
    stop: Callable[[], None] = field(default=lambda: None)

    def generated(self, label: str = "") -> list[tuple[str, tuple[int, ...]]]:
        """(place, prompt ids) of the groups whose place begins with `label`, or of those trained: tickets, ascending."""
        asked = [(e[1], e[2]) for e in self.worker.events if e[0] == "generate"]
        if label:
            return sorted((p, ids) for p, ids in asked if p.startswith(label))
        return sorted(((p, ids) for p, ids in asked if p.isdigit()), key=lambda pair: int(pair[0]))


@contextmanager
def serve(
    score: Score = length_reward, finish_reason: str = "stop", worker: Any = None, port: int = 0
) -> Iterator[Served]:
    """A service in a thread of its own, around `worker` or a scripted one; `port` 0 is any that is free."""
    served = Served(worker or ScriptedWorker(finish_reason))
    ready = threading.Event()

    async def main() -> None:
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        settings = ServiceSection(group_timeout=30, publish_timeout=30, drain_timeout=1)
        scorer = ScriptedScorer(score)
        service = RolloutService([served.worker], scorer, SingleTurn(), settings, model="tiny", start_timeout_s=30)
        await service.start()
        listener = bind("127.0.0.1", port)
        served.port = listener.getsockname()[1]
        served.stop = lambda: loop.call_soon_threadsafe(over.set)
        async with serving(create_app(service, TOKEN, False), listener):
            ready.set()
            await over.wait()
        await service.drain(0)

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert ready.wait(START_TIMEOUT_S)
    try:
        yield served
    finally:
        if thread.is_alive():
            served.stop()
        thread.join(START_TIMEOUT_S)


def write_run(folder: Path, dtype: torch.dtype = torch.float32, tie: bool = True, **changes: Any) -> Path:
    """model/, data.jsonl (10 prompts), held_out.jsonl (3) and cfg.yaml in `folder`; `changes` replace keys,
    `trl` and `async_` add; it is a synchronous run without."""
    make_tiny_model(folder / "model", dtype=dtype, tie=tie)
    for name, count in (("data", 10), ("held_out", 3)):
        rows = [{"prompt": f"{name} {i} =", "answer": str(i)} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trl = {
        "num_generations": 4,
        "generation_batch_size": 8,
        "max_completion_length": 12,
        "reward_funcs": ["rewards.length"],
    }
    settings = {
        "base_model": "model",
        "rl": "grpo",
        "datasets": [{"path": "data.jsonl"}],
        "test_datasets": [{"path": "held_out.jsonl"}],
        "trl": trl | changes.pop("trl", {}),
        "async": {"max_staleness": 0} | changes.pop("async_", {}),
        "micro_batch_size": 2,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-4,
        "max_steps": 4,
        "output_dir": str(folder / "out"),
    } | changes
    path = folder / "cfg.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}))
    return path


def config_for(path: Path, served: Served, **overrides: Any) -> Config:
    """The configuration in `path`, with the port of `served`; `trl__beta=0.1` means trl.beta."""
    values = {"vllm__port": served.port} | overrides
    return load_config(path, {tuple(k.split("__")): (f"--{k}", v) for k, v in values.items()})


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, each strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path}: {constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
