"""The Ray actors of one reward function, `rlx-reward-0-NAME`: the user's code in a process of its own.

A plain function runs in the main thread, one group at a time; an async one in the event loop of its process, many
groups at once. What either does to its process ends with the call, or with the process: see `_Confined`.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlx.cluster import watchdog
from rlx.processes import shorten, write_output_to
from rlx.rewards.scoring import Answer, RewardWorker, ScoreRequest

_LOOK_INTERVAL_S = 1.0


class _Confined:
    """What user code may do to this process, and to the machine.

    - Its children are in this process's group, where they are found also when this process is gone.
    - A child that comes back from the user's function ends there, and does not go on as this actor.
    - A pending alarm ends with the call, and so does the user's handler of SIGALRM.
    - It allocates at most `memory_gib` GiB, which may be inf; then it gets a MemoryError. Its children, as much again.
    - What it and its children print goes to `log`, of which about the last LOG_BYTES are kept.
    """

    def __init__(self, log: Path, memory_gib: float):
        write_output_to(log)
        self._pid, self._log, self._shortening = os.getpid(), log, threading.Lock()
        if os.getpgrp() != self._pid:
            os.setpgid(0, 0)
        watchdog.guard()
        if math.isfinite(memory_gib):
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + int(memory_gib * 2**30), hard))
        threading.Thread(target=self._keep_log_short, name="log", daemon=True).start()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around one call of the user's function."""
        in_main_thread = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGALRM)
        try:
            yield
        finally:
            if os.getpid() != self._pid:
                os._exit(0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if in_main_thread:
                signal.signal(signal.SIGALRM, handler)
            self._shorten()

    def _keep_log_short(self) -> None:
        """For a call that prints without end; ends with the process."""
        while True:
            time.sleep(_LOOK_INTERVAL_S)
            self._shorten()

    def _shorten(self) -> None:
        """One thread at a time: two would each write what both have kept, or what the other has just cut off."""
        with self._shortening:
            shorten(self._log)


class RewardActor:
    """Scores one group at a time. `ray_scorer.RayScorer` is its other end."""

    _label = "rlx-reward"  # for Ray's messages about an actor that could not be made

    def __init__(self, label: str, log: str, memory_gib: float):
        self._label = label
        self._confined = _Confined(Path(log), memory_gib)
        self._worker: RewardWorker | None = None

    def __repr__(self) -> str:
        return self._label

    def pid(self) -> int:
        return os.getpid()

    def load(self, name: str, index: int, base_dir: str) -> bool:
        """Import the function; UserCodeError when that fails. Whether it is async, and belongs in the other actor."""
        with self._confined.call():
            self._worker = RewardWorker(name, index, base_dir)
        return self._worker.reward.is_async

    def score(self, request: ScoreRequest) -> Answer:
        assert self._worker is not None, "`load` comes first"
        with self._confined.call():
            return self._worker.score(request)


class AsyncRewardActor(RewardActor):
    """Scores many groups side by side."""

    async def score_beside(self, request: ScoreRequest, timeout_s: float) -> Answer:
        """A call that takes longer than `timeout_s` seconds is cancelled."""
        assert self._worker is not None, "`load` comes first"
        with self._confined.call():
            return await self._worker.score_beside(request, timeout_s)


def _data_bytes() -> int:
    """What counts against RLIMIT_DATA of this process now."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
    return int(line.split()[1]) * 1024
