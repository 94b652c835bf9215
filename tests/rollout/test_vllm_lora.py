"""A model trained with LoRA reaches vLLM, merged into the weights or as the adapter alone: after the update the engine's
log-probabilities are the learner's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM
from weight_updates import PROMPT, reference_logprobs, train_a_little

from rlx.config import Config, load_config
from rlx.config.lora import LORA_RANKS
from rlx.errors import WeightSyncError
from rlx.learner.policy.adapters import with_adapter, without_adapter
from rlx.learner.policy.model import load_model
from rlx.learner.weights.publish import Packed, pack
from rlx.rollout.manifest import WeightManifest
from rlx.wire import Sampling

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.vllm, pytest.mark.slow]

TOLERANCE = 0.05
"""Largest difference of a log-probability between vLLM in bfloat16 and the learner in float32."""
ALONE = {"lora_sync": "adapter"}


@pytest.mark.parametrize("keys", [{}, {"peft_use_dora": True}, {"adapter": "qlora"}], ids=str)
async def test_a_trained_adapter_reaches_the_worker_merged(untied_llama, tmp_path: Path, keys: dict[str, Any]) -> None:
    """Without the update the comparison fails, and the model without its adapter is not what the worker has."""
    engine, folder = untied_llama
    await check_two_syncs(engine, config_in(tmp_path, folder, **keys), tmp_path)


@pytest.mark.parametrize(
    "keys",
    [{}, {"peft_use_rslora": True, "lora_r": 3}, {"lora_target_linear": False, "lora_target_modules": ["q_proj", "down_proj"]}],
    ids=str,
)  # fmt: skip
async def test_a_trained_adapter_reaches_the_worker_alone(adapted_qwen3, tmp_path: Path, keys: dict[str, Any]) -> None:
    engine, folder, _ = adapted_qwen3
    await check_two_syncs(engine, config_in(tmp_path, folder, **ALONE | keys), tmp_path)


async def test_a_worker_with_another_base_model_does_not_compute_what_the_learner_does(
    adapted_qwen3, tmp_path: Path
) -> None:
    """Though the bytes that came are those that were sent: this is what the parity gate is for."""
    engine, _, _ = adapted_qwen3
    make_tiny_model(tmp_path / "other", architecture="qwen3", seed=1)
    config = config_in(tmp_path, str(tmp_path / "other"), **ALONE)
    model = with_adapter(load_model(config), config)
    await publish(engine, packed(model, config), tmp_path)
    assert await difference(engine, model) > 4 * TOLERANCE


async def test_each_token_over_a_swap_of_adapters_carries_the_version_that_sampled_it(
    adapted_qwen3, tmp_path: Path
) -> None:
    engine, folder, _ = adapted_qwen3
    config = config_in(tmp_path, folder, **ALONE)
    models = [with_adapter(load_model(config), config) for _ in range(2)]
    train_a_little(models[1], steps=12, lr=1e-2)
    first, second = (packed(model, config) for model in models)
    await publish(engine, first, tmp_path)
    before = engine.load().generated_tokens
    sampling = Sampling(max_tokens=400, temperature=0.8, extra={"ignore_eos": True})
    task = asyncio.ensure_future(engine.generate("r", PROMPT, 6, sampling))
    while engine.load().generated_tokens < before + 60:
        await asyncio.sleep(0.001)
        assert not task.done()
    await publish(engine, second, tmp_path)
    crossed = [c for c in await task if len(c.versions) == 2]
    assert len(crossed) >= 3
    for c in crossed:
        ids = torch.from_numpy(np.concatenate([PROMPT, c.ids])).long()
        by = [reference_logprobs(m, ids, 0.8)[PROMPT.size - 1 :].numpy() for m in models]
        (_, cut), _ = c.versions
        assert np.abs(c.logprobs[:cut] - by[0][:cut]).max() < 2 * TOLERANCE
        assert np.abs(c.logprobs[cut:] - by[1][cut:]).max() < 2 * TOLERANCE
        assert np.abs(by[0] - by[1]).mean() > 10 * TOLERANCE, "the two adapters do not differ enough to tell"


async def test_what_began_before_the_first_adapter_is_of_the_model_alone(adapted_qwen3) -> None:
    _, folder, completions = adapted_qwen3
    model = AutoModelForCausalLM.from_pretrained(folder)
    for c in completions:
        assert c.versions == ((0, c.ids.size),)
        ids = torch.from_numpy(np.concatenate([PROMPT, c.ids])).long()
        expected = reference_logprobs(model, ids)[PROMPT.size - 1 :].numpy()
        assert np.abs(c.logprobs - expected).max() < 2 * TOLERANCE


async def test_openai_requests_are_answered_with_the_adapter(adapted_qwen3, tmp_path: Path) -> None:
    engine, folder, _ = adapted_qwen3
    config = config_in(tmp_path, folder, **ALONE)
    model = with_adapter(load_model(config), config)
    train_a_little(model, lr=1e-2)
    await publish(engine, packed(model, config), tmp_path)
    asked = {"model": "tiny", "prompt": PROMPT.tolist(), "max_tokens": 1, "echo": True, "logprobs": 1}
    answer = await engine.openai("completions", asked)
    found = np.array(answer["choices"][0]["logprobs"]["token_logprobs"][1 : PROMPT.size], np.float32)
    assert np.abs(found - reference_logprobs(model, torch.from_numpy(PROMPT).long()).numpy()).max() < TOLERANCE


async def test_workers_for_models_and_for_adapters_say_so_when_they_get_the_other(
    tied_qwen2, adapted_qwen3, tmp_path: Path
) -> None:
    (whole, folder), (adapted, other, _) = tied_qwen2, adapted_qwen3
    for engine, name, keys, message in (
        (whole, folder, ALONE, "are an adapter, this worker takes whole models; start the service from the YAML"),
        (adapted, other, {}, "is of no adapter, this worker takes nothing else"),
        (adapted, other, ALONE | {"lora_r": 9}, "has rank 9, this worker was started for 8"),
    ):
        config = config_in(tmp_path, name, **keys)
        with pytest.raises(WeightSyncError, match=message):
            await publish(engine, packed(with_adapter(load_model(config), config), config), tmp_path)


async def test_vllm_makes_room_for_the_ranks_that_are_listed() -> None:
    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == LORA_RANKS


def config_in(folder: Path, model: str, **keys: object) -> Config:
    path = folder / "cfg.yaml"
    settings = {"base_model": model, "rl": "grpo", "datasets": [{"path": "d"}], "trl": {"reward_funcs": ["r"]},
                "adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}  # fmt: skip
    path.write_text(yaml.safe_dump(settings | keys))
    return load_config(path)


async def check_two_syncs(engine, config: Config, folder: Path) -> None:
    model = with_adapter(load_model(config), config)
    await publish(engine, packed(model, config), folder)  # other tests left their weights
    assert await difference(engine, model) < TOLERANCE
    for _ in range(2):
        train_a_little(model, lr=1e-2)
        assert await difference(engine, model) > 4 * TOLERANCE
        await publish(engine, packed(model, config), folder)
        assert await difference(engine, model) < TOLERANCE
    with without_adapter(model) as reference:
        assert await difference(engine, reference) > 4 * TOLERANCE


def packed(model: torch.nn.Module, config: Config) -> Packed:
    return pack(model, torch.bfloat16, lora_sync=config.lora_sync)


async def publish(engine, packed: Packed, folder: Path) -> None:
    version = engine.weight_version() + 1
    path = folder / f"{version}.safetensors"
    path.write_bytes(packed.payload)
    manifest = WeightManifest(version, len(packed.payload), packed.fingerprint, packed.tensors)
    assert (await engine.commit(manifest, str(path))).fingerprint == packed.fingerprint


async def difference(engine, model: torch.nn.Module) -> float:
    """Largest |log p(vLLM) - log p(learner)| over the prompt."""
    served = await engine.prompt_logprobs(PROMPT)
    return float(np.abs(served - reference_logprobs(model, torch.from_numpy(PROMPT).long()).numpy()).max())
