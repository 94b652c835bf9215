"""The model and tokenizer to train, from a local folder or the hub."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlx.config import Config
from rlx.errors import ModelError
from rlx.hub import located


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of `tokenizer_config` or `base_model`, with `chat_template_jinja` in place."""
    key = "tokenizer_config" if config.tokenizer_config else "base_model"
    name = located(config, key)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=config.revision_of_model, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(config, key, name, error) from error
    if config.chat_template_jinja is not None:
        template = Path(config.local(config.chat_template_jinja))
        is_file = len(config.chat_template_jinja) < 256 and template.is_file()
        tokenizer.chat_template = template.read_text() if is_file else config.chat_template_jinja
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{config.path}: {key}: the tokenizer of {name!r} has no end-of-sequence token.")
    return tokenizer


def load_model(config: Config) -> PreTrainedModel:
    """The causal language model in float32: the master weights that the optimizer updates."""
    name = located(config, "base_model")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=config.revision_of_model,
            trust_remote_code=config.trust_remote_code,
            dtype=torch.float32,
            attn_implementation=config.attention,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unusable(config, "base_model", name, error) from error
    model.config.use_cache = False
    if config.trl.disable_dropout:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return model


def saved_dtype(config: Config) -> torch.dtype:
    """The type of the base model on disk, which the trained model is saved in, too."""
    name = located(config, "base_model")
    settings = AutoConfig.from_pretrained(
        name, revision=config.revision_of_model, trust_remote_code=config.trust_remote_code
    )
    return settings.dtype or torch.float32


def rollout_dtype(config: Config) -> torch.dtype:
    """What the engines hold their weights in: `vllm.dtype`, or for auto the type of the base model on disk."""
    named = {"bfloat16": torch.bfloat16, "float16": torch.float16, "half": torch.float16,
             "float32": torch.float32, "float": torch.float32}  # fmt: skip
    if config.vllm.dtype in named:
        return named[config.vllm.dtype]
    saved = saved_dtype(config)
    # vLLM, too, loads float32 checkpoints as float16 or bfloat16 for `auto`; bfloat16 is what it takes on a CPU.
    return torch.bfloat16 if saved == torch.float32 else saved


def _unusable(config: Config, key: str, name: str, error: Exception) -> ModelError:
    lines = str(error).strip().splitlines()
    if Path(name).is_dir():
        return ModelError(
            f"{config.path}: {key}: the model in {name} cannot be loaded: {lines[0] if lines else error!r}"
        )
    return ModelError(
        f"{config.path}: {key}: {name!r} is no local folder, and the hub could not give it: {lines[0] if lines else error!r} "
        "Check the name and the network, log in with `hf auth login` for a gated model, or name a local folder."
    )
