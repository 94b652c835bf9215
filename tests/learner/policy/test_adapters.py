"""LoRA: what is trained, what the reference is, what the workers get, what is saved, and exact resumption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_service import Served, config_for, lines, serve, write_run
from learner_process import run
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, load_file, save_file
from tiny_models import make_tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from rlx.config import Config, load_config
from rlx.errors import ConfigError
from rlx.learner.main import train
from rlx.learner.microbatches.forward import prepare
from rlx.learner.policy.adapter_weights import published_weights
from rlx.learner.policy.adapters import (
    SETTINGS,
    WEIGHTS,
    adapter_files,
    base_of,
    check_folder,
    with_adapter,
    without_adapter,
)
from rlx.learner.policy.checkpoints import base_fingerprint
from rlx.learner.policy.model import load_model
from rlx.learner.weights.parity import probe_logprobs
from rlx.learner.weights.publish import pack

LORA: dict[str, Any] = {"adapter": "lora", "lora_r": 4, "lora_alpha": 16, "lora_target_linear": True}
IDS = ((72, 101, 108, 108, 111), (5, 6, 7))


def config_of(folder: Path, **keys: Any) -> Config:
    return load_config(write_run(folder, **LORA | keys))


def disturbed(model: nn.Module, by: float = 0.05) -> nn.Module:
    """The adapter is no longer without effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=generator)
    return model


def logprobs(model: nn.Module) -> np.ndarray:
    return np.concatenate(probe_logprobs(model, IDS).logprobs)


def final(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def published(served: Served) -> list[dict[str, Tensor]]:
    return [load(served.worker.published[version]) for version in sorted(served.worker.published)]


KINDS: list[dict[str, Any]] = [
    {},
    {"peft_use_rslora": True},
    {"peft_use_dora": True},
    {"lora_target_linear": False, "lora_target_modules": ["q_proj", "v_proj"]},
    {"lora_target_linear": False, "lora_target_modules": r".*\.1\.mlp\..*_proj"},
    {"lora_modules_to_save": ["norm"]},
]


@pytest.mark.parametrize("keys", KINDS, ids=str)
def test_the_merged_weights_alone_are_the_model_with_its_adapter(tmp_path: Path, keys: dict[str, Any]) -> None:
    config = config_of(tmp_path, **keys)
    plain = load_model(config)
    before = logprobs(plain)
    names = dict(plain.named_parameters()).keys()
    model = with_adapter(plain, config)
    assert np.abs(logprobs(model) - before).max() < 1e-6
    expected = logprobs(disturbed(model))
    assert np.abs(expected - before).max() > 1e-2
    packed = pack(model, torch.float32)
    merged = load(bytes(packed.payload))
    assert merged.keys() == names
    other = load_model(config)
    other.load_state_dict(merged, strict=False)
    assert np.abs(logprobs(other) - expected).max() < 1e-5
    assert np.array_equal(logprobs(model), expected), "packing changed the model"


@pytest.mark.parametrize(
    "keys",
    [{}, {"peft_use_rslora": True}, {"lora_target_modules": r".*\.1\.mlp\..*_proj", "lora_target_linear": False}],
    ids=str,
)
def test_the_adapter_alone_is_what_would_be_merged(tmp_path: Path, keys: dict[str, Any]) -> None:
    """B × A, with no scale beside them, is what an update adds to the matrix of the same name."""
    config = config_of(tmp_path, lora_sync="adapter", **keys)
    plain = load_model(config)
    base = {name: p.detach().clone() for name, p in plain.named_parameters()}
    model = disturbed(with_adapter(plain, config))
    merged = load(bytes(pack(model, torch.float32).payload))
    packed = pack(model, torch.float32, lora_sync="adapter")
    alone = load(bytes(packed.payload))
    assert set(adapter_files(model) or {}) == set(packed.adapter or {})
    assert alone.keys() == load((packed.adapter or {})[WEIGHTS]).keys()
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    updates = {name.removesuffix(".lora_A.weight") for name in alone if ".lora_A." in name}
    assert {f"{name.removeprefix('base_model.model.')}.weight" for name in updates} == changed
    for name in updates:
        matrix = f"{name.removeprefix('base_model.model.')}.weight"
        update = alone[f"{name}.lora_B.weight"] @ alone[f"{name}.lora_A.weight"]
        torch.testing.assert_close(base[matrix] + update, merged[matrix], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "all"}, r"lora_sync: adapter would not bring \S+\.bias to the workers"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"would not bring lm_head\.lora_A\.default\.weight to the workers"),
        ({"modules_to_save": ["norm"]}, r"would not bring \S*norm\.modules_to_save\S* to the workers"),
        ({"use_dora": True}, r"would not bring \S+lora_magnitude_vector\S* to the workers"),
        ({"rank_pattern": {"q_proj": 6}}, r"q_proj has rank 6, and the workers make room for lora_r \(4\)"),
    ],
)  # fmt: skip
def test_an_adapter_in_a_folder_that_cannot_be_sent_alone_is_refused(
    tmp_path: Path, settings: Any, message: str
) -> None:
    keys = {"adapter": "lora", "lora_sync": "adapter", "lora_model_dir": "sft", "lora_r": 4, "lora_alpha": 4}
    config = load_config(write_run(tmp_path, **keys))
    make_tiny_model(tmp_path / "model", tie=False, dtype=torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, **{"target_modules": ["q_proj"]} | settings)
    get_peft_model(load_model(config), lora).save_pretrained(tmp_path / "sft")
    with pytest.raises(ConfigError, match=message):
        with_adapter(load_model(config), config)


