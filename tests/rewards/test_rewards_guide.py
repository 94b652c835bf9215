"""docs/rewards.md: its code runs and its promises about names hold."""

import re
from pathlib import Path

import yaml

from rlx.config.sections import RewardsSection
from rlx.dotted import resolve
from rlx.rewards.scoring import CONTRACT_ARGUMENTS, load_reward

GUIDE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", GUIDE, re.DOTALL)


def test_the_snippet_for_trying_a_function_alone_prints_what_it_says(tmp_path, monkeypatch, capsys):
    (function,) = [code for _, code in BLOCKS if "def exact_match" in code]
    (snippet,) = [code for _, code in BLOCKS if "score_group" in code]
    (tmp_path / "rewards.py").write_text(function)
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    assert capsys.readouterr().out.strip() == "[1. 0.]"
    assert "# [1. 0.]" in snippet


def test_the_functions_of_the_example_yaml_load(tmp_path):
    (config,) = [yaml.safe_load(code) for language, code in BLOCKS if language == "yaml" and "trl:" in code]
    (function,) = [code for _, code in BLOCKS if "def exact_match" in code]
    (tmp_path / "rewards.py").write_text(function)
    for name in config["trl"]["reward_funcs"]:
        assert load_reward(name, tmp_path, "key").name == name


def test_the_limits_of_the_example_yaml_are_settings():
    (config,) = [yaml.safe_load(code) for language, code in BLOCKS if language == "yaml" and "timeout:" in code]
    settings = RewardsSection(**config["rewards"])
    assert settings.functions["rewards.exact_match"].timeout == 5
    assert set(config["rewards"]) == set(RewardsSection.model_fields)


def test_every_built_in_reward_in_the_table_loads():
    names = sorted(set(re.findall(r"`(rlx\.rewards\.(?:math|format|length)(?:\.\w+)?)`", GUIDE)))
    assert len(names) == 8
    for name in names:
        assert load_reward(name, Path("."), "key").name == name


def test_the_contract_table_lists_every_argument():
    listed = re.findall(r"^\| `(\w+)` \|", GUIDE, re.MULTILINE)
    assert sorted(listed) == sorted(CONTRACT_ARGUMENTS)


def test_the_example_of_a_transform_makes_a_prompt_and_columns(tmp_path):
    (function,) = [code for _, code in BLOCKS if "def gsm8k" in code]
    (config,) = [yaml.safe_load(code) for language, code in BLOCKS if language == "yaml" and "datasets:" in code]
    (tmp_path / "prompts.py").write_text(function)
    transform = resolve(config["datasets"][0]["type"], base_dir=tmp_path, key="datasets[0].type")
    row, options = transform(None)
    made = row({"question": "2+2?", "answer": "so\n#### 4"})
    assert made == {"prompt": [{"role": "user", "content": "2+2?"}], "answer": "4"}
    assert options == {"remove_columns": ["question"]}
