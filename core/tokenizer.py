"""The tokenizer of a run, with its chat template in place; the learner and the rollout functions use the same."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlx.config import Config
from rlx.errors import ConfigError, ModelError
from rlx.hub import located, unusable


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of `tokenizer_config` or `base_model`, with `chat_template` or `chat_template_jinja` in place."""
    key = "tokenizer_config" if config.tokenizer_config else "base_model"
    name = located(config, key)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=config.revision_of_model, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise unusable(config, key, name, error) from error
    if config.chat_template not in (None, "tokenizer_default"):
        tokenizer.chat_template = training_template(config)
    elif config.chat_template_jinja is not None:
        tokenizer.chat_template = _own_template(config)
        _check_syntax(config, tokenizer)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{config.path}: {key}: the tokenizer of {name!r} has no end-of-sequence token.")
    return tokenizer


def training_template(config: Config) -> str:
    """The chat template that TRL ships under the name `chat_template`, such as `qwen3_training`."""
    shipped = {path.stem: path for path in template_folder().glob("*.jinja")}
    name = str(config.chat_template)
    if name not in shipped:
        close = difflib.get_close_matches(name, shipped, n=3, cutoff=0.3)
        raise ConfigError(
            f"{config.path}: chat_template: no template is called {name!r}. "
            + (f"Close to it: {', '.join(close)}. " if close else "")
            + "Remove the key to use the tokenizer's own, or give the text in chat_template_jinja."
        )
    return shipped[name].read_text()


def _own_template(config: Config) -> str:
    """The text of `chat_template_jinja`, which may be that of a file."""
    given = str(config.chat_template_jinja)
    file = Path(config.local(given))
    if len(given) < 256 and file.is_file():
        return file.read_text()
    if "{" not in given:
        raise ConfigError(f"{config.path}: chat_template_jinja: there is no file {given!r}, and it is no Jinja text.")
    return given


def _check_syntax(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ConfigError(f"{config.path}: chat_template_jinja, line {error.lineno}: {error.message}") from error
    except TemplateError:
        return  # it refuses these messages, which are not those of the run


def template_folder() -> Path:
    """Where TRL keeps its chat templates, found without importing it."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        raise ModelError("trl is not installed, and it holds the chat templates. Install rlx with its dependencies.")
    return Path(found.origin).parent / "chat_templates"
