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


def runs(part: str) -> bool:
    """Not so from the moment on at which its parent may see its end."""
    try:
        stat = Path(f"/proc/{(folder / f'{part}.pid').read_text()}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def stop(number: int, _: object) -> None:
    warning = "warning: " if part == "service" else ""
    print(f"{warning}{part} stopped by {number}", flush=True)
    sys.exit(0 if part == "service" else 128 + number)


signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
(folder / f"{part}.arguments").write_text(" ".join(rest))
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
if behaviour == "dies of the service's end":
    while runs("service"):
        time.sleep(0.01)
    print(f"error: {part} died", flush=True)
    sys.exit(5)
if behaviour == "trains":
    print("trained", flush=True)
    sys.exit(0)
time.sleep(600)
