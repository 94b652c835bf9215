"""QLoRA: an adapter over a base model in 4 bits. The workers get what the learner multiplies with, not quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_service import config_for, lines, serve, write_run
from safetensors.torch import load, load_file
from torch import nn

from rlx.config import Config, load_config
from rlx.errors import ConfigError
from rlx.learner.main import train
from rlx.learner.policy.adapters import WEIGHTS, with_adapter, without_adapter
from rlx.learner.policy.model import load_model
from rlx.learner.weights.parity import probe_logprobs
from rlx.learner.weights.publish import pack

QLORA: dict[str, Any] = {
    "adapter": "qlora",
    "lora_r": 4,
    "lora_alpha": 16,
    "lora_target_modules": ["q_proj", "down_proj"],
}
IDS = ((72, 101, 108, 108, 111), (5, 6, 7))


def config_of(folder: Path, **keys: Any) -> Config:
    return load_config(write_run(folder, **QLORA | keys))


def logprobs(model: nn.Module) -> np.ndarray:
    return np.concatenate(probe_logprobs(model, IDS).logprobs)


def train_a_little(model: nn.Module, steps: int = 8) -> list[float]:
    """The losses of a few AdamW steps on fixed tokens."""
    ids_BT = torch.arange(96).reshape(4, 24) % 50 + 40
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "keys",
    [{}, {"bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}}, {"peft_use_dora": True}],
    ids=str,
)  # fmt: skip
def test_the_published_weights_are_what_the_quantised_learner_computes_with(
    tmp_path: Path, keys: dict[str, Any]
) -> None:
    """Also after evaluations, in which bitsandbytes would repack the matrices of some CPUs."""
    config = config_of(tmp_path, **keys)
    plain = load_model(load_config(write_run(tmp_path)))
    model = with_adapter(load_model(config), config)
    in_4_bits = [name for name, p in model.named_parameters() if p.dtype == torch.uint8]
    assert len(in_4_bits) == 7 * plain.config.num_hidden_layers
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    before = logprobs(model)
    assert np.abs(before - logprobs(plain)).max() > 1e-3, "4 bits change nothing?"
    losses = train_a_little(model)
    assert losses[-1] < losses[0] - 0.3
    expected = logprobs(model)
    assert np.abs(expected - before).max() > 0.1
    published = load(bytes(pack(model, torch.float32).payload))
    assert published.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(published, strict=False)
    assert np.abs(logprobs(plain) - expected).max() < 1e-4
    with without_adapter(model) as reference:
        assert np.abs(logprobs(reference) - before).max() < 1e-5


def test_gradients_after_an_evaluation_are_those_before(tmp_path: Path) -> None:
    config = config_of(tmp_path)

    def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
        ids_BT = torch.arange(96).reshape(4, 24) + 40
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    model = with_adapter(load_model(config), config).train()
    before = gradients(model)
    logprobs(model)
    after = gradients(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())
    assert any(gradient.abs().max() > 0 for gradient in before.values())


@pytest.mark.slow
def test_a_run_trains_resumes_and_saves_the_adapter_alone(tmp_path: Path) -> None:
    path = write_run(tmp_path, max_steps=4, save_steps=2, test_datasets=None, trl={"beta": 0.1}, **QLORA)
    with serve() as served:
        train(config_for(path, served), 1)
        first, *_, last = (load(served.worker.published[v]) for v in sorted(served.worker.published))
        start = str(tmp_path / "out" / "checkpoint-2")
        train(config_for(path, served, resume_from_checkpoint=start, output_dir=str(tmp_path / "b")), 1)
    assert lines(tmp_path / "out" / "metrics.jsonl")[0]["kl"] == pytest.approx(0, abs=1e-6)
    base = load_file(tmp_path / "model" / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in base.items()}
    assert {name: tensor.shape for name, tensor in first.items()} == shapes
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed == {name for name in base if "q_proj.weight" in name or "down_proj.weight" in name}
    assert not list((tmp_path / "out").glob("model*.safetensors"))
    whole, resumed = (load_file(folder / WEIGHTS) for folder in (tmp_path / "out", tmp_path / "b"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_without_bitsandbytes_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    monkeypatch.setattr("rlx.learner.policy.quantized.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"cfg\.yaml: adapter: qlora needs the package bitsandbytes.*'rlx\[qlora\]'"):
        load_model(config)
