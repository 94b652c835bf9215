"""Stands in for the `rlx` command: behaves as the environment variables SERVICE and LEARNER say."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

command, path, *rest = sys.argv[1:]
folder = Path(path).parent
part = "service" if command == "vllm-serve" else "learner"
(folder / f"{part}.pid").write_text(str(os.getpid()))
(folder / f"{part}.arguments").write_text(" ".join(rest))


def stop(number: int, _: object) -> None:
    print(f"{part} stopped by {number}", flush=True)
    sys.exit(0 if part == "service" else 128 + number)


signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
behaviour = os.environ[part.upper()]
if behaviour == "fails":
    print(f"error: {part} failed", flush=True)
    sys.exit(3)
if part == "service":
    print("loading", flush=True)
    if behaviour != "loads for ever":
        print("ready: http://127.0.0.1:1, 1 worker", flush=True)
if behaviour == "dies later":
    time.sleep(0.5)
    print(f"error: {part} died", flush=True)
    sys.exit(4)
if behaviour == "trains":
    print("trained", flush=True)
    sys.exit(0)
time.sleep(60)
