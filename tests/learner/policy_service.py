"""The real service around a worker that samples from the published weights with torch: small models that learn in
seconds, through HTTP, with everything of the learner in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rlx.rollout.manifest import WeightManifest, fingerprint
from rlx.rollout.worker import Taken, WorkerStatus
from rlx.wire import Completion, Sampling

WORDS = ("<pad>", "<end>", *"abcdefghij", "go")


def make_word_model(folder: Path, seed: int) -> Path:
    """A random model of 13 words, one layer, and its tokenizer."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
    config = Qwen3Config(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.05,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class PolicyWorker:
    """Samples with the model in `folder`, then with what is published, from a generator seeded with `seed`."""

    name = "worker-0"

    def __init__(self, folder: Path, seed: int):
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._end = self._model.config.eos_token_id
        self._decode = PreTrainedTokenizerFast.from_pretrained(folder).decode
        self._rng = torch.Generator().manual_seed(seed)
        self.version = 0

    async def start(self) -> None: ...

    async def status(self) -> WorkerStatus:
        return WorkerStatus(self.name, "ready", self.version, 0.0, 0)

    async def generate(self, request_id: str, prompt_ids: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        return self.sample(prompt_ids, n, sampling)

    @torch.no_grad()
    def sample(self, prompt_ids: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        ids_BT = torch.from_numpy(prompt_ids.astype(np.int64)).expand(n, -1)
        start, done_B = ids_BT.shape[1], torch.zeros(n, dtype=torch.bool)
        logprobs_BL, cache, inputs = [], None, ids_BT
        while not done_B.all() and ids_BT.shape[1] - start < sampling.max_tokens:
            out = self._model(input_ids=inputs, past_key_values=cache, use_cache=True)
            logprobs_BV = (out.logits[:, -1].float() / sampling.temperature).log_softmax(-1)
            inputs = torch.multinomial(logprobs_BV.exp(), 1, generator=self._rng)
            logprobs_BL.append(logprobs_BV.gather(1, inputs))
            ids_BT, cache = torch.cat([ids_BT, inputs], dim=1), out.past_key_values
            done_B |= inputs[:, 0] == self._end
        ids, logprobs = ids_BT[:, start:].numpy(), torch.cat(logprobs_BL, dim=1).numpy()
        return [self._completion(row, values) for row, values in zip(ids, logprobs, strict=True)]

    def _completion(self, ids: np.ndarray, logprobs: np.ndarray) -> Completion:
        ends = np.flatnonzero(ids == self._end)
        count = int(ends[0]) + 1 if ends.size else ids.size
        text = self._decode(ids[:count], skip_special_tokens=True)
        reason = "stop" if ends.size else "length"
        return Completion(
            ids[:count].astype(np.int32), logprobs[:count].astype(np.float32), ((self.version, count),), reason, text
        )

    async def prompt_logprobs(self, ids: np.ndarray) -> np.ndarray:
        ids_T = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            logprobs_TV = self._model(input_ids=ids_T[None]).logits[0].float().log_softmax(-1)
        return logprobs_TV[:-1].gather(1, ids_T[1:, None])[:, 0].numpy()

    async def announce(self, manifest: WeightManifest) -> None: ...

    async def commit(self, manifest: WeightManifest, path: str) -> Taken:
        data = await asyncio.to_thread(Path(path).read_bytes)
        self._model.load_state_dict(load(data), strict=False)  # a tied head travels once
        self.version = manifest.version
        return Taken(fingerprint(data))

    async def openai(self, route: str, body: dict[str, Any]) -> dict[str, Any] | AsyncIterator[str]:
        return {}

    async def close(self) -> None: ...
