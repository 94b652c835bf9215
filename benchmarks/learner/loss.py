"""C2: log-probabilities, entropies and their gradients from hidden states, vocabulary 2k to 152k.

    python benchmarks/learner/loss.py [--quick]

Full logits (TRL's way without its fused head), its fused head (`trl.kernels`, the kernel alone, on the same positions)
and ours, each in a process of its own on one core, one call each in turn, the first discarded; results must agree
within 1e-4. Memory is the growth of the resident peak over the inputs, the gradients of hidden states and weights
included, which all must make. CPU seconds are given beside wall seconds; a ratio is the median over the rounds of a
way's CPU seconds to ours in the same round.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlx.learner.microbatches.head import score

HIDDEN, TEMPERATURE = 256, 0.9


def full(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logits = torch.nn.functional.linear(hidden, weight)[None]
    logprobs, entropy = selective_log_softmax_and_entropy(logits, ids[None], False, TEMPERATURE)
    return logprobs[0], entropy[0]


def fused_trl(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    out: Any = ChunkedLogProbFunction.apply(
        hidden, weight, None, ids, TEMPERATURE, CHUNK, None, 1.0, ("log_probs", "entropy")
    )
    return out[0], out[1]


def ours(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return score(hidden, weight, None, ids, TEMPERATURE)


WAYS = {"full": full, "trl": fused_trl, "ours": ours}


def child(name: str, tokens: int, vocabulary: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
    weight = (torch.randn(vocabulary, HIDDEN) * 0.05).requires_grad_()
    ids, upstream = torch.randint(vocabulary, (tokens,)), torch.randn(tokens)
    small = torch.randn(2, HIDDEN, requires_grad=True)
    WAYS[name](small, weight[:8].detach().requires_grad_(), ids[:2] % 8)  # imports
    before = _resident()[0]
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for _ in sys.stdin:
        hidden.grad = weight.grad = None
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        wall, cpu = time.perf_counter(), time.process_time()
        logprobs, entropy = WAYS[name](hidden, weight, ids)
        (logprobs * upstream).sum().backward()  # type: ignore[no-untyped-call]
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        assert hidden.grad is not None
        peak = _resident()[1] - before
        print(json.dumps([wall, cpu, peak, logprobs.sum().item(), entropy.sum().item(), hidden.grad.norm().item()]), flush=True)  # fmt: skip


def _resident() -> tuple[int, int]:
    """Bytes of this process in memory now, and at most since the peak was reset."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) * 1024, int(lines["VmHWM"].split()[0]) * 1024


def measure(vocabulary: int, tokens: int, repeats: int) -> dict[str, list[list[float]]]:
    """What `child` printed for each way and round, the first round left out."""
    arguments = [str(tokens), str(vocabulary)]
    children = {
        name: subprocess.Popen(
            [sys.executable, __file__, "child", name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in WAYS
    }
    runs: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    try:
        for _ in range(repeats + 1):
            for name, process in children.items():
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("\n")
                process.stdin.flush()
                runs[name].append(json.loads(process.stdout.readline()))
    finally:
        for process in children.values():
            process.kill()
            process.wait()
    for values in zip(*(r[-1][3:] for r in runs.values()), strict=True):
        assert max(values) - min(values) < 1e-4 * abs(values[0]), f"not the same work: {values}"
    return {name: calls[1:] for name, calls in runs.items()}


def main() -> None:
    quick = "--quick" in sys.argv
    print({name: importlib.metadata.version(name) for name in ("torch", "trl")})
    print(f"load {os.getloadavg()[0]:.1f}; hidden {HIDDEN}, 1 thread, float32")
    print(
        f"{'V':>7}{'tokens':>8} {'way':6}{'cpu s':>8}{'wall s':>8}{'ratio to ours':>21}{'memory MB':>11}{'of full':>9}"
    )
    sizes = ((2_048, 4096), (32_000, 2048), (152_064, 2048))
    for vocabulary, tokens in sizes[::2] if quick else sizes:
        runs = measure(vocabulary, tokens, 3 if quick else 5)
        for name, calls in runs.items():
            wall, cpu = (statistics.median(call[i] for call in calls) for i in (0, 1))
            ratios = [call[1] / own[1] for call, own in zip(calls, runs["ours"], strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            memory = calls[-1][2]
            print(
                f"{vocabulary:7d}{tokens:8d} {name:6}{cpu:8.2f}{wall:8.2f}{ratio:>21}{memory / 1e6:11.0f}"
                f"{memory / runs['full'][-1][2]:9.2f}",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
