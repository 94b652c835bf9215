"""Which checkpoint a run goes on from; half-written ones, limits, and the final model as all files or none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fake_service import config_for, serve, write_run
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from rlx.config import Config, load_config
from rlx.errors import ConfigError
from rlx.learner.main import train
from rlx.learner.policy.checkpoints import clear, find_resume_point, save_final, seal
from rlx.learner.policy.kept import CHECKPOINT_MARKER, drop_older, newest


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


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("truncated", r"is damaged: optimizer\.pt has 60 of 100 bytes"),
        ("zeros", r"is damaged: optimizer\.pt has its size, and not what was written"),
        (
            "other optimizer",
            r"holds the states of optimizer: sgd, which adamw_torch cannot go on from; write the former",
        ),
        ("missing", r"is damaged: optimizer\.pt is missing"),
        ("marker", r"is damaged: rlx_state\.json is not readable"),
        ("other version", r"has format 3, this rlx reads formats 1 and 2: it is of another version of rlx"),
    ],
)
@pytest.mark.parametrize("how", ["named", "newest"])
def test_a_damaged_checkpoint_is_told_once_with_what_else_there_is(
    tmp_path: Path, how: str, damage: str, problem: str
) -> None:
    checkpoint(tmp_path / "out", 2, saved_at=1.0)
    folder = tmp_path / "out" / "checkpoint-4"
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(b"x" * 100)
    seal(folder, {"step": 4, "weight_version": 4, "optimizer": "adamw_torch"})
    keys = {"auto_resume_from_checkpoints": True} if how == "newest" else {"resume_from_checkpoint": str(folder)}
    point = find_resume_point(asking(tmp_path, **keys))
    assert point is not None
    assert point.step == 4
    marker = folder / CHECKPOINT_MARKER
    if damage == "truncated":
        (folder / "optimizer.pt").write_bytes(b"x" * 60)
    elif damage == "zeros":
        (folder / "optimizer.pt").write_bytes(b"x" * 60 + bytes(40))
    elif damage == "other optimizer":
        marker.write_text(marker.read_text().replace("adamw_torch", "sgd"))
    elif damage == "missing":
        (folder / "optimizer.pt").unlink()
    elif damage == "marker":
        marker.write_bytes(marker.read_bytes()[:-20])
    else:
        marker.write_text(marker.read_text().replace('"format": 2', '"format": 3'))
    before = sorted((p.name, p.stat().st_size) for p in (tmp_path / "out").rglob("*"))
    with pytest.raises(ConfigError, match=rf"checkpoint-4 {problem}.* Nothing was changed\..*there is: checkpoint-2\."):
        find_resume_point(asking(tmp_path, **keys))
    assert sorted((p.name, p.stat().st_size) for p in (tmp_path / "out").rglob("*")) == before


def test_a_checkpoint_that_is_being_replaced_is_none_until_it_is_whole(tmp_path: Path, config: Config) -> None:
    folder = checkpoint(tmp_path / "out", 4, saved_at=1.0)
    (folder / "stale.bin").write_text("of an earlier run")
    clear(folder)
    folder.mkdir()
    (folder / "model.safetensors").write_text("half")
    assert find_resume_point(config) is None
    seal(folder, {"step": 4, "weight_version": 9})
    point = find_resume_point(config)
    assert point is not None
    assert point.weight_version == 9
    assert not (folder / "stale.bin").exists()


def test_a_run_that_ends_while_it_writes_a_checkpoint_leaves_none(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an earlier run left a whole one of that step."""
    path = write_run(tmp_path, max_steps=1, save_steps=1, test_datasets=None)
    checkpoint(tmp_path / "out", 1, saved_at=1.0)

    def dies(*arguments: object) -> None:
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", dies)
    with serve() as served, pytest.raises(RuntimeError, match="no space left"):
        train(config_for(path, served), 1)
    assert (tmp_path / "out" / "checkpoint-1" / "model.safetensors").exists()
    assert find_resume_point(config) is None


def test_the_newest_checkpoint_is_the_one_that_was_written_last_also_when_the_clock_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoint-9").mkdir()  # not finished
    for step, now in ((1, 5000.0), (2, 1000.0), (3, 1000.0)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        seal(folder, {"step": step, "weight_version": step})
        drop_older(tmp_path, 2)
    assert newest(tmp_path) == folder
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]


def test_a_run_keeps_the_newest_checkpoints_also_beside_those_of_an_earlier_run(tmp_path: Path) -> None:
    path = write_run(tmp_path, max_steps=3, save_steps=1, save_total_limit=2, test_datasets=None)
    old = checkpoint(tmp_path / "out", 30, saved_at=1.0)
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
