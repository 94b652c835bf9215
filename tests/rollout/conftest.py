"""Real vLLM engines, started once for the whole session: each costs half a minute."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from rlx.rollout.vllm_params import VllmOptions


def vllm_options(model: str) -> VllmOptions:
    return VllmOptions(model=model, max_model_len=1024, kv_cache_gib=0.25, served_model_name="tiny")


def tiny_model(folder: Path) -> None:
    from tiny_models import make_tiny_model  # imports transformers, for seconds

    make_tiny_model(folder)


async def _engine(folder: str, architecture: str, tie: bool) -> AsyncIterator:
    from tiny_models import make_tiny_model

    from rlx.rollout.vllm_engine import VllmEngine

    make_tiny_model(folder, tie=tie, architecture=architecture)
    engine = VllmEngine(vllm_options(folder))
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
