"""`rlx check` finds what can be found without a model, tells what it could not check, and prints the plan."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from tiny_models import make_tiny_model

from rlx.cluster import check
from rlx.cluster.check import check_main
from rlx.config import load_config
from rlx.errors import ConfigError, UserCodeError

ROOT = Path(__file__).parents[2]
REWARDS = (
    "def good(completions, answer, **kwargs):\n    return [float(c == a) for c, a in zip(completions, answer)]\n"
    "def short(completions):\n    return [1.0]\n"
    "def wants_moves(completions, moves):\n    return [1.0] * len(completions)\n"
    "async def play(ctx):\n    return 1.0\n"
    "def broken(completions):\n    return [1 / 0]\n"
    "def blocks(completions):\n    import time\n    time.sleep(1000)\n"
    "def exits(completions):\n    import os\n    os._exit(4)\n"
    "def to_prompt(cfg):\n    return lambda row: {'prompt': row['question']}, {'remove_columns': ['question']}\n"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def config(folder: Path, model: Path, reward: str = "mine.good", transform: str = "mine.to_prompt"):
    (folder / "mine.py").write_text(REWARDS)
    (folder / "rows.jsonl").write_text(json.dumps({"question": "1+1=", "answer": "2"}) + "\n")
    (folder / "run.yaml").write_text(
        f"base_model: {model}\nrl: grpo\ntrl:\n  reward_funcs: [{reward}]\n  num_generations: 4\n"
        f"datasets:\n  - path: rows.jsonl\n    type: {transform}\n"
    )
    return load_config(folder / "run.yaml")


def test_a_good_configuration_passes_and_prints_the_plan_in_numbers(tmp_path, model, capsys):
    assert check_main(config(tmp_path, model), 2) == 0
    text = capsys.readouterr().out
    assert "reward mine.good: gives 0, 0 for the completions '' and '42' of the first row" in text
    assert "first prompt: 4 tokens of at most 512" in text
    assert "gradient_accumulation_steps is 2 instead of 1" in text
    assert "4 = 1 × 4 generations" in text
    assert "GiB per learner process" in text


def test_an_output_dir_that_cannot_be_is_told(tmp_path, model, capsys):
    (tmp_path / "out").write_text("a file")
    good = config(tmp_path, model)
    assert check_main(good.model_copy(update={"output_dir": str(tmp_path / "out" / "x")}), 1) == 2
    assert f"error {tmp_path}/run.yaml: output_dir: {tmp_path}/out/x cannot hold the run: " in capsys.readouterr().out


def test_steps_that_share_a_generation_batch_are_told_apart_from_it(tmp_path, model, capsys):
    config(tmp_path, model)
    shared = {
        ("trl", "steps_per_generation"): ("--x", 4),
        ("gradient_accumulation_steps",): ("--y", 2),
        ("micro_batch_size",): ("--z", 4),
    }
    assert check_main(load_config(tmp_path / "run.yaml", shared), 1) == 0
    text = capsys.readouterr().out
    assert "one generation batch, for 2 optimizer steps" in text
    assert "16 = 4 × 4 generations" in text
    assert "8, in 1 pass(es) over the batch" in text


@pytest.mark.parametrize(
    ("reward", "transform", "message"),
    [
        ("mine.short", "mine.to_prompt", "trl.reward_funcs[0] (mine.short) returned 1 value"),
        ("mine.broken", "mine.to_prompt", "ZeroDivisionError"),
        ("mine.goud", "mine.to_prompt", "good"),
        ("nowhere.good", "mine.to_prompt", "trl.reward_funcs[0] (nowhere.good)"),
        ("mine.good", "mine.to_promt", "datasets[0].type (mine.to_promt)"),
    ],
)
def test_user_code_that_does_not_work_is_found_before_anything_starts(
    tmp_path, model, capsys, reward, transform, message
):
    assert check_main(config(tmp_path, model, reward, transform), 1) != 0
    assert message in capsys.readouterr().out


def test_a_column_that_the_rollout_function_may_bring_is_no_error(tmp_path, model, capsys):
    config(tmp_path, model, reward="mine.wants_moves")
    overrides = {("trl", "rollout_func"): ("--x", "mine.play")}
    assert check_main(load_config(tmp_path / "run.yaml"), 1) == 1
    assert "error trl.reward_funcs[0] (mine.wants_moves) asks for 'moves', which is neither" in capsys.readouterr().out
    assert check_main(load_config(tmp_path / "run.yaml", overrides), 1) == 0
    assert "asks for 'moves', which is no column of the data set: the rollout func" in capsys.readouterr().out
    overrides = {("trl", "rollout_func"): ("--x", "mine.plya")}
    assert check_main(load_config(tmp_path / "run.yaml", overrides), 1) == 1
    assert capsys.readouterr().out.count("error ") == 1, "the rollout function is told once, and not by the rewards"


@pytest.mark.slow
def test_vllm_itself_says_which_models_it_serves_with_adapters(monkeypatch):
    monkeypatch.setattr(check, "_VLLM_S", 600.0)
    assert check._ask_vllm("FalconForCausalLM") == "False"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("True", "ok    adapter: new, rank 8, sent to the workers alone"),
        ("", "note  not checked: whether vLLM serves Qwen2ForCausalLM with adapters"),
        ("False", "error {path}: lora_sync: adapter: vLLM serves Qwen2ForCausalLM without adapters only; write `lora_sync: merged`"),
    ],
)  # fmt: skip
def test_a_model_that_engines_serve_without_adapters_is_told(tmp_path, model, capsys, monkeypatch, answer, said):
    asked = []
    monkeypatch.setattr(check, "_ask_vllm", lambda architecture: asked.append(architecture) or answer)
    plain = config(tmp_path, model)
    keys = {("adapter",): "lora", ("lora_target_linear",): True, ("lora_sync",): "adapter"}
    settings = load_config(plain.path, {key: (str(key), value) for key, value in keys.items()})
    assert check_main(settings, 1) == (ConfigError.exit_code if answer == "False" else 0)
    assert said.format(path=settings.path) in capsys.readouterr().out
    assert asked == ["Qwen2ForCausalLM"]


def test_no_reward_is_an_error(tmp_path, model):
    empty = config(tmp_path, model, reward="")
    with pytest.raises(ConfigError, match=r"trl\.reward_funcs is empty"):
        check_main(empty, 1)


@pytest.mark.slow
def test_the_gsm8k_example_is_checked_as_far_as_the_network_allows():
    command = [sys.executable, "-m", "rlx.cli", "check", str(ROOT / "examples" / "gsm8k" / "gsm8k.yaml"), "-n", "2"]
    result = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "reward rewards.correct_reward_func: imported" in result.stdout
    assert "not checked: the tokenizer and the model" in result.stdout
    assert "64 = 16 × 4 generations" in result.stdout


def test_the_quickstart_names_its_own_reward_and_transform():
    quickstart = load_config(ROOT / "examples" / "quickstart" / "quickstart.yaml")
    assert quickstart.trl.reward_funcs == ["rewards.exact_match"]
    assert quickstart.datasets[0].type == "rewards.to_prompt"


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("blocks", "trl.reward_funcs[0] (mine.blocks) did not answer within 1 s"),
        ("exits", "trl.reward_funcs[0] (mine.exits) ended its process, with status 4"),
    ],
)
def test_a_reward_that_blocks_or_exits_is_an_error_of_its_own(tmp_path, model, capsys, monkeypatch, reward, message):
    monkeypatch.setattr(check, "_IMPORT_S", 0.0 if reward == "blocks" else 300.0)
    settings = config(tmp_path, model, reward=f"mine.{reward}")
    quick = settings.model_copy(update={"rewards": settings.rewards.model_copy(update={"timeout": 1.0})})
    assert check_main(quick, 1) == UserCodeError.exit_code
    assert f"error {message}" in capsys.readouterr().out


def test_a_context_beyond_the_models_positions_is_told_with_both_numbers(tmp_path, model, capsys):
    config(tmp_path, model)
    positions = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    longer = {("trl", "max_prompt_length"): ("--x", positions), ("trl", "max_completion_length"): ("--y", 1)}
    assert check_main(load_config(tmp_path / "run.yaml", longer), 1) == 2
    text = capsys.readouterr().out
    assert f"is {positions + 1}, but {model} has {positions} positions" in text


def test_a_prompt_that_is_too_long_is_told_once_in_our_words_alone(tmp_path, model, capsys, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    transformers.logging.set_verbosity_warning()
    config(tmp_path, model)
    own = tmp_path / "own"
    shutil.copytree(model, own)
    settings = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 2}))
    short = {("base_model",): ("--x", str(own)), ("trl", "max_prompt_length"): ("--y", 3)}
    assert check_main(load_config(tmp_path / "run.yaml", short), 1) == 0
    told = "the first prompt has 4 tokens, more than max_prompt_length (3): it will be left out"
    assert told in capsys.readouterr().out
    assert caplog.messages == []