@pytest.mark.slow
def test_a_run_that_sends_the_adapter_alone_trains_to_the_same_as_one_that_sends_it_merged(tmp_path: Path) -> None:
    sent, records = {}, {}
    for way in ("adapter", "merged"):
        path = write_run(tmp_path / way, max_steps=2, trl={"beta": 0.1}, lora_sync=way, **LORA)
        with serve() as served:
            train(config_for(path, served), 1)
            sent[way] = published(served)
        records[way] = lines(tmp_path / way / "out" / "metrics.jsonl")
        assert (tmp_path / way / "out" / "best" / WEIGHTS).is_file()
    one, other = (final(tmp_path / way / "out") for way in sent)
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    assert len(sent["adapter"]) == len(sent["merged"]) == 3
    for tensors in sent["adapter"]:
        assert tensors.keys() == one.keys()
    for name, tensor in sent["adapter"][-1].items():
        scale = 4 if ".lora_B." in name else 1
        torch.testing.assert_close(tensor.float(), scale * one[name], atol=1e-7, rtol=8e-3)
    bytes_sent = {way: rows[0]["weights/bytes_sent"] for way, rows in records.items()}
    assert bytes_sent["adapter"] < 0.2 * bytes_sent["merged"]


def test_an_untied_head_and_embedding_can_have_adapters_too(tmp_path: Path) -> None:
    config = config_of(tmp_path, lora_target_modules=["embed_tokens", "lm_head"])
    make_tiny_model(tmp_path / "model", tie=False, dtype=torch.float32)
    model = disturbed(with_adapter(load_model(config), config))
    other = load_model(config)
    other.load_state_dict({name: w.value() for name, w in published_weights(model).items()})
    assert np.abs(logprobs(other) - logprobs(model)).max() < 1e-5
    prepare(base_of(model), config)
    assert np.abs(logprobs(other) - logprobs(model)).max() < 1e-5


@pytest.mark.parametrize(
    "keys", [{"lora_target_modules": ["embed_tokens"]}, {"lora_modules_to_save": ["lm_head"]}], ids=str
)
def test_an_adapter_that_would_part_a_tied_head_from_its_embedding_is_refused(tmp_path: Path, keys: Any) -> None:
    config = config_of(tmp_path, **keys)
    with pytest.raises(ConfigError, match=r"cfg\.yaml: .* one matrix in this model; take them out"):
        with_adapter(load_model(config), config)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora_target_linear": False, "lora_target_modules": ["query"]}, r"cfg\.yaml: lora_target_modules: .*query"),
        ({"lora_modules_to_save": ["score"]}, r"cfg\.yaml: lora_modules_to_save: the model has no layer 'score'"),
    ],
)
def test_layers_that_the_model_does_not_have_are_named(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    config = config_of(tmp_path, **keys)
    with pytest.raises(ConfigError, match=message):
        with_adapter(load_model(config), config)


def test_transposed_layers_are_merged_as_they_are_laid_out(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_positions=64, n_embd=32, n_layer=2, n_head=2))
    state = {name: p.detach().clone() for name, p in plain.named_parameters()}
    model = disturbed(with_adapter(plain, config))
    merged = {name: w.value() for name, w in published_weights(model).items()}
    assert merged.keys() == state.keys()
    other = GPT2LMHeadModel(plain.config)
    other.load_state_dict(merged, strict=False)
    assert np.abs(logprobs(other) - logprobs(model)).max() < 1e-5


