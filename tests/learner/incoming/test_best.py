"""The best model: what it is, when it changes, and that a crash leaves it whole."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from fake_service import write_run
from safetensors.torch import load_file
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlx.config import Config, load_config, parse_overrides
from rlx.learner.incoming import best
from rlx.learner.incoming.best import BestModel
from rlx.learner.incoming.evaluation import Evaluation
from rlx.learner.policy.model import load_model
from rlx.learner.weights.publish import pack
from rlx.tokenizer import load_tokenizer


def evaluation(step: int, reward: float) -> Evaluation:
    return Evaluation(step, step + 1, 3, 2, reward, {"r": reward}, {"1": 0.5, "2": math.nan}, 0, 5.0, 0.1)


def shifted(model: PreTrainedModel, by: float) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by
    return model


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_run(tmp_path, dtype=torch.bfloat16), {})


def changed(config: Config, key: str, value: str) -> Config:
    return load_config(config.path, parse_overrides([f"--{key}", value]))


def best_of(config: Config, resumed: bool = False) -> BestModel:
    return BestModel(config, load_tokenizer(config), Path(config.output_dir), resumed)


def kept(config: Config) -> float:
    reward: float = json.loads((Path(config.output_dir) / "best" / "evaluation.json").read_text())["reward"]
    return reward


def left_behind(config: Config) -> list[str]:
    return sorted(path.name for path in Path(config.output_dir).iterdir())


@pytest.mark.parametrize("tie", [True, False])
def test_the_best_model_loads_with_its_tokenizer_and_has_the_packed_weights(
    tmp_path: Path, config: Config, tie: bool
) -> None:
    make_tiny_model(tmp_path / "model", tie=tie)
    model = shifted(load_model(config), 0.25)
    sent = pack(model, torch.bfloat16)
    assert best_of(config).consider(evaluation(3, 0.5), sent)
    folder = Path(config.output_dir) / "best"
    assert (folder / "model.safetensors").read_bytes() == sent.payload
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    ours, theirs = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].bfloat16(), theirs[name]) for name in ours)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert (tied, "lm_head.weight" in theirs) == (tie, not tie)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.bfloat16()(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a b").input_ids == load_tokenizer(config)("a b").input_ids
    assert tokenizer.chat_template
    record = json.loads((folder / "evaluation.json").read_text())
    assert (record["step"], record["weight_version"], record["reward"]) == (3, 4, 0.5)
    assert (folder / "generation_config.json").is_file()


def test_the_type_of_the_engines_is_that_of_the_best_model(config: Config) -> None:
    config = changed(config, "vllm.dtype", "float32")
    model = load_model(config)
    best_of(config).consider(evaluation(0, 0.0), pack(model, torch.float32))
    folder = Path(config.output_dir) / "best"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(folder).parameters()} == {torch.float32}


def test_only_a_better_evaluation_changes_it(config: Config) -> None:
    model, kept_best = load_model(config), best_of(config)
    outcome = [
        kept_best.consider(evaluation(step, reward), pack(shifted(model, 1.0), torch.bfloat16))
        for step, reward in enumerate([math.nan, -0.5, 0.2, 0.2, 0.1, 0.3, math.nan])
    ]
    assert outcome == [False, True, True, False, False, True, False]
    assert kept(config) == 0.3
    weights = load_file(Path(config.output_dir) / "best" / "model.safetensors")
    expected = dict(shifted(load_model(config), 6.0).named_parameters())["model.norm.weight"]
    assert torch.equal(weights["model.norm.weight"], expected.bfloat16())
    assert left_behind(config) == ["best"]


def test_a_resumed_run_remembers_the_better_score_and_a_new_one_begins_anew(config: Config) -> None:
    model = load_model(config)
    best_of(config).consider(evaluation(2, 0.5), pack(model, torch.bfloat16))
    assert not best_of(config, resumed=True).consider(evaluation(4, 0.4), pack(model, torch.bfloat16))
    assert kept(config) == 0.5
    assert best_of(config, resumed=True).consider(evaluation(4, 0.6), pack(model, torch.bfloat16))
    assert best_of(config, resumed=False).consider(evaluation(0, 0.1), pack(model, torch.bfloat16))
    assert kept(config) == 0.1
    assert best_of(config, resumed=True).is_best(evaluation(1, 0.2))


def test_switched_off_it_writes_nothing(config: Config) -> None:
    config = changed(config, "save_best", "false")
    assert not best_of(config).is_best(evaluation(0, 1.0))
    assert not best_of(config).consider(evaluation(0, 1.0), pack(load_model(config), torch.bfloat16))
    assert not Path(config.output_dir).exists()


class Crash(Exception):
    pass


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("survived", range(20))
def test_a_crash_anywhere_leaves_all_files_or_none(
    config: Config, monkeypatch: pytest.MonkeyPatch, before: bool, survived: int
) -> None:
    """After `survived` of the calls that change the disk nothing more happens, and the run is started again."""
    model, count, rmtree = load_model(config), 0, shutil.rmtree
    if before:
        best_of(config).consider(evaluation(1, 0.5), pack(model, torch.bfloat16))
    new = pack(shifted(model, 1.0), torch.bfloat16)

    def dying(real):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal count
            count += 1
            if count > survived:
                if real is rmtree:  # which a crash can interrupt
                    next(iter(sorted(args[0].glob("*"))), args[0] / "nothing").unlink(missing_ok=True)
                raise Crash
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(best, "_to_disk", dying(best._to_disk))
        patch.setattr(best, "write_atomically", dying(best.write_atomically))
        patch.setattr(Path, "write_bytes", dying(Path.write_bytes))
        patch.setattr(Path, "replace", dying(Path.replace))
        patch.setattr(best.shutil, "rmtree", dying(best.shutil.rmtree))
        try:
            best_of(config).consider(evaluation(3, 0.75), new)
            crashed = False
        except Crash:
            crashed = True
    resumed = best_of(config, resumed=True)
    folder = Path(config.output_dir) / "best"
    if not folder.exists():
        assert crashed
        assert not before
        assert resumed.is_best(evaluation(3, -9.0))
        return
    same = (folder / "model.safetensors").read_bytes() == new.payload
    assert kept(config) == (0.75 if same else 0.5)
    assert crashed or same
    assert crashed or survived > 12
    assert not crashed or survived < 19
    assert len(list(folder.iterdir())) == 7
    assert resumed.is_best(evaluation(4, kept(config) + 0.01))
    assert not resumed.is_best(evaluation(4, kept(config)))
    AutoModelForCausalLM.from_pretrained(folder)
