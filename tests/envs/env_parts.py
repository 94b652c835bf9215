"""Parts of episodes for tests: tiny tokenizers of several families, a policy that says what it is told, environments."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from rlx.config.sections import EpisodesSection
from rlx.envs.chat import Chat
from rlx.envs.errors import EnvLost
from rlx.envs.runner import EpisodeRunner, Native
from rlx.envs.state import Environments
from rlx.tokenizer import template_folder
from rlx.wire import Completion, GroupRequest, Sampling
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

_QWEN = ("<|im_end|>", ["<|im_start|>"], ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"])  # fmt: skip
_LLAMA = ("<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"], [])
FAMILIES = {
    "qwen3": _QWEN,
    "qwen2_5": _QWEN,
    "qwen3_5": _QWEN,
    "llama3": _LLAMA,
    "phi3": ("<|endoftext|>", ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"], []),
    "gemma": ("<end_of_turn>", ["<start_of_turn>", "<bos>"], []),
    "glm4moe": ("<|endoftext|>", ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"], ["<think>", "</think>", "<tool_call>", "</tool_call>"]),
    "deepseekv3": ("<｜end▁of▁sentence｜>", ["<｜begin▁of▁sentence｜>"], ["<｜User｜>", "<｜Assistant｜>"]),
}  # fmt: skip
"""Family: its end of a turn, its other special tokens, its added tokens that are not special."""
ENDS = {"phi3": "<|end|>", "glm4moe": "<|user|>"}
"""Where another token than the end of sequence ends a turn."""
USER = {"role": "user", "content": "hi"}


def tiny_tokenizer(family: str = "qwen3", template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, plus the added tokens of `family`; `template` is the name of one that TRL ships."""
    eos, special, added = FAMILIES[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        pad_token="<pad>",
        bos_token=next((name for name in special if "b" in name[:4] and "egin" in name or name == "<bos>"), None),
        additional_special_tokens=special,
    )
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in added])
    if template is not None:
        tokenizer.chat_template = (template_folder() / f"{template}.jinja").read_text()
    return tokenizer


@cache
def chat_of(family: str = "qwen3", template: str | None = "qwen3_training") -> Chat:
    return Chat(tiny_tokenizer(family, template))
