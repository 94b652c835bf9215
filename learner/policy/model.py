"""The model to train, from a local folder or the hub."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rlx.config import Config
from rlx.errors import ConfigError
from rlx.hub import located, unusable
from rlx.learner.policy.quantized import quantization, ready_to_train


def load_model(config: Config) -> PreTrainedModel:
    """The causal language model in float32: the master weights that the optimizer updates. With `adapter: qlora` its
    matrices are in 4 bits."""
    name, in_4_bits = located(config, "base_model"), quantization(config)
    options: dict[str, Any] = {} if in_4_bits is None else {"quantization_config": in_4_bits, "device_map": {"": "cpu"}}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=config.revision_of_model,
            trust_remote_code=config.trust_remote_code,
            dtype=torch.float32,
            attn_implementation=config.attention,
            **options,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise unusable(config, "base_model", name, error) from error
    model.config.use_cache = False
    if in_4_bits is not None:
        ready_to_train(model)
    if config.trl.disable_dropout:
        disable_dropout(model)
    return model


def disable_dropout(model: torch.nn.Module) -> None:
    """Also where it is no module of its own: a number that a module holds, or reads from the model's settings."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        _zero_rates(module)
        if isinstance(settings := getattr(module, "config", None), PreTrainedConfig):
            _zero_rates(settings)
            _zero_rates(settings.get_text_config())


def _zero_rates(holder: object) -> None:
    for name, value in vars(holder).items():
        if isinstance(value, float) and "drop" in name:
            setattr(holder, name, 0.0)


def check_context(config: Config) -> None:
    """ConfigError when prompt and completion need more positions than the model has; vLLM refuses it once it has loaded.
    Positions that are stretched (`rope_type` other than default) are left to vLLM."""
    settings = _settings(config).get_text_config()
    positions = getattr(settings, "max_position_embeddings", None)
    rope = getattr(settings, "rope_parameters", None) or {}
    if positions is None or rope.get("rope_type", "default") != "default" or config.max_model_len <= positions:
        return
    raise ConfigError(
        f"{config.path}: vllm.max_model_len, by default max_prompt_length + max_completion_length, is "
        f"{config.max_model_len}, but {config.base_model} has {positions} positions. Lower trl.max_completion_length or "
        "trl.max_prompt_length."
    )


def saved_dtype(config: Config) -> torch.dtype:
    """The type of the base model on disk, which the trained model is saved in, too."""
    return _settings(config).dtype or torch.float32


def _settings(config: Config) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(
        located(config, "base_model"), revision=config.revision_of_model, trust_remote_code=config.trust_remote_code
    )


def rollout_dtype(config: Config) -> torch.dtype:
    """What the engines hold their weights in: `vllm.dtype`, or for auto the type of the base model on disk."""
    named = {"bfloat16": torch.bfloat16, "float16": torch.float16, "half": torch.float16,
             "float32": torch.float32, "float": torch.float32}  # fmt: skip
    if config.vllm.dtype in named:
        return named[config.vllm.dtype]
    saved = saved_dtype(config)
    # vLLM, too, loads float32 checkpoints as float16 or bfloat16 for `auto`; bfloat16 is what it takes on a CPU.
    return torch.bfloat16 if saved == torch.float32 else saved
