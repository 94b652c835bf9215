"""C2: log-probabilities, entropies and their gradients from hidden states, vocabulary 2k to 152k.

    python benchmarks/learner/loss.py [--quick]

Full logits, TRL's fused head (`trl.kernels`, the kernel alone, on the same positions) and ours, each in a process of
its own, one call each in turn, the first discarded. Memory is the growth of the resident peak over the inputs, the
gradients of hidden states and weights included, which all must make. CPU seconds are given beside wall seconds.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

from rlx.learner.microbatches.head import score

HIDDEN, TEMPERATURE = 256, 0.9


def full(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    logits = torch.nn.functional.linear(hidden, weight) / TEMPERATURE
    normalizer = logits.logsumexp(dim=-1)
    with torch.no_grad():
        entropy = normalizer - (logits.softmax(dim=-1) * logits).sum(dim=-1)
    return logits.gather(-1, ids[:, None])[:, 0] - normalizer, entropy


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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in sys.stdin:
        hidden.grad = weight.grad = None
        wall, cpu = time.perf_counter(), time.process_time()
        logprobs, entropy = WAYS[name](hidden, weight, ids)
        (logprobs * upstream).sum().backward()  # type: ignore[no-untyped-call]
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        assert hidden.grad is not None
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        print(json.dumps([wall, cpu, peak, logprobs.sum().item(), entropy.sum().item(), hidden.grad.norm().item()]), flush=True)  # fmt: skip


def main() -> None:
    repeats = 3 if "--quick" in sys.argv else 5
    print(f"load {os.getloadavg()}; hidden {HIDDEN}, 1 thread, float32")
    print(f"{'V':>7} {'tokens':>7} {'way':6}{'cpu s':>8}{'wall s':>8}{'memory MB':>11}{'of full':>9}")
    sizes = (
        ((2_048, 4096), (152_064, 2048)) if "--quick" in sys.argv else ((2_048, 4096), (32_000, 4096), (152_064, 4096))
    )
    for vocabulary, tokens in sizes:
        children = {
            name: subprocess.Popen(
                [sys.executable, __file__, "child", name, str(tokens), str(vocabulary)],
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
        for name, measured in runs.items():
            wall, cpu = (statistics.median(run[i] for run in measured[1:]) for i in (0, 1))
            memory = measured[-1][2]
            print(f"{vocabulary:7d} {tokens:7d} {name:6}{cpu:8.2f}{wall:8.2f}{memory / 1e6:11.0f}{memory / runs['full'][-1][2]:9.2f}")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
