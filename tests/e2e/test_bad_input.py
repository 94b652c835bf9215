"""What cannot work ends with one message, a non-zero status, and nothing left running or half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e_parts import LEARNER_START_S, SERVICE_START_S, Rlx, rlx, write_config, write_rows
from tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    write_rows(folder / "prompts.jsonl", [{"prompt": "a"}] * 4)
    return write_config(
        folder / "bad.yaml",
        base_model=str(make_tiny_model(folder / "model")),
        datasets=[{"path": "prompts.jsonl"}],
        trl={"reward_funcs": ["rlx.rewards.length"]},
    )


def fails(command: Rlx, within_s: float) -> str:
    """The last message of a command that must fail and leave nothing."""
    assert command.wait(within_s) in (1, 2), command.output
    assert command.left() == []
    assert "Traceback" not in command.output
    assert command.output.count("error: ") == 1, command.output
    return command.last_message


def test_an_engine_that_does_not_start_shows_its_own_first_error(config, tmp_path):
    model = make_tiny_model(tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "num_attention_heads": 3}))
    options = ("--base_model", model, "--output_dir", tmp_path / "out")
    with rlx(tmp_path, "run", config, *options) as run:
        message = fails(run, SERVICE_START_S)
    assert "rlx-rollout-0" in message
    assert "num_heads" in message or "num_attention_heads" in message or "heads" in message, message


@pytest.mark.parametrize("command", ["vllm-serve", "train", "run"])
def test_a_hub_name_without_a_hub_is_one_message(config, tmp_path, command):
    """Nobody listens at the hub's address."""
    options = ("--base_model", "no-such-org/no-such-model", "--output_dir", tmp_path / "out")
    with rlx(tmp_path, command, config, *options, HF_ENDPOINT="http://127.0.0.1:9") as process:
        message = fails(process, SERVICE_START_S)
    assert "base_model" in message
    assert "no-such-org/no-such-model" in message
    assert "hub" in message


@pytest.mark.parametrize("command", ["vllm-serve", "run"])
def test_a_model_folder_that_is_not_there_is_one_message(config, tmp_path, command):
    with rlx(tmp_path, command, config, "--base_model", "./nowhere", "--output_dir", tmp_path / "out") as process:
        message = fails(process, LEARNER_START_S)
    assert "base_model: there is no folder './nowhere' next to the YAML or in the current folder" in message
