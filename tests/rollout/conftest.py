"""Real vLLM engines, started once for the whole session: each costs half a minute."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
from vllm_parts import vllm_options

from rlx.wire import Sampling


async def _engine(folder: str, architecture: str, tie: bool, **options: Any) -> AsyncIterator:
    from tiny_models import make_tiny_model

    from rlx.rollout.vllm_engine import VllmEngine

    make_tiny_model(folder, tie=tie, architecture=architecture)
    engine = VllmEngine(replace(vllm_options(folder), **options))
    await engine.start()
    yield engine, folder
    await engine.close()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def tied_qwen2(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator:
    """(engine, model folder)"""
    async for pair in _engine(str(tmp_path_factory.mktemp("qwen2")), "qwen2", tie=True):
        yield pair


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def untied_llama(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator:
    """(engine, model folder)"""
    async for pair in _engine(str(tmp_path_factory.mktemp("llama")), "llama", tie=False):
        yield pair


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def adapted_qwen3(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator:
    """(engine, model folder, completions) of an engine that takes adapters of rank 8. It has one; the completions, of
    `weight_updates.PROMPT`, were being sampled when that came."""
    from weight_updates import PROMPT, random_adapter, write_update

    folder = tmp_path_factory.mktemp("qwen3")
    async for engine, model in _engine(str(folder), "qwen3", tie=True, lora_rank=8):
        sampling = Sampling(max_tokens=300, extra={"ignore_eos": True})
        before = engine.load().generated_tokens
        task = asyncio.ensure_future(engine.generate("first", PROMPT, 2, sampling))
        while engine.load().generated_tokens < before + 10:
            await asyncio.sleep(0.001)
            assert not task.done()
        manifest = write_update(folder / "1", 1, random_adapter(model))
        await engine.commit(manifest, str(folder / "1"))
        yield engine, model, await task
