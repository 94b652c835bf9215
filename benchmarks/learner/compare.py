"""C1 and C3: one learner step of rlx beside TRL's synchronous and asynchronous trainers, same model, same batch.

    python benchmarks/learner/compare.py skewed [--quick]      C1: log-normal lengths, sigma 0.3, 0.6, 0.9
    python benchmarks/learner/compare.py prompts [--quick]     C3: shared prompts, prompt/completion 0.5 to 8, groups of 8

Every path (`paths.py`) is a process of its own, so that its memory is; they take turns, one step each, the first step
of each discarded. Losses must agree within 1e-4. CPU seconds are given beside wall seconds: where others use the
machine only they compare. The limit of C3 is what sharing can save: G(P + L) / (P + GL) tokens without attention.
MFU: 6 operations per weight and real token (prompts once per completion), per CPU second, against the best of a
float32 matmul of the same run and thread count.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from paths import Settings, make_model, make_rollouts

PATHS = Path(__file__).with_name("paths.py")


def compare(settings: Settings, names: list[str], repeats: int) -> dict[str, dict[str, Any]]:
    """Medians of each path over `repeats` interleaved steps."""
    command = [sys.executable, str(PATHS)]
    environment = os.environ | {"OMP_NUM_THREADS": str(settings.threads), "PYTHONWARNINGS": "ignore"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    children = {
        name: subprocess.Popen([*command, name, json.dumps(asdict(settings))], text=True, env=environment, **pipes)
        for name in names
    }
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        for _ in range(repeats + 1):
            for name, child in children.items():
                steps[name].append(_step(name, child))
    finally:
        for child in children.values():
            child.kill()
            child.wait()
    losses = [runs[-1]["loss"] for runs in steps.values()]
    assert max(losses) - min(losses) < 1e-4 * max(1, abs(losses[0])), f"not the same work: {losses}"
    return {name: _summary(runs) for name, runs in steps.items()}


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


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    measured = runs[1:]
    median = {key: statistics.median(run[key] for run in measured) for key in ("wall_s", "cpu_s")}
    spread = max(r["cpu_s"] for r in measured) / min(r["cpu_s"] for r in measured)
    return median | {"spread": spread, "peak": runs[-1]["peak"], "tokens": runs[-1]["tokens"], "loss": runs[-1]["loss"]}


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


def show(title: str, settings: Settings, results: dict[str, dict[str, Any]], ceiling: float) -> None:
    rollouts = make_rollouts(settings)
    real = sum(len(p) + len(c) for p, c in zip(rollouts.prompts, rollouts.completions, strict=True))
    weights = sum(p.numel() for p in make_model(settings).parameters())
    mine = results["ours"]
    print(f"\n{title}: {real} real tokens, {weights / 1e6:.1f}M weights")
    print(f"{'':13}{'cpu s':>8}{'wall s':>8}{'spread':>8}{'ratio':>7}{'tokens':>8}{'real tok/s':>11}{'MFU':>6}{'peak MB':>9}{'ratio':>7}")  # fmt: skip
    for name, r in results.items():
        mfu = 6 * weights * real / r["cpu_s"] / ceiling
        print(
            f"{name:13}{r['cpu_s']:8.2f}{r['wall_s']:8.2f}{r['spread']:8.2f}{r['cpu_s'] / mine['cpu_s']:7.2f}"
            f"{r['tokens']:8d}{real / r['cpu_s']:11.0f}{mfu:6.0%}{r['peak'] / 1e6:9.0f}{mine['peak'] / r['peak']:7.2f}"
        )


def main() -> None:
    quick, kind = "--quick" in sys.argv, sys.argv[1]
    repeats = 3 if quick else 5
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl")}
    print(versions, f"load {os.getloadavg()}")
    ceiling = matmul_ceiling(Settings().threads)
    print(f"matmul ceiling {ceiling / 1e9:.0f} GFLOP per CPU second")
    if kind == "skewed":
        for sigma in (0.9,) if quick else (0.3, 0.6, 0.9):
            for old in (False, True):
                settings = Settings(sigma=sigma, old=old)
                names = ["ours", "trl-sync"] if old else ["ours", "ours-padded", "trl-sync", "trl-async"]
                title = f"sigma {sigma}" + (", TRL with old log-probabilities" if old else "")
                show(title, settings, compare(settings, names, repeats), ceiling)
    else:
        for share in (0.5, 2, 8) if quick else (0.5, 1, 2, 4, 8):
            settings = Settings(prompt=int(64 * share), mean=64, sigma=0.3, token_budget=4096)
            group, prompt, length = settings.group, settings.prompt, settings.mean
            limit = group * (prompt + length) / (prompt + group * length)
            results = compare(settings, ["ours", "ours-unshared", "trl-sync", "trl-async"], repeats)
            show(f"prompt/completion {share}, limit {limit:.2f}", settings, results, ceiling)
            gain = results["ours-unshared"]["cpu_s"] / results["ours"]["cpu_s"]
            print(f"sharing gains {gain:.2f}, {gain / limit:.2f} of the limit")


if __name__ == "__main__":
    main()
