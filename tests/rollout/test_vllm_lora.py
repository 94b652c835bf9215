"""A model trained with LoRA reaches vLLM: after the merged update its log-probabilities are the learner's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from weight_updates import reference_logprobs, train_a_little

from rlx.config import Config, load_config
from rlx.learner.adapters import with_adapter, without_adapter
from rlx.learner.model import load_model
from rlx.learner.publish import Packed, pack
from rlx.wire import WeightManifest

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.vllm, pytest.mark.slow]

TOLERANCE = 0.05
"""Largest difference of a log-probability between vLLM in bfloat16 and the learner in float32."""
PROMPT = np.arange(5, 69, dtype=np.int32)


@pytest.mark.parametrize("dora", [False, True])
async def test_a_trained_adapter_reaches_the_worker_merged(untied_llama, tmp_path: Path, dora: bool) -> None:
    """Without the update the comparison fails, and the model without its adapter is not what the worker has."""
    engine, folder = untied_llama
    config = config_in(tmp_path, folder, peft_use_dora=dora)
    model = with_adapter(load_model(config), config)
    await publish(engine, pack(model, torch.bfloat16), tmp_path)  # other tests left their weights
    assert await difference(engine, model) < TOLERANCE
    for _ in range(2):
        train_a_little(model, lr=1e-2)
        assert await difference(engine, model) > 3 * TOLERANCE
        await publish(engine, pack(model, torch.bfloat16), tmp_path)
        assert await difference(engine, model) < TOLERANCE
    with without_adapter(model) as reference:
        assert await difference(engine, reference) > 3 * TOLERANCE


def config_in(folder: Path, model: str, **keys: object) -> Config:
    path = folder / "cfg.yaml"
    settings = {"base_model": model, "rl": "grpo", "datasets": [{"path": "d"}], "trl": {"reward_funcs": ["r"]},
                "adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}  # fmt: skip
    path.write_text(yaml.safe_dump(settings | keys))
    return load_config(path)


async def publish(engine, packed: Packed, folder: Path) -> None:
    version = engine.weight_version() + 1
    path = folder / f"{version}.safetensors"
    path.write_bytes(packed.payload)
    manifest = WeightManifest(version, len(packed.payload), packed.fingerprint, packed.tensors)
    assert await engine.commit(manifest, str(path)) == packed.fingerprint


async def difference(engine, model: torch.nn.Module) -> float:
    """Largest |log p(vLLM) - log p(learner)| over the prompt."""
    served = await engine.prompt_logprobs(PROMPT)
    return float(np.abs(served - reference_logprobs(model, torch.from_numpy(PROMPT).long()).numpy()).max())
