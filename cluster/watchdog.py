"""Ends what a process left behind when it ends, also when it was killed with SIGKILL.

Ray's head processes die with the process that started them, but its agents live on for a minute, and the child
processes of a killed actor (vLLM's engine cores) for ever. The watchdog is a process of its own, in its own
session so that Ctrl-C does not reach it. It looks every second at what runs below its ward, waits for the ward's
end, kills what is left of what it saw, and removes the weights that it kept in shared memory and its engine's folder.

    python -m rlx.cluster.watchdog PID
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys

from rlx.processes import PYTHON_MODULE, alive, descendants, end_processes

_INTERVAL_S = 1.0
_GRACE_S = 2.0


def guard() -> subprocess.Popen[bytes]:
    """Start a watchdog over this process. It ends by itself, after its ward."""
    command = [*PYTHON_MODULE, "rlx.cluster.watchdog", str(os.getpid())]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)


def _watch(ward: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it was killed before this process was up
        _outlive(os.pidfd_open(ward), ward)
    from rlx.rollout.vllm_start import remove_environments
    from rlx.rollout.weights_store import remove_leftovers  # numpy: only now, not beside every process all its life

    remove_leftovers()
    remove_environments(ward)


def _outlive(end_of_ward: int, ward: int) -> None:
    seen: dict[int, int] = {}
    while True:
        seen = _below(ward, seen)
        if select.select([end_of_ward], [], [], _INTERVAL_S)[0]:
            break
    end_processes(_below(ward, seen), _GRACE_S)


def _below(ward: int, seen: dict[int, int]) -> dict[int, int]:
    """What runs now of what was seen below `ward`, and below that, without this process."""
    still = {pid: start for pid, start in seen.items() if alive(pid, start)}
    found = still | descendants(ward, *still)
    found.pop(os.getpid(), None)
    return found


if __name__ == "__main__":
    _watch(int(sys.argv[1]))
