"""One learner's forward and backward of one optimizer step, in a process of its own: `python paths.py NAME SETTINGS`.

NAME is one of `PATHS`. Each reads a line, runs the step, and answers with one line of JSON: loss, gradient norm, tokens
forwarded, wall and CPU seconds, peak resident memory in bytes. With one thread it stays on one core from the first step.

- ours: packed rows, prompts shared; ours-unshared: every prompt once per completion; ours-padded: no packing.
- trl-sync: `_compute_loss` of TRL's own `GRPOTrainer` on micro-batches of the batch that its own code made of the
  rollouts; trl-sync-old adds the forward for the old log-probabilities, which its importance correction needs.
- trl-async: rows and collator of TRL's asynchronous trainer, its `compute_loss`, its fused head. CPU port: its tree
  attention, which needs flash attention 3, is scaled dot products per segment over the keys that it names.
Both of TRL's score only labelled positions, as on a GPU; on a CPU they would score prompts and padding, too.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlx.config import Config
from rlx.learner.microbatches.batching import Sample, collate
from rlx.learner.microbatches.forward import prepare
from rlx.learner.microbatches.logprobs import completion_logprobs
from rlx.learner.microbatches.splitting import num_tokens, split
from rlx.learner.objective.losses import LossOptions, policy_loss, token_weights

Step = Callable[[], tuple[float, int]]
"""Runs the step; the loss and the tokens forwarded"""


@dataclass(frozen=True)
class Settings:
    """Lengths are log-normal with that mean and sigma, in tokens."""

    prompt: int = 64
    mean: int = 80
    sigma: float = 0.9
    completions: int = 16
    group: int = 8
    vocabulary: int = 32_000
    hidden: int = 384
    layers: int = 6
    micro_batch: int = 4
    token_budget: int = 1024
    threads: int = 1

    @property
    def longest(self) -> int:
        return 8 * self.mean


def make_model(settings: Settings) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=settings.vocabulary, hidden_size=settings.hidden, intermediate_size=settings.hidden * 11 // 4,
        num_hidden_layers=settings.layers, num_attention_heads=settings.hidden // 64,
        num_key_value_heads=settings.hidden // 192, tie_word_embeddings=True, max_position_embeddings=8192,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


@dataclass(frozen=True)
class Rollouts:
    prompts: list[list[int]]
    completions: list[list[int]]
    advantages: list[float]


def make_rollouts(settings: Settings) -> Rollouts:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(settings.mean) - settings.sigma**2 / 2, settings.sigma, settings.completions))
    lengths = np.clip(lengths, 4, settings.longest).astype(int)

    def ids(count: int) -> list[int]:
        return [int(i) for i in rng.integers(1, settings.vocabulary, count)]

    heads = [ids(settings.prompt) for _ in range(settings.completions // settings.group)]
    completions = [[*ids(n - 1), 0] for n in lengths]
    prompts = [heads[i // settings.group] for i in range(settings.completions)]
    return Rollouts(prompts, completions, [float(a) for a in rng.normal(0, 1, settings.completions)])


def ours(settings: Settings, model: Qwen2ForCausalLM, packed: bool, shared: bool = True) -> Step:
    config = Config(
        base_model="m", rl="grpo", datasets=[{"path": "d", "type": "t.f"}],
        sample_packing=None if packed else False, share_prompt_prefix=shared,
    )  # fmt: skip
    layout = prepare(model, config).layout
    rollouts = make_rollouts(settings)
    weights = token_weights("dapo", torch.tensor([len(c) for c in rollouts.completions]), settings.longest).tolist()
    samples = [
        Sample(np.array(p, np.int32), np.array(c, np.int32), np.zeros(len(c), np.float32), a, w)
        for p, c, a, w in zip(rollouts.prompts, rollouts.completions, rollouts.advantages, weights, strict=True)
    ]
    micro_batches = settings.completions // settings.micro_batch
    options = LossOptions(vllm_importance_sampling_correction=False)

    def step() -> tuple[float, int]:
        total, tokens = 0.0, 0
        for part in split(samples, 1, micro_batches, settings.token_budget if packed else None, layout)[0]:
            batch = collate(part, layout)
            logprobs, entropies = completion_logprobs(model, batch, 1.0)
            out = policy_loss(
                logprobs, None, None, None, batch.advantages_T, batch.weights_T, batch.lengths_B, options, entropies
            )
            out.loss.backward()  # type: ignore[no-untyped-call]
            total, tokens = total + out.loss.item(), tokens + num_tokens(part, layout)
        return total, tokens

    return step


def trl_sync(settings: Settings, model: Qwen2ForCausalLM, old: bool = False) -> Step:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import split_tensor_dict

    score_labelled_positions_only()
    rollouts, folder = make_rollouts(settings), Path(tempfile.mkdtemp())
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(settings.vocabulary)}, unk_token="t0"))
    count, parts = settings.completions, settings.completions // settings.micro_batch
    arguments = GRPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
        per_device_train_batch_size=count, num_generations=settings.group, max_completion_length=settings.longest,
        beta=0.0, temperature=1.0,
    )  # fmt: skip
    trl: Any = GRPOTrainer(
        model=model,
        reward_funcs=[lambda **_: rollouts.advantages],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["t2"] * count}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0", pad_token="t0"),
        rollout_func=lambda prompts, trainer: {
            "prompt_ids": rollouts.prompts,
            "completion_ids": rollouts.completions,
            "logprobs": [[-10.0] * len(c) for c in rollouts.completions],
        },
    )
    trl.current_gradient_accumulation_steps = parts
    trl.args.gradient_accumulation_steps = trl.args.steps_per_generation = parts
    trl.use_vllm, trl._last_loaded_step = True, 0  # the rollout function stands for vLLM, with its weights loaded
    trl.vllm_importance_sampling_correction = old
    model.train()

    def rollout() -> Any:
        batch = trl._generate_and_score_completions([{"prompt": "t2"}] * count)
        batch["advantages"] = torch.tensor(rollouts.advantages)
        if old:  # made-up log-probabilities of the rollout: their ratio is computed, then left out
            batch["importance_sampling_ratio"] = torch.ones_like(batch["importance_sampling_ratio"])
        return batch

    ready = rollout()

    def step() -> tuple[float, int]:
        batch = rollout() if old else ready
        total = 0.0
        for part in split_tensor_dict(batch, parts):
            loss = trl._compute_loss(model, part)
            loss.backward()
            total += loss.item()
        return total, count * (batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1])

    return step


def trl_async(settings: Settings, model: Qwen2ForCausalLM) -> Step:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import repeat_kv
    from transformers.masking_utils import AttentionMaskInterface
    from trl.experimental.async_grpo.async_grpo_trainer import (
        AsyncGRPOTrainer,
        DataCollatorForRollout,
        TokenBudgetBatcher,
    )
    from trl.experimental.async_grpo.packing import TreeRow
    from trl.trainer.utils import add_fused_lm_head

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **tree: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        index = tree["tree_kv_index"]
        key, value = (repeat_kv(x.index_select(2, index), groups) for x in (key, value))
        q_lengths, k_lengths = (tree[f"tree_cu_seqlens_{x}"].diff().tolist() for x in "qk")
        outputs = []
        for q, k, v in zip(query.split(q_lengths, 2), key.split(k_lengths, 2), value.split(k_lengths, 2), strict=True):
            same = q.shape[2] == k.shape[2]
            lower = None if same else torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
            outputs.append(
                torch.nn.functional.scaled_dot_product_attention(q, k, v, lower, scale=scaling, is_causal=same)
            )
        return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None

    score_labelled_positions_only()
    AttentionInterface.register("tree_cpu_port", attention)
    AttentionMaskInterface.register("tree_cpu_port", lambda **_: None)
    model.set_attn_implementation("tree_cpu_port")
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    rollouts, metrics = make_rollouts(settings), defaultdict(list)
    num_trained = sum(map(len, rollouts.completions))
    trainer: Any = SimpleNamespace(
        epsilon_low=0.2, epsilon_high=0.2, aux_loss_enabled=False, current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
        _metrics={"train": metrics}, _step_forward_tokens=0.0, _step_trained_tokens=0.0, _step_seq_len_weighted=0.0,
        _step_samples=0.0, _step_forward_s=0.0,
    )  # fmt: skip
    samples = [
        {"input_ids": torch.tensor(p + c), "completion_mask": torch.tensor([0] * len(p) + [1] * len(c)), "group_id": i // settings.group,
         "old_log_probs": torch.tensor([0.0] * (len(p) + len(c))), "advantage": a, "metrics": {}}
        for i, (p, c, a) in enumerate(zip(rollouts.prompts, rollouts.completions, rollouts.advantages, strict=True))
    ]  # fmt: skip
    model.train()
    with torch.no_grad():  # the rollout's log-probabilities are those of the model: ratio 1, as in the other paths
        for sample in samples:
            ids = sample["input_ids"]
            n = len(ids)
            tree = {
                "tree_kv_index": torch.arange(n),
                "tree_cu_seqlens_q": torch.tensor([0, n]),
                "tree_cu_seqlens_k": torch.tensor([0, n]),
            }
            out = model(input_ids=ids[None], labels=ids[None], fused_lm_head=True, **tree)
            sample["old_log_probs"][1:] = out.log_probs[0, -(n - 1) :]
    budget = max(settings.token_budget, *(len(s["input_ids"]) for s in samples))

    def step() -> tuple[float, int]:
        collator, total, tokens = DataCollatorForRollout(pad_token_id=0, metrics=metrics), 0.0, 0
        planner, rows = TokenBudgetBatcher([], 1, budget, metrics), [TreeRow()]
        for sample in samples:  # its planner serves an endless stream and keeps the last row open
            placed = planner._place(rows[-1:], sample)
            if placed is None:
                placed = TreeRow()
                rows.append(placed)
            placed.add(sample)
        for row in rows:
            inputs = collator.torch_call([[row]])
            tokens += int(inputs["input_ids"].numel())
            inputs["global_n_tokens"][:] = num_trained
            loss = AsyncGRPOTrainer.compute_loss(trainer, model, inputs)
            loss.backward()
            total += loss.item()
        return total, tokens

    return step


def score_labelled_positions_only() -> None:
    """TRL asks whether Triton is there before it leaves out the positions without a label; the CPU can do it, too."""
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: True


PATHS: dict[str, Callable[[Settings, Qwen2ForCausalLM], Step]] = {
    "ours": lambda settings, model: ours(settings, model, packed=True),
    "ours-unshared": lambda settings, model: ours(settings, model, packed=True, shared=False),
    "ours-padded": lambda settings, model: ours(settings, model, packed=False),
    "trl-sync": trl_sync,
    "trl-sync-old": lambda settings, model: trl_sync(settings, model, old=True),
    "trl-async": trl_async,
}


def main() -> None:
    import rlx.learner.main  # noqa: F401  what a learner of ours holds in memory

    name, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))
    torch.set_num_threads(settings.threads)
    model = make_model(settings)
    step = PATHS[name](settings, model)
    if settings.threads == 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for _ in sys.stdin:
        model.zero_grad()
        wall, cpu = time.perf_counter(), time.process_time()
        loss, tokens = step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print("STEP " + json.dumps({
            "loss": loss, "gradient": gradient, "tokens": tokens, "wall_s": wall, "cpu_s": cpu, "peak": peak
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
