"""After a weight update, vLLM's log-probabilities are those of the weights that were sent, not of the old ones."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from weight_updates import model_tensors, reference_logprobs, train_a_little, write_update

from rlx.wire import Sampling

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.vllm, pytest.mark.slow]

TOLERANCE = 0.05
"""Largest difference of a log-probability between vLLM and transformers, both in bfloat16."""

PROMPT = np.arange(5, 69, dtype=np.int32)


async def test_synced_weights_reach_a_tied_qwen2(tied_qwen2, tmp_path: Path) -> None:
    await _check_two_syncs(*tied_qwen2, tmp_path)


async def test_synced_weights_reach_an_untied_llama(untied_llama, tmp_path: Path) -> None:
    await _check_two_syncs(*untied_llama, tmp_path)


async def test_each_token_of_a_sequence_over_a_swap_carries_the_version_that_sampled_it(
    tied_qwen2, tmp_path: Path
) -> None:
    """The reported log-probabilities are the old model's up to the cut and the new model's from it, to the token."""
    engine, folder = tied_qwen2
    models = {v: AutoModelForCausalLM.from_pretrained(folder) for v in (1, 2)}
    train_a_little(models[2], steps=12)
    base = engine.weight_version()
    await _sync(engine, models[1], base + 1, tmp_path)
    sampling = Sampling(max_tokens=900, temperature=0.8, extra={"ignore_eos": True})
    before = engine.load().generated_tokens
    task = asyncio.ensure_future(engine.generate("r", PROMPT, 6, sampling))
    while engine.load().generated_tokens < before + 60:
        await asyncio.sleep(0.001)
        assert not task.done()
    await _sync(engine, models[2], base + 2, tmp_path)
    crossed = [c for c in await task if len(c.versions) == 2]
    assert len(crossed) >= 3
    for c in crossed:
        ids = torch.from_numpy(np.concatenate([PROMPT, c.ids])).long()
        by = {v: reference_logprobs(m, ids, 0.8)[PROMPT.size - 1 :].numpy() for v, m in models.items()}
        (_, cut), _ = c.versions
        assert np.abs(c.logprobs[:cut] - by[1][:cut]).max() < 2 * TOLERANCE
        assert np.abs(c.logprobs[cut:] - by[2][cut:]).max() < 2 * TOLERANCE
        assert np.abs(by[1] - by[2]).mean() > 10 * TOLERANCE, "the two models do not differ enough to tell"


async def _check_two_syncs(engine, folder: str, tmp_path: Path) -> None:
    """Twice, because a second reload starts from what the first one left."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    await _sync(engine, model, engine.weight_version() + 1, tmp_path)  # other tests left theirs
    for _ in range(2):
        train_a_little(model)
        assert await _difference(engine, model) > TOLERANCE, "without a sync the comparison must fail"
        await _sync(engine, model, engine.weight_version() + 1, tmp_path)
        assert await _difference(engine, model) < TOLERANCE


async def _sync(engine, model: torch.nn.Module, version: int, folder: Path) -> None:
    path = folder / f"{version}.safetensors"
    manifest = write_update(path, version, model_tensors(model))
    assert (await engine.commit(manifest, str(path))).fingerprint == manifest.fingerprint
    [report] = await engine._llm.collective_rpc("rlx_weight_report")
    assert report["beside"], "it was loaded in the pause"


async def _difference(engine, model: torch.nn.Module) -> float:
    """Largest |log p(vLLM) - log p(transformers)| over the prompt."""
    served = await engine.prompt_logprobs(PROMPT)
    return float(np.abs(served - reference_logprobs(model, torch.from_numpy(PROMPT).long()).numpy()).max())
