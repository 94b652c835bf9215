"""`rlx train` as a user starts it, and a look at what it leaves behind."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from fake_service import Served

from rlx.processes import alive, descendants

LIMIT_S = 240.0
GONE_S = 60.0
"""For processes that end by themselves; a busy machine takes its time to schedule them."""


def start(path: Path, served: Served, processes: int, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rlx.cli", "train", str(path), "--num-processes", str(processes)]
    return subprocess.Popen(
        [*command, "--vllm.port", str(served.port), *overrides],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def gone(processes: dict[int, int]) -> bool:
    """Whether all of `processes` end soon."""
    end = time.monotonic() + GONE_S
    while time.monotonic() < end:
        if not any(alive(pid, started) for pid, started in processes.items()):
            return True
        time.sleep(0.05)
    return False


def run(path: Path, served: Served, processes: int, *overrides: str) -> tuple[int, str, str]:
    """Exit status, stdout, stderr of `rlx train` to its end."""
    learner = start(path, served, processes, *overrides)
    seen: dict[int, int] = {}
    watch = threading.Event()

    def look() -> None:
        while not watch.wait(0.3):
            seen.update(descendants(learner.pid))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        out, err = learner.communicate(timeout=LIMIT_S)
    finally:
        learner.kill()
        watch.set()
        watcher.join()
    assert len(seen) >= processes
    assert gone(seen)
    return learner.returncode, out, err
