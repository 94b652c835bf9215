"""Which of several failed learner processes is the cause, and what a run that ended early says last."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlx.config import Config, load_config
from rlx.errors import ConfigError
from rlx.learner import launch
from rlx.learner.launch import failure_message, first_cause, log_of, stopped_message


@dataclass
class Failed:
    exitcode: int
    timestamp: int
    local_rank: int = 1


@pytest.mark.parametrize(
    ("failures", "cause"),
    [
        ([Failed(1, 100), Failed(-9, 100)], -9),  # rank 1 was killed, rank 0 lost its connection to it
        ([Failed(1, 100), Failed(-9, 101)], -9),  # seen a second later
        ([Failed(1, 100), Failed(-15, 100)], 1),  # rank 0 failed, the agent ended rank 1
        ([Failed(-15, 100), Failed(3, 100)], -15),
        ([Failed(2, 100), Failed(-9, 130)], 2),  # rank 1 hung, and the agent killed it after its grace
    ],
)
def test_the_process_that_was_killed_is_the_cause_of_those_that_fail_with_it(failures, cause):
    assert first_cause(failures).exitcode == cause


def configured(folder: Path, more: str = "") -> Config:
    path = folder / "cfg.yaml"
    path.write_text(f"base_model: x\nrl: grpo\ndatasets:\n  - path: a\noutput_dir: {folder / 'out'}\n{more}")
    return load_config(path)


def test_what_another_rank_said_last_is_told_with_its_log(tmp_path):
    config = configured(tmp_path)
    log = log_of(config, 1)
    log.parent.mkdir(parents=True)
    log.write_text("loading\nTraceback (most recent call last):\n  File x\nValueError: of two kinds\n")
    assert (
        failure_message(config, Failed(1, 0))
        == f"error: learner process 1 failed: ValueError: of two kinds; its log: {log}"
    )
    log.write_text("error: no memory\nlater noise\n")
    assert failure_message(config, Failed(1, 0)) == f"error: learner process 1 failed: no memory; its log: {log}"
    killed = failure_message(config, Failed(-9, 0))
    assert killed.startswith("error: learner process 1 was killed by signal 9, SIGKILL (the kernel does that")
    assert killed.endswith(f"its log: {log}")


def test_rank_0_has_told_its_own_error_on_the_terminal(tmp_path):
    config = configured(tmp_path)
    assert failure_message(config, Failed(1, 0, local_rank=0)) == ""
    told = failure_message(config, Failed(-11, 0, local_rank=0))
    assert told == "error: learner process 0 was killed by signal 11, SIGSEGV"


def test_an_output_dir_that_cannot_be_written_ends_the_run_before_anything_starts(tmp_path, monkeypatch):
    (tmp_path / "out").write_text("a file")
    config = configured(tmp_path)
    monkeypatch.setattr(launch, "check_in_reach", lambda *_: pytest.fail("went on"))
    told = f"{config.path}: output_dir: {tmp_path / 'out'} cannot hold the run: {tmp_path / 'out'} is a file"
    with pytest.raises(ConfigError, match=re.escape(told)):
        launch.train_main(
            config.model_copy(update={"trl": config.trl.model_copy(update={"reward_funcs": ["a.b"]})}), [], 1
        )
    below = config.model_copy(update={"output_dir": str(tmp_path / "out" / "deeper")})
    for function in (launch.check_output_dir, launch.make_output_dir):
        with pytest.raises(ConfigError, match=r"out is a file\. Name a folder that you may write to\."):
            function(below)
    nowhere = config.model_copy(update={"output_dir": "/proc/none"})  # as with a network's folder: only trying tells
    with pytest.raises(ConfigError, match=r"output_dir: /proc/none cannot hold the run: .*Name a folder"):
        launch.make_output_dir(nowhere)


def test_an_output_dir_is_made_by_a_run_and_not_by_a_check(tmp_path):
    config = configured(tmp_path).model_copy(update={"output_dir": str(tmp_path / "a" / "b")})
    launch.check_output_dir(config)
    assert not (tmp_path / "a").exists()
    launch.make_output_dir(config)
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "b"]
    assert not list((tmp_path / "a" / "b").iterdir())


def test_attention_that_is_not_installed_is_told_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    launch.check_attention(configured(tmp_path))
    with pytest.raises(
        ConfigError, match=r"flash_attention: flash_attention_2 needs the package flash_attn, which is not"
    ):
        launch.check_attention(configured(tmp_path, "flash_attention: true\n"))
    asked = configured(tmp_path, "attn_implementation: flash_attention_3\n")
    with pytest.raises(
        ConfigError, match=r"attn_implementation: flash_attention_3 needs the package flash_attn_interface"
    ):
        launch.check_attention(asked)
    monkeypatch.setattr(launch, "find_spec", lambda name: name == "flash_attn_interface")
    launch.check_attention(asked)


def test_a_stopped_run_says_what_it_kept_and_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configured(tmp_path)
    assert stopped_message(config, [], 2, 2).startswith("stopped by Ctrl-C; no checkpoint had been written (save_steps")
    for step, saved_at in ((8, 1.0), (4, 2.0)):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "rlx_state.json").write_text(json.dumps({"saved_at": saved_at}))
    (tmp_path / "out" / "checkpoint-12").mkdir()
    newest = tmp_path / "out" / "checkpoint-4"
    assert stopped_message(config, ["--seed", "a b"], 2, 15) == (
        f"stopped by SIGTERM; {newest} is kept. To go on: rlx train cfg.yaml --num-processes 2 --seed 'a b' "
        "--auto_resume_from_checkpoints true"
    )
    resuming = configured(tmp_path, "auto_resume_from_checkpoints: true\n")
    assert (
        stopped_message(resuming, [], 1, 2)
        == f"stopped by Ctrl-C; {newest} is kept: the same command goes on from there"
    )


def test_the_folders_of_launchers_that_were_killed_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid in (ended.pid, os.getpid()):
        (tmp_path / f"rlx-learner-{pid}-abc").mkdir()
    (tmp_path / "rlx-learner-other").mkdir()
    launch._remove_left_behind()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"rlx-learner-{os.getpid()}-abc", "rlx-learner-other"]
