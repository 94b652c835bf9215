"""Recorded rollouts are trained on again without a service; a run that was stopped, however, goes on bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_service import ScriptedWorker, Served, config_for, lines, serve, write_run
from learner_process import LIMIT_S, gone, run, start
from safetensors.torch import load_file
from tiny_models import make_tiny_model

from rlx.errors import ConfigError, DatasetError
from rlx.learner.incoming.recording import OPEN_BATCH
from rlx.learner.main import train
from rlx.learner.policy.kept import CHECKPOINT_MARKER
from rlx.processes import descendants, end_processes

pytestmark = pytest.mark.slow

NOBODY = Served(ScriptedWorker(), port=1)
"""Where no service is"""
EVERYTHING = {
    "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5, "entropy_coef": 0.02,
    "use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef_delta": 0.01, "disable_dropout": False,
}  # fmt: skip
"""Each key adds something that a checkpoint must keep: reference, coefficient, and with dropout the random numbers."""
REUSED = {"num_iterations": 2, "steps_per_generation": 8, "generation_batch_size": None}


def recorded(folder: Path, **changes: Any) -> Path:
    """The YAML of a run with dropout whose rollouts are in folder/out/rollouts."""
    steps = {"max_steps": 6, "save_steps": 1, "warmup_steps": 2, "sample_packing": False, "record_rollouts": True}
    path = write_run(folder, trl=EVERYTHING | changes.pop("trl", {}), test_datasets=None, **steps | changes)
    settings = folder / "model" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"attention_dropout": 0.2}))
    with serve() as served:
        train(config_for(path, served), 1)
    return path


def again(path: Path, out: Path, **overrides: Any) -> dict[str, torch.Tensor]:
    """The parameters of a replay into `out`."""
    rollouts = str(path.parent / "out" / "rollouts")
    train(config_for(path, NOBODY, replay=rollouts, output_dir=str(out), **overrides), 1)
    return load_file(out / "model.safetensors")


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert different == []


def test_a_replay_and_a_resumed_replay_give_the_parameters_of_the_recorded_run(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    expected = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(tmp_path / "model" / "model.safetensors")
    assert any(not torch.equal(expected[name], base[name]) for name in base)
    assert sorted(p.name for p in (tmp_path / "out" / "rollouts").iterdir()) == [f"step-{n}.rlx" for n in range(1, 7)]
    assert_same_bits(again(path, tmp_path / "whole"), expected)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    assert_same_bits(again(path, tmp_path / "resumed", resume_from_checkpoint=checkpoint), expected)
    kept = ("reward", "loss", "kl", "entropy", "entropy_coef", "learning_rate", "grad_norm")
    rows, resumed = (lines(tmp_path / name / "metrics.jsonl") for name in ("out", "resumed"))
    assert [[row[name] for name in kept] for row in resumed] == [[row[name] for name in kept] for row in rows[2:]]
    assert len({row["entropy_coef"] for row in rows}) > 1


def test_a_run_that_was_stopped_between_two_steps_on_one_batch_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Batches of 16 completions, in two parts, twice: four steps each."""
    path = recorded(tmp_path, max_steps=6, gradient_accumulation_steps=4, trl=REUSED)
    expected = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(p.name for p in (tmp_path / "out" / "rollouts").iterdir()) == ["step-1.rlx", "step-5.rlx"]
    for step, is_open in ((1, True), (3, True), (4, False), (5, True)):
        checkpoint = tmp_path / "out" / f"checkpoint-{step}"
        assert (checkpoint / OPEN_BATCH).exists() == is_open
        found = again(path, tmp_path / f"from-{step}", resume_from_checkpoint=str(checkpoint))
        assert_same_bits(found, expected)
    kept = ("reward", "loss", "clip_ratio/region_mean", "learning_rate")
    rows, resumed = (lines(tmp_path / name / "metrics.jsonl") for name in ("out", "from-1"))
    assert [[row[name] for name in kept] for row in resumed] == [[row[name] for name in kept] for row in rows[1:]]
    checkpoint = tmp_path / "out" / "checkpoint-4"
    with pytest.raises(ConfigError, match=r"checkpoint-4 was written by a run whose generation batches begin at other"):
        again(path, tmp_path / "other", resume_from_checkpoint=str(checkpoint), trl__num_iterations=3)


