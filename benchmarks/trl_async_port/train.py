"""TRL's AsyncGRPOTrainer on a CPU, driven by the fake server of `server.py`: one run, its times as JSON on stdout.

    python train.py SETTINGS_JSON

TRL's own: the trainer loop, the rollout worker in its child process, queue, staleness rule, batching, packing and the
weight-sync protocol. Shims of the CPU port: the look-up of the GPU's peak FLOPs; a `vllm` distribution (the caller
puts one on the path); a weight transfer that pauses and resumes and sends nothing; and forward, backward and
optimizer are one sleep of `train_s`, as on the other side of the comparison, so that its FA3 attention is not called.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from trace_engine import FIRST_TICKET, TOKEN
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback


def rewards(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(ids) % 2) for ids in completion_ids]


def make_model(folder: Path, prompts: int) -> None:
    """A model of a few thousand parameters, and a tokenizer where prompt n is the word `n` with the id that
    `trace_engine` expects."""
    from trl.chat_template_utils import qwen3_chat_template

    words = ["<pad>", "<|im_end|>", "<|im_start|>", "<unk>", "user", "assistant", "system", "x"]
    assert words[TOKEN] == "x"
    words += [f"_{i}" for i in range(len(words), FIRST_TICKET)] + [str(i) for i in range(prompts)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"], padding_side="left",
    )  # fmt: skip
    tokenizer.chat_template = qwen3_chat_template
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)


class NoTransfer:
    """Pauses and resumes the server as TRL's own transfer does, and sends nothing."""

    def __init__(self, client: Any):
        self._client = client

    def init_weight_transfer(self) -> None:
        self._client.wait_for_server_ready(poll_interval_s=0.1)

    def pause(self) -> None:
        self._client.pause()

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        for _ in iterator:
            pass

    def resume(self) -> None:
        self._client.resume()

    def destroy(self) -> None: ...


class StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append(time.monotonic())


def train(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    from datasets import Dataset
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer
    from trl.experimental.async_grpo.vllm_client import VLLMClient

    async_grpo_trainer.get_peak_flops_per_device = lambda *_: None  # it asks CUDA for the name of the device
    trained: dict[int, int] = defaultdict(int)
    staleness: list[float] = []
    dropped: list[float] = []
    samples_of_step: list[list[int]] = []

    class Trainer(AsyncGRPOTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            time.sleep(given["train_s"])
            self._step_microbatches += 1
            samples_of_step.append([int(inputs["segment_id"].max()) + 1, int(inputs["global_n_tokens"][0])])
            return torch.zeros(())

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            staleness.extend(self._metrics["train"].get("sample/staleness_mean", ()))
            dropped.extend(self._metrics["train"].get("sample/dropped_stale_total", ()))
            super().log(logs, start_time)

    base_url, samples = given["url"], given["samples_per_step"]
    make_model(folder / "model", given["trace"]["prompts"])
    extra = {key: given[key] for key in ("queue_maxsize", "max_inflight_tasks") if given.get(key)}
    arguments = AsyncGRPOConfig(
        str(folder / "out"), max_steps=given["steps"], per_device_train_batch_size=samples, token_budget=0,
        num_generations=given["trace"]["generations"], max_staleness=given["max_staleness"],
        vllm_server_base_url=base_url, max_completion_length=2**20, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to=[], save_strategy="no", disable_tqdm=True, seed=0, **extra,
    )  # fmt: skip
    rows = [{"prompt": [{"role": "user", "content": str(n)}]} for n in range(given["trace"]["prompts"])]
    times = StepTimes()
    trainer = Trainer(
        str(folder / "model"), rewards, arguments, Dataset.from_list(rows), callbacks=[times],
        weight_transfer=NoTransfer(VLLMClient(base_url)),
    )  # fmt: skip
    collator = async_grpo_trainer.DataCollatorForRollout
    pack = collator.torch_call

    def counted(self: Any, examples: list[Any]) -> dict[str, Any]:
        for row in examples[0]:
            for sample in row.samples:
                trained[int(sample["group_id"])] += 1
        return pack(self, examples)

    collator.torch_call = counted
    worker = async_grpo_trainer.AsyncRolloutWorker
    worker.stop = lambda self: self._process and self._process.kill()  # nothing is measured any more
    trainer.train()
    return {
        "ends": times.ends,
        "samples": [count for count, _ in samples_of_step],
        "tokens": [tokens for _, tokens in samples_of_step],
        "trained": trained,
        "staleness": staleness,
        "dropped": sum(dropped),
        "log": [row for row in trainer.state.log_history if "perf/step_s" in row],
    }


def main() -> None:
    given = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        answer = train(given, Path(folder))
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
