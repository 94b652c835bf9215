"""The chat template that the YAML gives, or its mistakes in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny_models import make_tiny_tokenizer

from rlx.config import Config, load_config
from rlx.errors import ConfigError
from rlx.tokenizer import load_tokenizer

GOOD = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


def config_with(folder: Path, template: str) -> Config:
    make_tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text('{"model_type": "qwen3"}')
    (folder / "own.jinja").write_text(GOOD)
    keys = {"base_model": "model", "rl": "grpo", "datasets": [{"path": "none"}], "chat_template_jinja": template}
    (folder / "run.yaml").write_text(yaml.safe_dump(keys))
    return load_config(folder / "run.yaml")


@pytest.mark.parametrize("template", [GOOD, "own.jinja"])
def test_a_template_is_a_text_or_a_file_next_to_the_yaml(tmp_path: Path, template: str) -> None:
    assert load_tokenizer(config_with(tmp_path, template)).chat_template == GOOD


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}", r"run\.yaml: chat_template_jinja, line 1: Unexpected end of template"),
        ("owm.jinja", r"chat_template_jinja: there is no file 'owm\.jinja', and it is no Jinja text"),
    ],
)
def test_a_template_that_cannot_be_read_is_one_message(tmp_path: Path, template: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_tokenizer(config_with(tmp_path, template))


def test_a_template_may_refuse_messages(tmp_path: Path) -> None:
    template = "{{ raise_exception('a system message is needed') }}"
    assert load_tokenizer(config_with(tmp_path, template)).chat_template == template
