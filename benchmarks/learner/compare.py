"""C1 and C3: one learner step of rlx beside TRL's synchronous and asynchronous trainers, same model, same batch.

    python benchmarks/learner/compare.py skewed [--quick]      C1: log-normal lengths, sigma 0.3, 0.6, 0.9
    python benchmarks/learner/compare.py prompts [--quick]     C3: shared prompts, prompt/completion 0.5, 2, 8, groups of 8

Every path (`paths.py`) is a process of its own, so that its memory is, and all stay on one core; they take turns, one
step each, the first step of each discarded. Losses must agree within 1e-4, norms of gradients within 1e-3. CPU seconds
are given beside wall seconds: where others use the machine only they compare. A ratio is the median over the rounds of
a path's CPU seconds to ours in the same round, with the least and the greatest.

MFU: the operations that the step needs at least (`operations`, prompts shared, completions alone scored), per CPU
second, against the best of a float32 matmul of the same run and thread count. The same work is counted for every path:
what one computes beyond it lowers its figure. Tokens per second are real ones, prompts once per completion.

C3 has two limits. Of tokens: G(P + L) / (P + GL), what sharing saves where all work is per forwarded token. Of
operations: scoring is paid per trained token, and attention to a prompt per completion, which sharing does not change.
V is such that the head has a quarter of the weights, as in Qwen3-0.6B; `--vocabulary` takes another.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from paths import Rollouts, Settings, make_model, make_rollouts

PATHS = Path(__file__).with_name("paths.py")

Runs = dict[str, list[dict[str, Any]]]
"""What each path's steps measured, those of one round in the same place"""


