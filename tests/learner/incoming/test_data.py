"""Rows become prompts; every mistake in data or transform is one message with its key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import make_tiny_tokenizer

from rlx.config import Config, load_config
from rlx.errors import ConfigError, DatasetError, UserCodeError
from rlx.learner.incoming.data import load_prompts
from rlx.learner.policy.model import load_model
from rlx.tokenizer import load_tokenizer

ROWS = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(4)]


def config_with(folder: Path, dataset: str, extra: str = "", rows: list[dict[str, object]] | None = None) -> Config:
    lines = [json.dumps(row) for row in (ROWS if rows is None else rows)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "run.yaml").write_text(f"base_model: m/m\nrl: grpo\ndatasets:\n  - {dataset}\n{extra}")
    return load_config(folder / "run.yaml")


def transform(folder: Path, body: str) -> None:
    (folder / "mine.py").write_text(body)


GOOD = (
    "def to_prompt(cfg, *args, **kwargs):\n"
    "    def transform_fn(example, tokenizer=None):\n"
    "        return {'prompt': [{'role': 'user', 'content': example['question']}], 'answer': example['answer']}\n"
    "    return transform_fn, {'remove_columns': ['question', 'no_such_column']}\n"
)


def test_a_transform_next_to_the_yaml_makes_prompts_and_columns(tmp_path):
    transform(tmp_path, GOOD)
    config = config_with(tmp_path, "{path: rows.jsonl, type: mine.to_prompt}")
    prompts, held_out = load_prompts(config, make_tiny_tokenizer())
    assert held_out is None
    assert len(prompts.prompts) == 16
    first = prompts.prompts[0]
    assert first.prompt == [{"role": "user", "content": "0+0="}]
    assert first.columns == {"answer": "0"}
    text = make_tiny_tokenizer().decode(first.ids.tolist())
    assert text == "<|im_start|>user\n0+0=<|im_end|>\n<|im_start|>assistant\n"


def test_local_files_load_without_a_path(tmp_path):
    config = config_with(tmp_path, "{ds_type: json, data_files: [rows.jsonl]}", rows=[{"prompt": "a"}, {"prompt": "b"}])
    assert [p.prompt for p in load_prompts(config, make_tiny_tokenizer())[0].prompts] == ["a", "b"]


def test_an_edited_transform_takes_effect_at_once(tmp_path, monkeypatch):
    transform(tmp_path, "def t(cfg):\n    return lambda row: {'prompt': 'old'}\n")
    config = config_with(tmp_path, "{path: rows.jsonl, type: mine.t}", f"dataset_prepared_path: {tmp_path}/prepared\n")
    assert load_prompts(config, make_tiny_tokenizer())[0].prompts[0].prompt == "old"
    other = tmp_path / "other"
    other.mkdir()
    transform(other, "def t(cfg):\n    return lambda row: {'prompt': 'new'}\n")
    config = config_with(other, "{path: rows.jsonl, type: mine.t}", f"dataset_prepared_path: {tmp_path}/prepared\n")
    assert load_prompts(config, make_tiny_tokenizer())[0].prompts[0].prompt == "new"


def test_prompts_over_the_limit_are_left_out_and_counted(tmp_path):
    rows = [{"prompt": "x" * n} for n in (3, 10, 11, 40)]
    config = config_with(tmp_path, "{path: rows.jsonl}", "trl:\n  max_prompt_length: 10\n", rows)
    prompts, _ = load_prompts(config, make_tiny_tokenizer())
    assert [len(p.ids) for p in prompts.prompts] == [3, 10]
    assert prompts.too_long == 2


def test_val_set_size_holds_rows_out_and_never_trains_on_them(tmp_path):
    rows = [{"prompt": f"p{i}"} for i in range(20)]
    config = config_with(tmp_path, "{path: rows.jsonl}", "val_set_size: 0.25\n", rows)
    train, held_out = load_prompts(config, make_tiny_tokenizer())
    assert held_out is not None
    names = [{p.prompt for p in part.prompts} for part in (train, held_out)]
    assert (len(names[0]), len(names[1])) == (15, 5)
    assert not names[0] & names[1]


@pytest.mark.parametrize(
    ("dataset", "rows", "message"),
    [
        ("{path: nothing.jsonl}", None, "there is no file|there is no file or folder"),
        ("{data_files: nothing.jsonl}", None, "datasets\\[0\\]: there is no file 'nothing.jsonl' next to the YAML"),
        ("{path: rows.jsonl}", [], "rows.jsonl is empty"),
        ("{path: rows.jsonl}", [{"question": "q"}], "no column 'prompt' \\(columns: question\\). Name a transform"),
        ("{path: rows.jsonl, split: tain}", [{"prompt": "a"}], "datasets\\[0\\]: cannot be loaded: .*tain"),
        ("{path: rows.jsonl}", [{"prompt": 7}], "row 0: the prompt is 7; a non-empty string or a list of chat"),
        ("{path: rows.jsonl}", [{"prompt": "x" * 600}], "all 1 prompts are longer than max_prompt_length \\(512"),
    ],
)
def test_data_that_cannot_be_used_is_one_message_with_its_key(tmp_path, dataset, rows, message):
    config = config_with(tmp_path, dataset, rows=rows)
    with pytest.raises(DatasetError, match=message):
        load_prompts(config, make_tiny_tokenizer())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def t(cfg):\n    return lambda row: {'text': 'x'}\n", "no column 'prompt' after the transform"),
        ("def t(cfg):\n    return None\n", "returned a NoneType. A transform returns `transform_fn`"),
        ("def t(cfg):\n    return lambda row: 'x'\n", "gave a str for a row; a dict with 'prompt' is expected"),
        ("def t(cfg):\n    return lambda row: row['qestion']\n", "raised KeyError: 'qestion'"),
        ("def t(cfg):\n    return lambda row: row['qestion']\n", "The columns of the row are question, answer."),
        (
            "def t(row):\n    return {'prompt': row['question']}\n",
            "is called once, with the configuration, and returns",
        ),
        ("import not_installed_here\n", "not_installed_here"),
        ("def other(cfg): pass\n", "mine.t"),
    ],
)
def test_a_broken_transform_names_its_key_and_shows_the_users_own_traceback(tmp_path, body, message):
    transform(tmp_path, body)
    config = config_with(tmp_path, "{path: rows.jsonl, type: mine.t}")
    with pytest.raises((UserCodeError, DatasetError), match=message) as caught:
        load_prompts(config, make_tiny_tokenizer())
    assert "datasets[0]" in str(caught.value)
    assert "learner/incoming/data.py" not in str(caught.value)


def test_chat_prompts_without_a_chat_template_are_refused(tmp_path):
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    config = config_with(tmp_path, "{path: rows.jsonl}", rows=[{"prompt": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(DatasetError, match="no chat template"):
        load_prompts(config, tokenizer)


def test_a_model_that_is_not_there_names_the_key(tmp_path):
    config = config_with(tmp_path, "{path: rows.jsonl}")
    gone = config.model_copy(update={"base_model": "./no/such/model"})
    gone._path = config.path
    with pytest.raises(ConfigError, match=r"base_model: there is no folder '\./no/such/model'"):
        load_model(gone)
    (tmp_path / "empty").mkdir()
    empty = config.model_copy(update={"base_model": "./empty"})
    empty._path = config.path
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        load_tokenizer(empty)