def test_each_part_of_a_checkpoint_counts(tmp_path: Path) -> None:
    """So the test above would notice if one of them were not restored."""
    path = recorded(tmp_path, max_steps=4)
    expected = load_file(tmp_path / "out" / "model.safetensors")
    for lost in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "reference.safetensors", "entropy"):
        checkpoint = tmp_path / lost / "checkpoint-2"
        shutil.copytree(tmp_path / "out" / "checkpoint-2", checkpoint)
        marker = json.loads((checkpoint / CHECKPOINT_MARKER).read_text())
        if lost == "entropy":
            marker["entropy_bonus"]["coefficient"] += 0.01
        else:
            del marker["files"][lost]
            (checkpoint / lost).unlink()
        (checkpoint / CHECKPOINT_MARKER).write_text(json.dumps(marker))
        found = again(path, tmp_path / lost / "out", resume_from_checkpoint=str(checkpoint))
        assert any(not torch.equal(found[name], expected[name]) for name in expected), lost


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_while_it_writes_a_checkpoint_goes_on_to_the_same_bits(
    tmp_path: Path, processes: int
) -> None:
    """With two processes between two steps on one batch. One process replays the recorded run itself; two add gradients up
    in another order, and are compared with two that were not killed."""
    reused = {} if processes == 1 else REUSED
    path = recorded(tmp_path, max_steps=4, gradient_accumulation_steps=4, trl=reused)
    replay, whole, killed = tmp_path / "out" / "rollouts", tmp_path / "whole", tmp_path / "killed"
    options = ["--replay", str(replay), "--auto_resume_from_checkpoints", "true"]
    if reused:
        options += ["--trl.steps_per_generation", "4", "--gradient_accumulation_steps", "2"]
    options.append("--output_dir")
    if processes == 1:
        whole = tmp_path / "out"
    else:
        assert run(path, NOBODY, processes, *options, str(whole))[0] == 0
    killed.mkdir()
    in_the_way = killed / "checkpoint-3"
    in_the_way.touch()  # however late it is killed, it does not get further
    learner = start(path, NOBODY, processes, *options, str(killed))
    end = time.monotonic() + LIMIT_S
    while not (killed / "checkpoint-2").exists():
        assert time.monotonic() < end
        time.sleep(0.001)
    left = descendants(learner.pid)
    os.killpg(learner.pid, signal.SIGKILL)
    end_processes(left, 0.0)
    learner.communicate()
    assert gone(left)
    assert not (killed / "model.safetensors").exists()
    in_the_way.unlink()
    status, out, err = run(path, NOBODY, processes, *options, str(killed))
    assert (status, err) == (0, "")
    assert "step 4/4" in out
    assert_same_bits(load_file(killed / "model.safetensors"), load_file(whole / "model.safetensors"))


def change(folder: Path, what: str) -> dict[str, Any]:
    """Make the recording in `folder` unusable; the overrides that belong to it."""
    step = folder / "out" / "rollouts" / "step-2.rlx"
    if what == "missing":
        step.unlink()
    elif what == "truncated":
        step.write_bytes(step.read_bytes()[:-100])
    elif what == "flipped":
        data = bytearray(step.read_bytes())
        data[-100] ^= 1
        step.write_bytes(data)
    elif what == "vocabulary":
        name = folder / "model" / "tokenizer.json"
        settings = json.loads(name.read_text())
        vocabulary = settings["model"]["vocab"]
        first, second = list(vocabulary)[:2]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        name.write_text(json.dumps(settings))
    elif what == "data":
        (folder / "data.jsonl").write_text('{"prompt": "another", "answer": "1"}\n' * 10)
    elif what == "seed":
        return {"seed": 43}
    elif what == "longer":
        return {"max_steps": 5}
    elif what == "group":
        return {"trl__num_generations": 2}
    elif what == "empty":
        return {"replay": str(folder)}
    return {}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"replay: .*step-2\.rlx is missing, of a run of 2 steps; it has steps 1 to 1"),
        ("longer", r"replay: .*step-3\.rlx is missing, of a run of 5 steps; it has steps 1 to 2\..* or set max_steps"),
        ("empty", r"replay: .*step-1\.rlx is missing, of a run of 2 steps; it has none"),
        ("truncated", r"replay: .*step-2\.rlx is truncated or damaged"),
        ("flipped", r"replay: .*step-2\.rlx is truncated or damaged \(its bytes are not those that were written\)"),
        ("vocabulary", r"replay: .*step-1\.rlx was recorded with another vocabulary"),
        ("data", r"replay: .*step-1\.rlx was recorded with another prompt number 0 than `datasets` gives now"),
        ("seed", r"replay: .*step-1\.rlx was recorded with another prompt number \d than `datasets` gives now"),
        ("group", r"replay: .*step-1\.rlx holds 2 prompts × 4 completions, this configuration trains 4 × 2 a batch"),
    ],
)
def test_a_recording_that_does_not_fit_is_refused(tmp_path: Path, what: str, message: str) -> None:
    path = write_run(tmp_path, max_steps=2, test_datasets=None, record_rollouts=True)
    with serve() as served:
        train(config_for(path, served), 1)
    overrides = {"replay": str(tmp_path / "out" / "rollouts")} | change(tmp_path, what)
    with pytest.raises(DatasetError, match=message):
        train(config_for(path, NOBODY, output_dir=str(tmp_path / "again"), **overrides), 1)


def test_a_new_run_drops_the_recording_of_an_earlier_one_and_a_resumed_run_keeps_its_own(tmp_path: Path) -> None:
    path = write_run(tmp_path, max_steps=3, save_steps=1, test_datasets=None, record_rollouts=True)
    folder = tmp_path / "out" / "rollouts"
    with serve() as served:
        train(config_for(path, served), 1)
        first = (folder / "step-1.rlx").read_bytes()
        train(config_for(path, served, max_steps=2, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1")), 1)
        assert sorted(p.name for p in folder.iterdir()) == ["step-1.rlx", "step-2.rlx"]
        assert (folder / "step-1.rlx").read_bytes() == first
        train(config_for(path, served, max_steps=1), 1)
    assert sorted(p.name for p in folder.iterdir()) == ["step-1.rlx"]


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = write_run(tmp_path, max_steps=1, save_steps=1, test_datasets=None, record_rollouts=True)
    with serve() as served:
        train(config_for(path, served), 1)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    make_tiny_model(tmp_path / "model", tie=False, dtype=torch.float32)
    with pytest.raises(Exception, match=r"checkpoint-1 is of another model than base_model .*has shape .* there and"):
        train(config_for(path, NOBODY, replay=str(tmp_path / "out" / "rollouts"), auto_resume_from_checkpoints=True), 1)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