def compare(settings: Settings, names: Sequence[str], repeats: int) -> Runs:
    """`repeats` interleaved steps of each path, after one that is not kept."""
    command = [sys.executable, str(PATHS)]
    environment = os.environ | {"OMP_NUM_THREADS": str(settings.threads), "PYTHONWARNINGS": "ignore"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    children = {
        name: subprocess.Popen([*command, name, json.dumps(asdict(settings))], text=True, env=environment, **pipes)
        for name in names
    }
    runs: Runs = {name: [] for name in names}
    try:
        for _ in range(repeats + 1):
            for name, child in children.items():
                runs[name].append(_step(name, child))
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    for key, tolerance in (("loss", 1e-4), ("gradient", 1e-3)):
        values = [steps[-1][key] for steps in runs.values()]
        assert max(values) - min(values) < tolerance * max(1, abs(values[0])), f"not the same work: {key} {values}"
    return {name: steps[1:] for name, steps in runs.items()}


def _step(name: str, child: subprocess.Popen[str]) -> dict[str, Any]:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    for line in child.stdout:
        if line.startswith("STEP "):
            step: dict[str, Any] = json.loads(line[5:])
            return step
    raise RuntimeError(f"{name} ended with status {child.wait()}")


def ratios(runs: Runs, name: str, to: str = "ours") -> tuple[float, float, float]:
    """Median, least and greatest of CPU seconds of one path to those of another, round by round."""
    values = [a["cpu_s"] / b["cpu_s"] for a, b in zip(runs[name], runs[to], strict=True)]
    return statistics.median(values), min(values), max(values)


def matmul_ceiling(threads: int) -> float:
    """float32 operations per CPU second of the best of some large products."""
    torch.set_num_threads(threads)
    a, b, best = torch.randn(1024, 1024), torch.randn(1024, 1024), 0.0
    for _ in range(8):
        start = time.process_time()
        for _ in range(4):
            a @ b
        best = max(best, 4 * 2 * 1024**3 / (time.process_time() - start))
    return best


def operations(settings: Settings, rollouts: Rollouts, weights: int, shared: bool) -> float:
    """Of forward and backward: 6 per weight of the layers and forwarded token, 6 per weight of the head and trained
    token, 12 per layer, hidden unit and pair of a query and a key that it sees."""
    tokens = pairs = 0.0
    for i, completion in enumerate(rollouts.completions):
        prompt, length = settings.prompt, len(completion)
        pairs += length * (prompt + length / 2)
        tokens += length
        if not shared or i % settings.group == 0:
            tokens += prompt
            pairs += prompt**2 / 2
    head = settings.vocabulary * settings.hidden
    trained = sum(map(len, rollouts.completions))
    return 6 * (weights - head) * tokens + 6 * head * trained + 12 * settings.layers * settings.hidden * pairs


def show(title: str, settings: Settings, runs: Runs, ceiling: float) -> None:
    """Prints the table of one setting."""
    rollouts = make_rollouts(settings)
    real = sum(len(p) + len(c) for p, c in zip(rollouts.prompts, rollouts.completions, strict=True))
    weights = sum(p.numel() for p in make_model(settings).parameters())
    needed = operations(settings, rollouts, weights, shared=True)
    peaks = {name: steps[-1]["peak"] for name, steps in runs.items()}
    print(
        f"\n{title}: {real} real tokens, {weights / 1e6:.1f}M weights, V {settings.vocabulary}, load {os.getloadavg()[0]:.1f}"
    )
    print(
        f"{'':14}{'cpu s':>7}{'wall s':>8}{'ratio to ours':>21}{'tokens':>8}{'real tok/s':>11}{'MFU':>6}{'peak MB':>9}{'ours to it':>11}"
    )
    for name, steps in runs.items():
        cpu, wall = (statistics.median(step[key] for step in steps) for key in ("cpu_s", "wall_s"))
        median, least, most = ratios(runs, name)
        print(
            f"{name:14}{cpu:7.2f}{wall:8.2f}{f'{median:.2f} ({least:.2f} to {most:.2f})':>21}{steps[-1]['tokens']:8d}"
            f"{real / cpu:11.0f}{needed / cpu / ceiling:6.0%}{peaks[name] / 1e6:9.0f}{peaks['ours'] / peaks[name]:11.2f}",
            flush=True,
        )
    if "ours-unshared" in runs:
        gain, least, most = ratios(runs, "ours-unshared")
        by_tokens = runs["ours-unshared"][-1]["tokens"] / runs["ours"][-1]["tokens"]
        by_operations = operations(settings, rollouts, weights, shared=False) / needed
        print(
            f"sharing gains {gain:.2f} ({least:.2f} to {most:.2f}): {gain / by_tokens:.2f} of the limit of tokens, "
            f"{by_tokens:.2f}, and {gain / by_operations:.2f} of the limit of operations, {by_operations:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("skewed", "prompts"))
    parser.add_argument("--quick", action="store_true", help="one setting, 3 rounds instead of 5")
    parser.add_argument("--vocabulary", type=int, help="instead of 32,000 (skewed) or 8,192 (prompts)")
    given = parser.parse_args()
    repeats = 3 if given.quick else 5
    print({name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl")})
    ceiling = matmul_ceiling(Settings().threads)
    print(f"matmul ceiling {ceiling / 1e9:.0f} GFLOP per CPU second, {Settings().threads} thread")
    if given.what == "skewed":
        for sigma in (0.9,) if given.quick else (0.3, 0.6, 0.9):
            settings = Settings(sigma=sigma, vocabulary=given.vocabulary or 32_000)
            runs = compare(settings, ["ours", "trl-sync", "trl-sync-old", "trl-async"], repeats)
            show(f"sigma {sigma}", settings, runs, ceiling)
    else:
        for share in (2,) if given.quick else (0.5, 2, 8):
            settings = Settings(
                prompt=int(64 * share), mean=64, sigma=0.3, token_budget=4096, vocabulary=given.vocabulary or 8192
            )
            runs = compare(settings, ["ours", "ours-unshared", "trl-sync", "trl-async"], repeats)
            show(f"prompt/completion {share}", settings, runs, ceiling)


if __name__ == "__main__":
    main()