def test_the_reference_is_the_model_as_it_was_before_its_adapter_and_has_no_dropout(tmp_path: Path) -> None:
    config = config_of(tmp_path, lora_dropout=0.5, trl={"disable_dropout": False})
    plain = load_model(config)
    before = logprobs(plain)
    model = disturbed(with_adapter(plain, config)).train()
    for layer in plain.model.layers:
        layer.self_attn.attention_dropout = 0.5
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with without_adapter(model) as reference:
        assert np.abs(np.concatenate([_raw(reference, ids) for ids in IDS]) - before).max() < 1e-5
    assert model.training
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert np.abs(logprobs(model) - before).max() > 1e-2
    assert any(m.p == 0.5 for m in model.modules() if isinstance(m, nn.Dropout))
    quiet = with_adapter(load_model(config_of(tmp_path, lora_dropout=0.5)), config_of(tmp_path, lora_dropout=0.5))
    assert not any(m.p for m in quiet.modules() if isinstance(m, nn.Dropout))


def _raw(model: nn.Module, ids: tuple[int, ...]) -> np.ndarray:
    """Without switching the model to evaluation, as the trainer runs it."""
    with torch.no_grad():
        table = model(input_ids=torch.tensor(ids)[None]).logits[0, :-1].log_softmax(-1)
    return table.gather(1, torch.tensor(ids)[1:, None])[:, 0].numpy()


@pytest.mark.slow
def test_a_run_trains_only_the_adapter_and_the_workers_get_it_merged(tmp_path: Path) -> None:
    """The KL is 0 at the first step, and then what the difference to the base model is."""
    path = write_run(tmp_path, max_steps=3, trl={"beta": 0.1}, save_steps=3, gradient_checkpointing=True, **LORA)
    with serve() as served:
        train(config_for(path, served), 1)
        sent = published(served)
    kls = [record["kl"] for record in lines(tmp_path / "out" / "metrics.jsonl")]
    assert kls[0] == pytest.approx(0, abs=1e-7)
    assert all(kl > 1e-4 for kl in kls[1:])
    base = load_file(tmp_path / "model" / "model.safetensors")
    assert all(tensors.keys() == base.keys() for tensors in sent)
    updated = {name for name in base if "_proj.weight" in name}
    same = {name for name in base if torch.equal(sent[-1][name], sent[0][name])}
    assert same == base.keys() - updated
    optimizer = torch.load(tmp_path / "out" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert len(optimizer["state"]) == 2 * len(updated), "A and B of each layer"

    out = tmp_path / "out"
    assert {SETTINGS, WEIGHTS, "tokenizer.json"} <= {p.name for p in out.iterdir()}
    assert not list(out.glob("model*.safetensors"))
    for folder in (out, out / "best", out / "checkpoint-3"):
        AutoTokenizer.from_pretrained(folder)
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), folder)
        merged = loaded.merge_and_unload().state_dict()
        evaluated = json.loads((folder / "evaluation.json").read_text())["step"] if folder.name == "best" else 3
        for name, tensor in sent[evaluated].items():
            torch.testing.assert_close(tensor.float(), merged[name], atol=4e-3, rtol=8e-3)
    assert json.loads((out / SETTINGS).read_text())["base_model_name_or_path"] == str(tmp_path / "model")


@pytest.mark.slow
def test_two_processes_train_to_the_same_adapter_as_one(tmp_path: Path) -> None:
    path = write_run(tmp_path, max_steps=3, test_datasets=None, trl={"beta": 0.1}, **LORA)
    with serve() as served:
        train(config_for(path, served, output_dir=str(tmp_path / "one")), 1)
        status, _, err = run(path, served, 2)
    assert (status, err) == (0, "")
    one, two = final(tmp_path / "one"), final(tmp_path / "out")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=0)
    kls = [[record["kl"] for record in lines(tmp_path / folder / "metrics.jsonl")] for folder in ("one", "out")]
    assert kls[1] == pytest.approx(kls[0], rel=1e-3, abs=1e-7)


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    path = write_run(tmp_path, save_steps=2, test_datasets=None, trl={"beta": 0.1}, peft_use_dora=True, **LORA)
    with serve() as served:
        train(config_for(path, served), 1)
        start = str(tmp_path / "out" / "checkpoint-2")
        train(config_for(path, served, resume_from_checkpoint=start, output_dir=str(tmp_path / "b")), 1)
    whole, resumed = final(tmp_path / "out"), final(tmp_path / "b")
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
    first = load_file(Path(start) / WEIGHTS)
    assert any(not torch.equal(first[name], tensor) for name, tensor in whole.items())


