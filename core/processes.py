"""Processes and ports of this machine (Linux): what the commands need to start things and to leave nothing behind."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from rlx.errors import ServiceError

LOG_BYTES = 10 * 2**20
"""About so much is kept of what a process of the user's code prints."""
PYTHON_MODULE = (sys.executable, "-u", "-P", "-m")
"""Runs a module of rlx in a process of its own; -P: a user's `datasets.py` in the current folder shadows no library."""
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)  # loaded here: a `preexec_fn` must not import anything


def import_nothing_from_here() -> None:
    """Takes the current folder off `sys.path`, where Ray puts that of the command first: with -P for a process that
    Ray started. Processes that this one spawns have the same path."""
    here = os.getcwd()
    sys.path[:] = [entry for entry in sys.path if entry and os.path.abspath(entry) != here]


def die_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process `signal_number` when its parent ends. Usable as a `preexec_fn`.

    The parent is the thread that forked: start such children from the main thread.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, int(signal_number)) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def write_output_to(log: Path) -> None:
    """Everything that this process and its children print goes to the end of `log`, from here on."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)


def shorten(log: Path, bound: int = LOG_BYTES) -> None:
    """Keep the last half of `bound` bytes of a file that has more. Who appends to it goes on behind them."""
    if not log.exists() or (size := log.stat().st_size) <= bound:
        return
    file = os.open(log, os.O_RDWR | os.O_APPEND)
    try:
        rest = os.pread(file, bound // 2, size - bound // 2)
        os.ftruncate(file, 0)
        os.write(file, b"[earlier output was removed]\n" + rest)
    finally:
        os.close(file)


def free_port(host: str, first: int, tries: int = 100) -> int:
    """The first port from `first` on that nobody listens on at `host`."""
    last = min(first + tries, 65536)
    for port in range(first, last):
        if is_free(host, port):
            return port
    raise ServiceError(f"no port of {host} is free from {first} to {last - 1}")


def is_free(host: str, port: int) -> bool:
    """Whether nobody listens on `port` at `host`."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def descendants(*roots: int) -> dict[int, int]:
    """Every process below `roots`, as {pid: start time in clock ticks}; the pair names a process for good.

    Zombies are left out: they hold nothing.
    """
    parents: dict[int, int] = {}
    starts: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := _stat(int(entry))) is not None:
            parents[int(entry)], starts[int(entry)] = stat
    found: dict[int, int] = {}
    level = set(roots)
    while level:
        level = {pid for pid, parent in parents.items() if parent in level and pid not in found}
        found |= {pid: starts[pid] for pid in level}
    return found


def start_of(pid: int) -> int | None:
    """When the process started, in clock ticks, as `descendants` gives it; None when it has ended."""
    stat = _stat(pid)
    return None if stat is None else stat[1]


def alive(pid: int, start: int) -> bool:
    """Whether the process that `descendants` named still runs."""
    return start_of(pid) == start


def end_processes(processes: dict[int, int], grace_s: float) -> None:
    """Wait `grace_s` seconds for `processes` (as `descendants` names them) to end by themselves, then kill the rest."""
    deadline = time.monotonic() + grace_s
    while (left := [pid for pid, start in processes.items() if alive(pid, start)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def stop_process(process: subprocess.Popen[bytes], signal_number: int, grace_s: float) -> int:
    """Send a child `signal_number`; kill it and all below it after `grace_s` seconds. Returns what Popen gives."""
    if process.poll() is None:
        process.send_signal(signal_number)
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            kill_tree(process)
    return process.wait()


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a child and everything below it."""
    below = descendants(process.pid)
    process.kill()
    end_processes(below, 0.0)


def _stat(pid: int) -> tuple[int, int] | None:
    """Parent and start time of a process that is not a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, parent, *rest = text[text.rindex(")") + 2 :].split()
    return None if state in "ZX" else (int(parent), int(rest[17]))
