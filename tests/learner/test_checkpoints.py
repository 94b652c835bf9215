"""Which checkpoint a run goes on from; half-written ones, limits, and the final model as all files or none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from fake_service import config_for, serve, write_run
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlx.config import Config, load_config
from rlx.errors import ConfigError
from rlx.learner.checkpoints import find_resume_point, save_final
from rlx.learner.main import train
from rlx.learner.trainer import CHECKPOINT_MARKER


def checkpoint(out: Path, step: int, saved_at: float, version: int = 1) -> Path:
    folder = out / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    state = {"step": step, "weight_version": version, "saved_at": saved_at}
    (folder / CHECKPOINT_MARKER).write_text(json.dumps(state))
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """`auto_resume_from_checkpoints` with the output in tmp_path/out."""
    return asking(tmp_path, auto_resume_from_checkpoints=True)


def asking(folder: Path, **keys: object) -> Config:
    path = folder / "cfg.yaml"
    path.write_text(
        json.dumps({"base_model": "m", "rl": "grpo", "datasets": [{"path": "d"}], "output_dir": str(folder / "out"),
                    "trl": {"reward_funcs": ["r"]}, **keys})
    )  # fmt: skip
    return load_config(path)


def test_nothing_to_resume_is_a_new_run(config: Config) -> None:
    assert find_resume_point(config) is None


def test_the_newest_complete_checkpoint_is_resumed_not_that_of_the_most_steps(tmp_path: Path, config: Config) -> None:
    """checkpoint-30 is of an earlier run in the same folder; the newest, checkpoint-4, was not finished."""
    checkpoint(tmp_path / "out", 30, saved_at=100.0)
    checkpoint(tmp_path / "out", 2, saved_at=200.0, version=7)
    (tmp_path / "out" / "checkpoint-4").mkdir()
    (tmp_path / "out" / "checkpoint-last").mkdir()
    point = find_resume_point(config)
    assert point is not None
    assert (point.folder.name, point.step, point.weight_version) == ("checkpoint-2", 2, 7)


def test_a_named_checkpoint_that_is_not_complete_is_refused_and_the_complete_ones_are_told(tmp_path: Path) -> None:
    checkpoint(tmp_path / "out", 2, saved_at=1.0)
    half = tmp_path / "out" / "checkpoint-4"
    half.mkdir()
    with pytest.raises(
        ConfigError,
        match=r"cfg.yaml: resume_from_checkpoint: .*checkpoint-4 is no complete checkpoint .* there is: checkpoint-2\.",
    ):
        find_resume_point(asking(tmp_path, resume_from_checkpoint=str(half)))
    with pytest.raises(ConfigError, match=r"Remove the key to start anew\."):
        find_resume_point(asking(tmp_path, resume_from_checkpoint="nowhere", output_dir=str(tmp_path / "other")))


def test_a_checkpoint_is_named_relative_to_the_yaml(tmp_path: Path) -> None:
    checkpoint(tmp_path / "out", 2, saved_at=1.0)
    point = find_resume_point(asking(tmp_path, resume_from_checkpoint="out/checkpoint-2"))
    assert point is not None
    assert point.step == 2


def test_a_run_keeps_the_newest_checkpoints_also_beside_those_of_an_earlier_run(tmp_path: Path) -> None:
    path = write_run(tmp_path, max_steps=3, save_steps=1, save_total_limit=2, test_datasets=None)
    old = checkpoint(tmp_path / "out", 30, saved_at=1.0)
    os.utime(old, (1.0, 1.0))
    with serve() as served:
        train(config_for(path, served), 1)
        point = find_resume_point(config_for(path, served, auto_resume_from_checkpoints=True))
    assert not old.exists()
    assert sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert point is not None
    assert (point.step, point.weight_version) == (3, 3)


def test_the_final_model_replaces_an_older_one_and_a_half_written_draft(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    out = tmp_path / "out"
    (out / ".final").mkdir(parents=True)
    (out / ".final" / "model-00001-of-00002.safetensors").write_text("half")
    (out / "config.json").write_text("an older one")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(3.0)
    save_final(model, AutoTokenizer.from_pretrained(tmp_path / "model"), torch.bfloat16, out)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert (loaded.model.norm.weight == 3).all()
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        p.name for p in out.iterdir()
    }
    assert not list(out.glob("model-*"))
    assert not (out / ".final").exists()
