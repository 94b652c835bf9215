"""Tasks of reasoning-gym as data set and as reward, by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import reasoning_gym
from tiny_models import make_tiny_tokenizer

from rlx.config import Config, load_config
from rlx.errors import DatasetError, UserCodeError
from rlx.learner.incoming.data import first_row, load_prompts
from rlx.rewards import reasoning_gym as scored
from rlx.rewards.scoring import ScoreRequest, load_reward, score_group


def config_with(folder: Path, entry: str, extra: str = "") -> Config:
    (folder / "run.yaml").write_text(f"base_model: m/m\nrl: grpo\ndatasets:\n  - {entry}\n{extra}")
    return load_config(folder / "run.yaml")


def questions(prompts) -> list[str]:
    return [prompt.columns["question"] for prompt in prompts]


def test_a_task_by_name_gives_chat_prompts_with_answer_and_metadata(tmp_path):
    config = config_with(tmp_path, "{path: 'reasoning_gym:chain_sum', split: 'train[:5]'}")
    prompts, _ = load_prompts(config, make_tiny_tokenizer())
    assert len(prompts.prompts) == 5
    first = prompts.prompts[0]
    assert first.prompt[0]["content"].startswith("State the final answer to the following arithmetic problem: ")
    assert first.prompt[0]["content"].endswith("Give the final answer between <answer> and </answer>.")
    assert set(first.columns) == {"question", "answer", "task", "metadata"}
    assert json.loads(first.columns["metadata"])["source_dataset"] == "chain_sum"


def test_rows_depend_on_the_seed_alone(tmp_path):
    entry = "{path: 'reasoning_gym:chain_sum', split: 'train[:5]'}"
    tokenizer = make_tiny_tokenizer()
    first = questions(load_prompts(config_with(tmp_path, entry), tokenizer)[0].prompts)
    again = questions(load_prompts(config_with(tmp_path, entry), tokenizer)[0].prompts)
    other = questions(load_prompts(config_with(tmp_path, entry, "seed: 7\n"), tokenizer)[0].prompts)
    assert first == again
    assert not set(first) & set(other)


def test_a_slice_names_the_same_rows_as_the_whole(tmp_path):
    tokenizer = make_tiny_tokenizer()
    whole = load_prompts(config_with(tmp_path, "{path: 'reasoning_gym:chain_sum', split: 'train[:6]'}"), tokenizer)[0]
    part = load_prompts(config_with(tmp_path, "{path: 'reasoning_gym:chain_sum', split: 'train[4:6]'}"), tokenizer)[0]
    assert questions(part.prompts) == questions(whole.prompts)[4:]


def test_held_out_rows_and_other_entries_are_other_rows(tmp_path):
    task = "path: 'reasoning_gym:chain_sum?min_digits=6&max_digits=8'"
    extra = f"  - {{{task}, split: 'train[:20]'}}\ntest_datasets:\n  - {{{task}, split: 'train[:20]'}}\n"
    config = config_with(tmp_path, f"{{{task}, split: 'train[:20]'}}", extra)
    train, held_out = load_prompts(config, make_tiny_tokenizer())
    assert len(set(questions(train.prompts))) == 40
    assert held_out is not None
    assert len(held_out.prompts) == 20
    assert not set(questions(train.prompts)) & set(questions(held_out.prompts))


def test_options_of_a_task_are_given_to_it(tmp_path):
    config = config_with(
        tmp_path,
        "{path: 'reasoning_gym:chain_sum?min_digits=5&max_digits=5&min_terms=2&max_terms=2', split: 'train[:3]'}",
    )
    metadata = json.loads(first_row(config, None)["metadata"])
    assert metadata["num_digits"] == 5
    assert metadata["num_terms"] == 2


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "{path: 'reasoning_gym:chain_sam'}",
            "datasets[0].path: reasoning_gym:chain_sam: Dataset 'chain_sam' not registered",
        ),
        ("{path: 'reasoning_gym:chain_sum?terms=2'}", "unexpected keyword argument 'terms'"),
        ("{path: 'reasoning_gym:chain_sum?min_terms=0'}", "min_terms must be positive"),
        ("{path: 'reasoning_gym:chain_sum', split: 'train[5:5]'}", "names no rows"),
        ("{path: 'reasoning_gym:chain_sum', split: 'train[:10%]'}", "write train[:1000]"),
    ],
)
def test_a_wrong_entry_is_one_message_with_its_key(tmp_path, entry, message):
    with pytest.raises(DatasetError) as caught:
        first_row(config_with(tmp_path, entry), None)
    assert message in str(caught.value)


def test_without_the_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    scored._scorer.cache_clear()
    with pytest.raises(DatasetError, match="pip install reasoning-gym"):
        first_row(config_with(tmp_path, "{path: 'reasoning_gym:chain_sum'}"), None)
    with pytest.raises(UserCodeError, match="pip install reasoning-gym"):
        scored.reward(completions=["1"], task=["chain_sum"], answer=["1"], metadata=["{}"])


SILENT = {"boxnet", "composite", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Tasks without an answer of their own, or without a form of their own."""


@pytest.mark.slow
def test_every_task_gives_its_own_answer_the_full_score_after_the_way_through_json(tmp_path):
    tasks = sorted(set(reasoning_gym.factory.DATASETS) - SILENT)
    assert len(tasks) == 100
    wrong = {}
    for task in tasks:
        row = first_row(config_with(tmp_path, f"{{path: 'reasoning_gym:{task}', split: 'train[:1]'}}"), None)
        row = json.loads(json.dumps(row))
        columns = {name: [row[name]] for name in ("task", "answer", "metadata")}
        (value,) = scored.reward([f"<think>hm</think>So <answer>{row['answer']}</answer>"], **columns)
        if value != 1.0:
            wrong[task] = value
    assert wrong == {}


def test_the_reward_by_name_scores_a_group(tmp_path):
    config = config_with(tmp_path, "{path: 'reasoning_gym:chain_sum', split: 'train[:1]'}")
    row = first_row(config, None)
    gold = row["answer"]
    texts = [f"<answer>{gold}</answer>", f"Let me see.\nIt is\n{gold}", "<answer>x</answer>", "", f"<think>{gold}"]
    columns = {name: value for name, value in row.items() if name != "prompt"}
    request = ScoreRequest(row["prompt"], [[{"role": "assistant", "content": t}] for t in texts], [[0]] * 5, columns)
    reward = load_reward("rlx.rewards.reasoning_gym", tmp_path, "key")
    assert score_group(reward, request).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_the_answer_is_the_last_tagged_one_else_the_last_line_else_all_where_the_right_one_has_lines():
    assert scored.extract_answer("<answer>1</answer> no: <answer> 2 </answer>.") == "2"
    assert scored.extract_answer("<think><answer>1</answer></think>\nfirst\n 3 \n") == "3"
    assert scored.extract_answer("1 2\n3 4\n", gold="1 2\n3 4") == "1 2\n3 4"
