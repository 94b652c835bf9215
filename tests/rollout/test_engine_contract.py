"""What every `Engine` promises, on the fake and on real vLLM."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from weight_updates import model_tensors, random_adapter, train_a_little, write_update

from rlx.errors import RequestTooLong, WeightSyncError
from rlx.rollout.fake_engine import FakeEngine
from rlx.rollout.manifest import WeightManifest
from rlx.safetensors_layout import TensorSpec, read_layout
from rlx.wire import Sampling

pytestmark = pytest.mark.asyncio(loop_scope="session")

PROMPT = np.arange(1, 25, dtype=np.int32)


@dataclass
class Subject:
    """An engine and a way to write updates for it."""

    engine: Any
    tensors: dict[str, torch.Tensor]
    folder: Path

    def update(self, version: int) -> tuple[WeightManifest, str]:
        path = self.folder / f"{version}.safetensors"
        return write_update(path, version, self.tensors), str(path)


_REAL = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(
    params=[
        "fake",
        "fake-adapter",
        pytest.param("vllm", marks=_REAL),
        pytest.param("vllm-adapter", marks=_REAL),
    ]
)
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Subject:
    if request.param == "fake":
        tensors = {"a": torch.randn(3, 4), "b": torch.randn(5)}
        specs = (TensorSpec("a", "F32", (3, 4)), TensorSpec("b", "F32", (5,)))
        engine = FakeEngine(specs, seconds_per_token=0.001, max_model_len=1024)
        asyncio.run(engine.start())
        return Subject(engine, tensors, tmp_path)
    if request.param == "fake-adapter":
        model = {"layer.weight": torch.randn(6, 4), "norm.weight": torch.randn(4)}
        names = ("base_model.model.layer.lora_A.weight", "base_model.model.layer.lora_B.weight")
        specs = tuple(TensorSpec(name, "F32", tuple(t.shape)) for name, t in model.items())
        engine = FakeEngine(specs, seconds_per_token=0.001, max_model_len=1024, lora_rank=2)
        asyncio.run(engine.start())
        return Subject(engine, dict(zip(names, (torch.randn(2, 4), torch.randn(6, 2)), strict=True)), tmp_path)
    if request.param == "vllm-adapter":
        engine, folder, _ = request.getfixturevalue("adapted_qwen3")
        return Subject(engine, random_adapter(folder), tmp_path)
    engine, folder = request.getfixturevalue("tied_qwen2")
    return Subject(engine, _trained(folder), tmp_path)


@functools.cache
def _trained(folder: str) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    train_a_little(model)
    return model_tensors(model)


async def test_completions_have_one_logprob_and_one_version_a_token(subject: Subject) -> None:
    completions = await subject.engine.generate("r", PROMPT, 4, Sampling(max_tokens=20))
    assert len(completions) == 4
    for c in completions:
        assert 1 <= c.ids.size <= 20
        assert c.ids.dtype == np.int32
        assert c.logprobs.dtype == np.float32
        assert c.logprobs.size == c.ids.size
        assert (c.logprobs <= 0).all()
        assert c.versions == ((subject.engine.weight_version(), c.ids.size),)
        assert c.finish_reason == ("length" if c.ids.size == 20 else "stop")
    assert len({c.ids.tobytes() for c in completions}) == 4, "the completions of a group are independent samples"
    assert subject.engine.seconds_since_token() < 60


async def test_reported_logprobs_are_those_of_the_sampled_tokens(subject: Subject) -> None:
    [c] = await subject.engine.generate("r", PROMPT, 1, Sampling(max_tokens=30))
    scored = await subject.engine.prompt_logprobs(np.concatenate([PROMPT, c.ids]))
    assert scored.size == PROMPT.size + c.ids.size - 1
    np.testing.assert_allclose(scored[PROMPT.size - 1 :], c.logprobs, atol=0.05)


async def test_a_low_temperature_is_in_the_reported_logprobs(subject: Subject) -> None:
    warm = await subject.engine.generate("warm", PROMPT, 2, Sampling(max_tokens=30))
    cold = await subject.engine.generate("cold", PROMPT, 2, Sampling(max_tokens=30, temperature=0.05))
    mean = [float(np.mean(np.concatenate([c.logprobs for c in group]))) for group in (warm, cold)]
    assert mean[1] > mean[0] + 1


async def test_a_commit_changes_the_version_of_what_comes_after(subject: Subject) -> None:
    old = subject.engine.weight_version()
    manifest, path = subject.update(old + 1)
    before = await subject.engine.prompt_logprobs(PROMPT)
    await subject.engine.announce(manifest)
    assert subject.engine.weight_version() == old
    assert (await subject.engine.commit(manifest, path)).fingerprint == manifest.fingerprint
    assert subject.engine.weight_version() == old + 1
    [c] = await subject.engine.generate("r", PROMPT, 1, Sampling(max_tokens=5))
    assert c.versions == ((old + 1, c.ids.size),)
    if old == 0:
        assert np.abs(await subject.engine.prompt_logprobs(PROMPT) - before).max() > 0.05


async def test_requests_in_flight_keep_going_over_a_swap_and_their_versions_partition_the_tokens(
    subject: Subject,
) -> None:
    old, before = subject.engine.weight_version(), subject.engine.load().generated_tokens
    running = [
        asyncio.ensure_future(subject.engine.generate(f"r{i}", PROMPT, n, _to_the_end(500)))
        for i, n in enumerate([1, 3])
    ]
    while subject.engine.load().generated_tokens < before + 8:
        await asyncio.sleep(0.001)
        assert not any(task.done() for task in running)
    manifest, path = subject.update(old + 1)
    preemptions = subject.engine.load().preemptions
    await subject.engine.commit(manifest, path)
    completions = [c for group in await asyncio.gather(*running) for c in group]
    assert subject.engine.load().preemptions == preemptions, "a swap says nothing about the size of the cache"
    assert all(sum(n for _, n in c.versions) == c.ids.size == c.logprobs.size for c in completions)
    crossed = [c for c in completions if len(c.versions) == 2]
    assert crossed, "no request was in flight during the swap"
    assert all([v for v, _ in c.versions] == [old, old + 1] for c in crossed)


async def test_cancelling_a_request_aborts_it_in_the_engine(subject: Subject) -> None:
    task = asyncio.ensure_future(subject.engine.generate("r", PROMPT, 3, _to_the_end(900)))
    await asyncio.sleep(0.05)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert subject.engine.in_flight == 0
    assert subject.engine.load().running == subject.engine.load().waiting == 0
    for _ in range(10):  # an engine in another process hears of it a little later, but long before the 900 tokens
        await asyncio.sleep(0.2)
        if (age := subject.engine.seconds_since_token()) > 0.1:
            break
    assert age > 0.1, f"a token was generated {age:.3f} s ago although nobody waits for it"


async def test_its_load_says_what_runs_what_was_generated_and_how_long_it_was_busy(subject: Subject) -> None:
    before = subject.engine.load()
    assert (before.running, before.waiting) == (0, 0)
    task = asyncio.ensure_future(subject.engine.generate("r", PROMPT, 3, _to_the_end(400)))
    while not (during := subject.engine.load()).generated_tokens > before.generated_tokens:
        await asyncio.sleep(0.001)
        assert not task.done()
    assert 1 <= during.running + during.waiting <= 3
    completions = await task
    after = subject.engine.load()
    assert (after.running, after.waiting, after.kv_cache_usage) == (0, 0, 0.0)
    assert after.generated_tokens - before.generated_tokens == sum(c.ids.size for c in completions)
    assert during.busy_s < after.busy_s
    assert after.preemptions >= before.preemptions
    await asyncio.sleep(0.05)
    assert subject.engine.load().busy_s == after.busy_s, "an idle engine is not busy"


async def test_a_prompt_without_room_for_a_completion_is_too_long(subject: Subject) -> None:
    with pytest.raises(RequestTooLong, match="1024"):
        await subject.engine.generate("r", np.ones(1024, np.int32), 2, Sampling(max_tokens=5))
    [c] = await subject.engine.generate("r", np.ones(1023, np.int32), 1, Sampling(max_tokens=5))
    assert c.ids.size == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: replace(m, tensors=m.tensors[1:]), "missing"),
        (lambda m: replace(m, tensors=(*m.tensors, TensorSpec("extra", "F32", (1,)))), "'extra'"),
        (lambda m: replace(m, tensors=(replace(m.tensors[0], shape=(2, 2)), *m.tensors[1:])), "shape"),
        (lambda m: replace(m, tensors=(replace(m.tensors[0], dtype="I64"), *m.tensors[1:])), "dtype"),
    ],
)
async def test_announce_refuses_what_is_not_this_model(subject: Subject, change: Any, message: str) -> None:
    manifest, _ = subject.update(subject.engine.weight_version() + 1)
    with pytest.raises(WeightSyncError, match=message):
        await subject.engine.announce(change(manifest))


async def test_a_version_that_is_not_newer_is_refused(subject: Subject) -> None:
    manifest, path = subject.update(subject.engine.weight_version())
    with pytest.raises(WeightSyncError, match="already serving"):
        await subject.engine.announce(manifest)
    with pytest.raises(WeightSyncError, match="already serving"):
        await subject.engine.commit(manifest, path)


async def test_other_bytes_than_announced_are_refused_and_the_old_version_keeps_serving(subject: Subject) -> None:
    old = subject.engine.weight_version()
    manifest, path = subject.update(old + 1)
    before = await subject.engine.prompt_logprobs(PROMPT)
    running = asyncio.ensure_future(subject.engine.generate("r", PROMPT, 1, Sampling(max_tokens=100)))
    _flip_a_byte(Path(path))
    with pytest.raises(WeightSyncError, match=manifest.fingerprint):
        await subject.engine.commit(manifest, path)
    assert subject.engine.weight_version() == old
    [c] = await running
    assert c.versions == ((old, c.ids.size),)
    np.testing.assert_allclose(await subject.engine.prompt_logprobs(PROMPT), before, atol=1e-3)


async def test_a_file_with_other_tensors_than_announced_is_refused(subject: Subject) -> None:
    old = subject.engine.weight_version()
    manifest, path = subject.update(old + 1)
    name = next(iter(subject.tensors))
    write_update(Path(path), old + 1, {name: subject.tensors[name]})
    with pytest.raises(WeightSyncError, match="does not hold the tensors announced"):
        await subject.engine.commit(manifest, path)
    with pytest.raises(WeightSyncError, match="cannot be read"):
        await subject.engine.commit(manifest, path + ".missing")
    assert subject.engine.weight_version() == old


async def test_openai_routes_answer_in_openai_shape_and_stream(subject: Subject) -> None:
    completion = await subject.engine.openai("completions", {"model": "tiny", "prompt": "hello", "max_tokens": 4})
    assert isinstance(completion["choices"][0]["text"], str)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    answer = await subject.engine.openai("chat/completions", chat)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    lines = [line async for line in await subject.engine.openai("chat/completions", {**chat, "stream": True})]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]\n\n"
    unknown = await subject.engine.openai("nothing", {})
    assert unknown["error"]["code"] == 404


def _to_the_end(tokens: int) -> Sampling:
    """So many, also where the first one could end it."""
    return Sampling(max_tokens=tokens, extra={"ignore_eos": True})


def _flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    _, _, end = next(iter(read_layout(data).values()))
    data[end - 1] ^= 1
    path.write_bytes(data)