def test_the_base_of_an_adapter_is_known_in_any_dtype_and_told_from_another(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    model = with_adapter(load_model(config), config)
    known = base_fingerprint(model)
    assert known == base_fingerprint(with_adapter(load_model(config).to(torch.bfloat16), config))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1)
    assert base_fingerprint(model) == known
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "layers.1.post_attention_layernorm" in name).add_(0.1)
    assert base_fingerprint(model) != known
    assert base_fingerprint(load_model(config)) is None


def test_a_checkpoint_of_another_kind_of_training_is_refused_before_anything_starts(tmp_path: Path) -> None:
    path = write_run(tmp_path, max_steps=1, save_steps=1, test_datasets=None, **LORA)
    start = tmp_path / "out" / "checkpoint-1"
    with serve() as served:
        train(config_for(path, served), 1)
        asked: dict[str, Any] = {"resume_from_checkpoint": str(start), "output_dir": str(tmp_path / "b")}
        with pytest.raises(ConfigError, match=r"checkpoint-1 has lora_r 4, the YAML 8; write the former"):
            train(config_for(path, served, lora_r=8, **asked), 1)
        with pytest.raises(ConfigError, match=r"checkpoint-1 has lora_alpha 16, the YAML 32"):
            train(config_for(path, served, lora_alpha=32, **asked), 1)
        with pytest.raises(
            ConfigError,
            match=r"checkpoint-1 is of another model .* or its adapter of other layers: .*down_proj\S+ has shape \[.*\] there and none",
        ):
            train(config_for(path, served, lora_target_linear=False, lora_target_modules=["q_proj"], **asked), 1)
        other = tmp_path / "other"
        shutil.copytree(tmp_path / "model", other)
        weights = load_file(other / "model.safetensors")
        weights["model.layers.0.mlp.down_proj.weight"] *= 1.5
        save_file(weights, other / "model.safetensors", {"format": "pt"})
        with pytest.raises(ConfigError, match=r"checkpoint-1 was trained on other weights than those of base_model"):
            train(config_for(path, served, base_model=str(other), **asked), 1)
        whole = write_run(tmp_path / "whole", max_steps=1, save_steps=1, test_datasets=None)
        with pytest.raises(ConfigError, match=r"checkpoint-1 is of an adapter; write `adapter: lora`"):
            train(config_for(whole, served, **asked), 1)
        train(config_for(whole, served), 1)
        start = tmp_path / "whole" / "out" / "checkpoint-1"
        with pytest.raises(ConfigError, match=r"checkpoint-1 is of a whole model; remove `adapter`"):
            train(config_for(path, served, resume_from_checkpoint=str(start)), 1)


@pytest.mark.slow
def test_an_adapter_in_a_folder_is_gone_on_from_and_can_be_the_reference(tmp_path: Path) -> None:
    """`rl_adapter_ref_model`: the KL to that adapter is 0 at the first step, the KL to the base model is not."""
    config = config_of(tmp_path)
    (tmp_path / "sft").mkdir()
    trained = disturbed(with_adapter(load_model(config), config))
    for name, data in (adapter_files(trained) or {}).items():
        (tmp_path / "sft" / name).write_bytes(data)
    keys = {"adapter": "lora", "lora_model_dir": "sft"}
    go_on = load_config(write_run(tmp_path, **keys))
    loaded = with_adapter(load_model(go_on), go_on)
    assert np.abs(logprobs(loaded) - logprobs(trained)).max() < 1e-6
    assert any(p.requires_grad for p in loaded.parameters())
    kls = {}
    for second in (True, False):
        path = write_run(tmp_path, max_steps=2, test_datasets=None, trl={"beta": 0.1}, **keys)
        with serve() as served:
            train(config_for(path, served, rl_adapter_ref_model=second), 1)
        kls[second] = [record["kl"] for record in lines(tmp_path / "out" / "metrics.jsonl")]
    assert kls[True][0] == pytest.approx(0, abs=1e-7)
    assert kls[True][1] > 1e-4
    assert kls[False][0] > 1e-4

    contradicting = load_config(write_run(tmp_path, lora_r=8, **keys))
    with pytest.raises(ConfigError, match=r"lora_model_dir: .*sft has lora_r 4, the YAML 8"):
        check_folder(contradicting)
    empty = load_config(write_run(tmp_path, **keys | {"lora_model_dir": "model"}))
    with pytest.raises(ConfigError, match=rf"lora_model_dir: .*model lacks {SETTINGS} or"):
        check_folder(empty)


def test_the_new_adapter_is_the_same_on_every_rank_and_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    state = torch.get_rng_state()
    first = adapter_files(with_adapter(load_model(config), config))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert adapter_files(with_adapter(load_model(config), config)) == first
