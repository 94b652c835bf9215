"""Where a step of the quickstart spends its time, and the peak resident memory of each process.

Runs `rlx run` on the quickstart for some steps and watches the process tree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from service import QUICKSTART, print_versions

from rlx.processes import free_port

PARTS = ("perf/rollout_wait_s", "perf/fwd_bwd_s", "perf/weight_sync_s", "perf/step_s")
WARM_UP_STEPS = 3


def kind_of(process: psutil.Process) -> str:
    """What a process is for, from its title and command line."""
    title = " ".join(process.cmdline()) or process.name()
    for sign, kind in (
        ("rlx.learner.process", "learner rank"),
        ("EngineCore", "vLLM engine core"),
        ("VLLM::Worker", "vLLM worker"),
        ("CPUWorker", "vLLM worker"),
        ("RolloutActor", "rollout actor"),
        ("rlx-rollout", "rollout actor"),
        ("RewardActor", "reward process"),
        ("rlx-reward", "reward process"),
        ("vllm-serve", "gateway"),
        ("rlx.cli train", "launcher"),
        ("rlx.cli run", "rlx run"),
        ("gcs_server", "Ray GCS"),
        ("raylet", "Ray raylet"),
        ("dashboard", "Ray dashboard"),
        ("ray::", "other Ray worker"),
    ):
        if sign in title:
            return kind
    return "other"


def watch(root: psutil.Process, peaks: dict[str, dict[int, int]]) -> None:
    for process in [root, *root.children(recursive=True)]:
        try:
            kind, rss = kind_of(process), process.memory_info().rss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        of_kind = peaks.setdefault(kind, {})
        of_kind[process.pid] = max(of_kind.get(process.pid, 0), rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    steps = parser.parse_args().steps
    print_versions()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rlx.cli", "run", str(QUICKSTART), "--num-processes", "2", "--max_steps", str(steps),
                   "--vllm.port", str(free_port("127.0.0.1", 8100)), "--output_dir", folder, "--eval_steps", "1000", "--save_strategy", "no"]  # fmt: skip
        run = psutil.Popen(command)
        peaks: dict[str, dict[int, int]] = {}
        while run.poll() is None:
            watch(run, peaks)
            time.sleep(0.5)
        if run.returncode:
            sys.exit(subprocess.CalledProcessError(run.returncode, command).returncode)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()][WARM_UP_STEPS:]
    print(f"\nseconds per step, median of {len(rows)} (after {WARM_UP_STEPS} of warm-up)")
    for part in PARTS:
        values = [row[part] for row in rows]
        print(f"  {part:24} {statistics.median(values):7.3f}  ({min(values):.3f} to {max(values):.3f})")
    print("peak resident memory, MiB (shared pages count in each process)")
    for kind, by_pid in sorted(peaks.items(), key=lambda item: -max(item[1].values())):
        print(f"  {kind:24} {', '.join(f'{rss / 2**20:.0f}' for rss in sorted(by_pid.values(), reverse=True))}")


if __name__ == "__main__":
    main()
