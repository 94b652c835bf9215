"""The hub is asked once and briefly, and only by runs that name something on it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlx.config import Config, load_config
from rlx.errors import ConfigError, ModelError
from rlx.hub import check_in_reach, located, settle_hub


def config(folder: Path, model: str, data: str) -> Config:
    (folder / "run.yaml").write_text(f"base_model: {model}\nrl: grpo\ndatasets:\n  - path: {data}\n")
    return load_config(folder / "run.yaml")


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    yield
    os.environ.pop("HF_HUB_OFFLINE", None)


def test_a_hub_that_does_not_answer_is_not_asked_again(tmp_path):
    settle_hub(config(tmp_path, "org/model", "org/data"))
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_run_with_local_files_only_asks_nobody(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}")
    settle_hub(config(tmp_path, "model", "rows.jsonl"))
    assert "HF_HUB_OFFLINE" not in os.environ


@pytest.mark.parametrize(
    ("reward", "offline"),
    [("org/judge", True), ("./judge", False), ("../r.py:f", False), ("http://127.0.0.1:1/x", False)],
)
def test_a_reward_model_of_the_hub_is_named_too_and_a_generated_data_set_is_not(tmp_path, reward, offline):
    for folder in ("model", "judge"):
        (tmp_path / folder).mkdir()
    loaded = config(tmp_path, "model", f"reasoning_gym:chain_sum\ntrl: {{reward_funcs: ['{reward}']}}")
    settle_hub(loaded)
    assert ("HF_HUB_OFFLINE" in os.environ) is offline


def test_a_folder_is_found_next_to_the_yaml_and_a_missing_one_names_its_key(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match=r"base_model: .*model holds no model: config\.json is missing"):
        located(config(tmp_path, "model", "d"), "base_model")
    (tmp_path / "model" / "config.json").write_text("{}")
    assert located(config(tmp_path, "model", "d"), "base_model") == str(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"base_model: there is no folder '\./models/x'"):
        located(config(tmp_path, "./models/x", "d"), "base_model")
    assert located(config(tmp_path, "org/model", "d"), "base_model") == "org/model"


def test_a_model_of_a_hub_out_of_reach_names_its_key_unless_it_is_in_the_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    asked = config(tmp_path, "org/model", "d")
    check_in_reach(asked, "base_model")  # not known to be out of reach
    settle_hub(asked)
    with pytest.raises(ModelError, match="base_model: 'org/model' is no local folder, the hub cannot be reached"):
        check_in_reach(asked, "base_model")
    snapshot = cache / "models--org--model" / "snapshots" / "a"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cache / "models--org--model" / "refs").mkdir()
    (cache / "models--org--model" / "refs" / "main").write_text("a")
    check_in_reach(asked, "base_model")
