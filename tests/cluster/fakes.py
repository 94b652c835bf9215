"""Engines, reward functions and a configuration for the tests of `cluster/`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np

from rlx.config import Config, load_config
from rlx.errors import ModelError, ServiceError
from rlx.rollout.engine import Engine
from rlx.rollout.fake_engine import FakeEngine
from rlx.wire import Completion, Sampling

REWARDS = """
import os, signal, threading, time

def length(completions, **kwargs):
    return [float(len(text)) for text in completions]

def in_main_thread(completions, log_metric, **kwargs):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    log_metric("pid", os.getpid())
    return [float(threading.current_thread() is threading.main_thread())] * len(completions)

def hangs_on_odd_steps(completions, trainer_state, **kwargs):
    time.sleep(1000 * (trainer_state.global_step % 2))
    return [1.0] * len(completions)

def ends_its_process(completions, **kwargs):
    os._exit(7)

def raises(completions, **kwargs):
    return [1 / 0]
"""


def write_config(folder: Path, text: str = "", rewards: str = "reward_functions.length", **vllm: Any) -> Config:
    """A configuration in `folder`, with the functions of REWARDS next to it."""
    (folder / "reward_functions.py").write_text(REWARDS)
    lines = [
        "base_model: fake",
        "rl: grpo",
        f"output_dir: {folder / 'out'}",
        "datasets: [{path: none}]",
        f"trl: {{reward_funcs: [{rewards}], max_prompt_length: 16, max_completion_length: 16}}",
        "vllm: {" + ", ".join(f"{key}: {value}" for key, value in vllm.items()) + "}",
        text,
    ]
    path = folder / "config.yaml"
    path.write_text("\n".join(lines))
    return load_config(path)


def fake_engine(config: Config, index: int) -> Engine:
    return TestEngine(seed=index, seconds_per_token=0.001)


def broken_engine(config: Config, index: int) -> Engine:
    engine = FakeEngine()
    engine.fail_next = ModelError("no model here")
    return engine


class TestEngine(FakeEngine):
    """The fake, with switches in the route of `openai`."""

    __test__ = False

    async def generate(self, request_id: str, prompt_ids: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        if request_id == "refuse":
            raise ServiceError("refused: too long")
        if request_id == "bug":
            raise KeyError("a bug")
        return await super().generate(request_id, prompt_ids, n, sampling)

    async def openai(self, route: str, body: dict[str, Any]) -> dict[str, Any] | AsyncIterator[str]:
        if route == "die":
            os._exit(9)
        if route == "in_flight":
            return {"in_flight": self.in_flight}
        if route == "endless":
            return _endless()
        return await super().openai(route, body)


async def _endless() -> AsyncIterator[str]:
    while True:
        yield "data: more\n\n"
        await asyncio.sleep(0.01)
