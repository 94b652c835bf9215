"""G2: the learner's step on one GPU, Qwen3-shaped random weights of 0.6B, 1.5B and 4B, 16k and 64k tokens a step.

    python benchmarks/gpu/learner.py [--model 0.6B] [--tokens 16384] [--steps 5]
    python benchmarks/gpu/learner.py --toy        a tiny model on a CPU: whether the script works, no figure

Skewed lengths (sigma 0.9), groups of 8, bfloat16 over float32 weights, gradient checkpointing, AdamW. Beside ours, on the
same model and in turn with it: TRL's way, which is rows padded to the longest of the batch through its fused head
(`add_fused_lm_head`), same loss. The first step of each is left out; its losses must agree within 1e-2, its norms of
gradients within 2 % (bfloat16). MFU: 6 operations per weight and real token and 12 per layer, hidden unit of the
attention heads and attended pair, against a bfloat16 matmul measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlx.config import Config
from rlx.learner.microbatches.batching import Sample, collate
from rlx.learner.microbatches.forward import prepare
from rlx.learner.microbatches.logprobs import completion_logprobs
from rlx.learner.microbatches.splitting import split
from rlx.learner.objective.losses import LossOptions, policy_loss, token_weights

SHAPES = {
    "toy": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 500},
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "vocab_size": 151_936},
    "1.5B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 151_936},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32, "vocab_size": 151_936},
}  # fmt: skip
GROUP = 8


def make_model(name: str) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    shape = SHAPES[name]
    return Qwen3ForCausalLM(
        Qwen3Config(
            **shape, num_key_value_heads=min(8, shape["num_attention_heads"] // 2), tie_word_embeddings=True,
            head_dim=16 if name == "toy" else 128, max_position_embeddings=32_768,
        )
    )  # fmt: skip


def make_samples(num_tokens: int, vocabulary: int, toy: bool) -> list[Sample]:
    rng = np.random.default_rng(0)
    prompt, mean = (8, 20) if toy else (256, 900)
    groups = max(1, num_tokens // (GROUP * (prompt + mean)))
    lengths = np.clip(np.exp(rng.normal(np.log(mean) - 0.405, 0.9, groups * GROUP)), 4, 8 * mean).astype(int)
    prompts = [rng.integers(0, vocabulary, prompt).astype(np.int32) for _ in range(groups)]
    weights = token_weights("dapo", torch.tensor(lengths), 8 * mean).tolist()
    return [
        Sample(
            prompts[i // GROUP], rng.integers(0, vocabulary, n).astype(np.int32), np.zeros(n, np.float32),
            float(rng.normal()), weights[i],
        )
        for i, n in enumerate(lengths)
    ]  # fmt: skip


def ours(model: Qwen3ForCausalLM, samples: list[Sample], budget: int, flash: str | None) -> Callable[[Any], float]:
    keys: dict[str, Any] = {} if flash is None else {"attn_implementation": flash}
    plan = prepare(model, Config(base_model="m", rl="grpo", datasets=[{"path": "d", "type": "t.f"}], **keys))
    layout = plan.layout
    print(f"ours: {layout}")
    options = LossOptions(vllm_importance_sampling_correction=False)

    def step(device: torch.device) -> float:
        model.set_attn_implementation(flash or "sdpa")
        plan.apply_to(model)
        total = 0.0
        for part in split(samples, 1, 1, budget, layout)[0]:
            batch = collate(part, layout).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                logprobs, entropies = completion_logprobs(model, batch, 1.0)
            out = policy_loss(
                logprobs, None, None, None, batch.advantages_T, batch.weights_T, batch.lengths_B, options, entropies
            )
            out.loss.backward()  # type: ignore[no-untyped-call]
            total += out.loss.item()
        return total

    return step


def trl_way(model: Qwen3ForCausalLM, samples: list[Sample], budget: int, flash: str | None) -> Callable[[Any], float]:
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    prompt, longest = (max(len(x) for x in ids) for ids in zip(*((s.prompt_ids, s.completion_ids) for s in samples), strict=True))  # fmt: skip
    rows = max(1, budget // (prompt + longest))

    def step(device: torch.device) -> float:
        model.set_attn_implementation(flash or "sdpa")
        total = 0.0
        for start in range(0, len(samples), rows):
            part = samples[start : start + rows]
            ids = np.zeros((len(part), prompt + longest), np.int64)
            labels = np.full_like(ids, -100)
            for row, sample in enumerate(part):
                stop = prompt + len(sample.completion_ids)
                ids[row, prompt - len(sample.prompt_ids) : prompt] = sample.prompt_ids
                ids[row, prompt:stop] = labels[row, prompt:stop] = sample.completion_ids
            seen = torch.arange(prompt + longest)[None] < torch.tensor([[prompt + len(s.completion_ids)] for s in part])
            ids_BS, labels_BS = torch.from_numpy(ids).to(device), torch.from_numpy(labels).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                out = model(input_ids=ids_BS, attention_mask=seen.to(device), labels=labels_BS, fused_lm_head=True)
            ratio = (out.log_probs - out.log_probs.detach()).exp()
            factor = torch.tensor([[s.advantage * s.token_weight] for s in part], device=device)
            loss = -(ratio * factor * (labels_BS[:, 1:] >= 0)).sum()
            loss.backward()
            total += loss.item()
        return total

    return step


def matmul_ceiling(device: torch.device) -> float:
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = 0.0
    for _ in range(10):
        start = now(device)
        a @ a
        best = max(best, 2 * size**3 / (now(device) - start))
    return best


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(name: str, tokens: int, steps: int, flash: str | None) -> None:
    """Prints a line for each way."""
    toy, shape = name == "toy", SHAPES[name]
    device = torch.device("cpu" if toy else "cuda")
    model, samples = make_model(name), make_samples(tokens, shape["vocab_size"], toy)
    budget = 400 if toy else 16_384
    ways = {way.__name__: way(model, samples, budget, flash) for way in (ours, trl_way)}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(steps + 1):
        for way, step in ways.items():
            runs[way].append(_timed(model, optimizer, step, device))
    for key, tolerance in (("loss", 1e-2), ("gradient", 2e-2)):
        values = [steps[0][key] for steps in runs.values()]
        assert abs(values[0] - values[1]) < tolerance * max(1, values[0]), f"not the same work: {key} {values}"
    lengths = np.array([len(s.prompt_ids) + len(s.completion_ids) for s in samples], dtype=np.float64)
    weights, heads = sum(p.numel() for p in model.parameters()), shape["num_attention_heads"] * model.config.head_dim
    work = 6 * weights * lengths.sum() + 12 * shape["num_hidden_layers"] * heads * (lengths**2).sum() / 2
    ceiling = matmul_ceiling(device)
    kind = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{kind} {name}: {lengths.sum():.0f} real tokens, matmul ceiling {ceiling / 1e12:.2f} TFLOP/s")
    for way, measured in runs.items():
        seconds = [step["seconds"] for step in measured[1:]]
        ratio = statistics.median(other["seconds"] / own["seconds"] for other, own in zip(measured[1:], runs["ours"][1:], strict=True))  # fmt: skip
        middle = statistics.median(seconds)
        print(
            f"  {way:8} {middle:.3f} s ({min(seconds):.3f} to {max(seconds):.3f}), {ratio:.2f} of ours, "
            f"{lengths.sum() / middle:.0f} tok/s, MFU {work / middle / ceiling:.1%}, "
            f"peak {max(step['peak'] for step in measured):.1f} GiB"
        )


def _timed(
    model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, step: Callable[[Any], float], device: torch.device
) -> dict[str, float]:
    """One step with its optimizer: seconds, loss, norm of the gradient, greatest memory of the GPU in GiB."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = now(device)
    loss = step(device)
    gradient = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
    optimizer.step()
    optimizer.zero_grad()
    seconds = now(device) - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")
    return {"seconds": seconds, "loss": loss, "gradient": gradient, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES))
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--flash", help="flash_attention_2 or flash_attention_3, where that is installed")
    parser.add_argument("--toy", action="store_true")
    given = parser.parse_args()
    if not given.toy and not torch.cuda.is_available():
        sys.exit(f"{Path(__file__).name} needs a GPU; `--toy` tries the script without one")
    names = ["toy"] if given.toy else [given.model] if given.model else ["0.6B", "1.5B", "4B"]
    for name in names:
        for tokens in [512] if given.toy else [given.tokens] if given.tokens else [16_384, 65_536]:
            measure(name, tokens, given.steps, given.flash)


if __name__ == "__main__":
    main()
