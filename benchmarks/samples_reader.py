"""Seconds and peak memory of `rlx samples` on a large samples.jsonl, which is made in a temporary folder and removed.

    .venv/bin/python benchmarks/samples_reader.py --megabytes 200

Each command runs as a process of its own, once to warm up and then three times; medians are printed. The file is in
the page cache, as it was just written.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pydantic

COMMANDS = (
    (),
    ("--json", "--limit", "1000"),
    ("--best", "10"),
    ("--worst", "10", "--by", "right", "--json"),
    ("--step", "3"),
    ("--diff-versions", "--limit", "0", "--json"),
)
_TOKENS = (50, 2000)
_REPEATS = 3


def write(path: Path, megabytes: int) -> int:
    """Samples of 50 to 2,000 tokens, eight a step, one in a hundred from two weight versions. Returns their number."""
    draw, count = random.Random(0), 0
    with path.open("w", encoding="utf-8") as stream:
        while stream.tell() < megabytes << 20:
            tokens, step = draw.randint(*_TOKENS), count // 8 + 1
            halves = [[step - 1, tokens // 2], [step, tokens - tokens // 2]]
            row = {
                "ids": draw.choices(range(150_000), k=tokens),
                "logprobs": [round(-draw.random(), 6) for _ in range(tokens)],
                "versions": halves if count % 100 == 0 else [[step, tokens]],
            }
            record = {
                "step": step, "key": f"run/{step}/0", "index": count % 8, "completion": "word " * tokens,
                "prompt": [{"role": "user", "content": "a question " * 40}], "status": "ok", "turns": 1, "exact": True,
                "rows": [row], "rewards": {"right": draw.random(), "short": -tokens / 2000}, "step_rewards": [],
                "extra": {}, "error": "", "columns": {"answer": "42"}, "worker": "rlx-rollout-0", "advantage": 0.1,
            }  # fmt: skip
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count


def measure(arguments: tuple[str, ...]) -> tuple[float, float]:
    """Seconds and peak resident MiB of one run, start of Python included."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "rlx.cli", "samples", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"rlx samples {' '.join(arguments)}: exit status {process.returncode}")
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    megabytes = parser.parse_args().megabytes
    print(
        f"pydantic {pydantic.VERSION}, rich {importlib.metadata.version('rich')}; Python {platform.python_version()}; {platform.machine()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.jsonl"
        count = write(path, megabytes)
        print(f"{count:,} samples, {path.stat().st_size / 2**20:,.0f} MiB", flush=True)
        for options in COMMANDS:
            runs = [measure((folder, *options)) for _ in range(1 + _REPEATS)][1:]
            seconds, peak = (statistics.median(values) for values in zip(*runs, strict=True))
            print(f"{seconds:6.2f} s  {peak:5.0f} MiB   rlx samples OUT {' '.join(options)}", flush=True)


if __name__ == "__main__":
    main()
