"""QLoRA: a base model whose matrices are held in 4 bits, by bitsandbytes, and read back in float32.

Only linear layers between embedding and head are quantised; the rest is float32 as without it.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel

from rlx.config import Config
from rlx.errors import ConfigError


def check_installed(config: Config) -> None:
    """ConfigError where a quantised base model is asked for and bitsandbytes is not there."""
    if config.adapter == "qlora" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{config.path}: adapter: qlora needs the package bitsandbytes, which is not installed; type "
            "`pip install 'rlx[qlora]'`, or write `adapter: lora`"
        )


def quantization(config: Config) -> BitsAndBytesConfig | None:
    """What `from_pretrained` is to do; None where the base model is not quantised."""
    if config.adapter != "qlora":
        return None
    check_installed(config)
    kwargs = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | config.bnb_config_kwargs
    in_bf16 = torch.cuda.is_available() if config.bf16 == "auto" else config.bf16
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16 if in_bf16 else torch.float32, **kwargs
    )


def ready_to_train(model: PreTrainedModel) -> None:
    """`model` was loaded with `quantization`, on the CPU; whoever trains may move it like any other."""
    if hasattr(model, "hf_device_map"):
        del model.hf_device_map
    for module in model.modules():
        # In evaluation bitsandbytes repacks the matrices of a CPU that multiplies bfloat16, for good and in place: they
        # round more then, give no gradient, and cannot be read back.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_quantized(parameter: Tensor) -> bool:
    return getattr(parameter, "quant_state", None) is not None


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Of the matrix, however it is held."""
    return tuple(parameter.quant_state.shape if is_quantized(parameter) else parameter.shape)  # type: ignore[attr-defined]


def matrix_of(parameter: Tensor) -> Tensor:
    """What is multiplied with: float32, the parameter itself where it is not quantised."""
    if not is_quantized(parameter):
        return parameter
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(parameter.quant_state)  # type: ignore[attr-defined]
    state.dtype = torch.float32
    return dequantize_4bit(parameter.data, state)
