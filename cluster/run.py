"""`rlx run`: service and learner in one terminal, each a process of its own.

    start the service ─► its "ready" ─► start the learner ─► its end ─► stop the service

When either fails the other is stopped, and the first cause is the last thing shown. The service's output is in
`output_dir/service.log`, and in the terminal while it loads. Ctrl-C goes to the learner first; a second one kills
both.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rlx.cluster.layout import plan_layout, this_machine
from rlx.cluster.progress import EVENT, WARNING, say
from rlx.config import Config
from rlx.config.trackers import check_trackers
from rlx.errors import DeadlineExceeded
from rlx.learner.launch import check_attention, make_output_dir, train_main
from rlx.learner.watch.live import SERVICE_LOG
from rlx.processes import PYTHON_MODULE, die_with_parent, kill_tree, stop_process

RLX = (*PYTHON_MODULE, "rlx.cli")
_POLL_S = 0.1
_RAY_START_S = 180.0
_LEARNER_GRACE_S = 60.0
_SERVICE_GRACE_S = 60.0


def run_main(config: Config, overrides: list[str], num_processes: int, *, program: Sequence[str] = RLX) -> int:
    """Train to the end. The exit status is that of the part that failed first, 0 when none did."""
    if config.replay is not None:
        say("replay: the learner alone, no service is started")
        return train_main(config, overrides, num_processes)
    check_trackers(config, config.path)
    check_attention(config)
    make_output_dir(config)
    say_when_ready = f"starting the learner: {num_processes} process{'es' if num_processes > 1 else ''}"
    learner = ("train", str(config.path), "--num-processes", str(num_processes))
    environment = dict(os.environ)
    if not os.environ.get("RAY_ADDRESS"):
        layout = plan_layout(this_machine(), config, num_processes)
        if layout.resource == "GPU":
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(layout.learner_gpus)
    environment[SERVICE_LOG] = str(_log_path(config).absolute())
    return with_service(config, overrides, learner, say_when_ready, environment, program=program)


def with_service(
    config: Config,
    overrides: list[str],
    command: Sequence[str],
    say_when_ready: str = "",
    environment: dict[str, str] | None = None,
    *,
    program: Sequence[str] = RLX,
) -> int:
    """Start the service, run `rlx COMMAND OVERRIDES` beside it to its end, stop the service."""
    run = _Run(config, overrides, program)
    try:
        return run.to_the_end(command, say_when_ready, environment)
    finally:
        run.close()


class _Run:
    def __init__(self, config: Config, overrides: list[str], program: Sequence[str]):
        self._config = config
        self._overrides = overrides
        self._program = program
        self._log_path = _log_path(config)
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        self._ready = threading.Event()
        self._last_lines: list[str] = []
        self._interrupted, self._passed_on = 0, False
        self._learner_shows_service = self._is_over = False
        self._give_up_at = float("inf")
        self._learner: subprocess.Popen[bytes] | None = None
        self._service: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)

    def to_the_end(self, command: Sequence[str], say_when_ready: str, environment: dict[str, str] | None) -> int:
        service = self._start_service()
        if (code := self._await_service(service)) is not None:
            return code
        if self._interrupted:
            return 128 + self._interrupted
        if say_when_ready:
            say(say_when_ready)
        self._learner_shows_service = sys.stdout.isatty() and SERVICE_LOG in (environment or {})
        self._learner = self._start(*command, env=environment)
        self._pass_on()
        while self._learner.poll() is None and service.poll() is None and time.monotonic() < self._give_up_at:
            time.sleep(_POLL_S)
        self._is_over = True
        if self._learner.poll() not in (None, 0):
            time.sleep(1.0)  # a learner that failed because the service went away may be noticed first
        if (died := service.poll()) is not None and self._learner.poll() != 0:
            stop_process(self._learner, signal.SIGTERM, _LEARNER_GRACE_S)
            return self._service_failed(died)
        return _status(stop_process(self._learner, signal.SIGTERM, _LEARNER_GRACE_S))

    def close(self) -> None:
        """Stop what still runs, the learner first."""
        for process, grace_s in ((self._learner, _LEARNER_GRACE_S), (self._service, _SERVICE_GRACE_S)):
            if process is not None:
                stop_process(process, signal.SIGTERM, grace_s)
        if self._reader is not None:
            self._reader.join(_SERVICE_GRACE_S)

    def _start(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        """An `rlx` command in a session of its own, so that the terminal's Ctrl-C comes to us only; it ends with us."""
        line = [*self._program, *command, *self._overrides]
        return subprocess.Popen(line, start_new_session=True, preexec_fn=_ends_with_parent, **options)

    def _start_service(self) -> subprocess.Popen[bytes]:
        self._service = self._start(
            "vllm-serve", str(self._config.path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._reader = threading.Thread(target=self._read, args=(self._service,), daemon=True)
        self._reader.start()
        return self._service

    def _await_service(self, service: subprocess.Popen[bytes]) -> int | None:
        """None when the service is ready, else the exit status of the run."""
        seconds = self._config.vllm.start_timeout + _RAY_START_S
        deadline = time.monotonic() + seconds
        while not self._ready.wait(_POLL_S) and not self._interrupted:
            if (code := service.poll()) is not None:
                return self._service_failed(code)
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"the service was not ready within {seconds:g} s; its log: {self._log_path}")
        return None

    def _read(self, service: subprocess.Popen[bytes]) -> None:
        """Everything the service says goes to the log; to the terminal what it says until it is ready, and what of
        its warnings and its workers, as long as both run."""
        assert service.stdout is not None
        with self._log_path.open("w", encoding="utf-8") as log:
            for raw in service.stdout:
                line = raw.decode(errors="replace").rstrip("\n")
                print(line, file=log, flush=True)
                self._last_lines = [*self._last_lines[-19:], line]
                is_news = line.startswith((WARNING, EVENT)) and not self._learner_shows_service and not self._is_over
                if not self._ready.is_set() or is_news:
                    say(f"service: {line}")
                    if line.startswith("ready: "):
                        self._ready.set()

    def _service_failed(self, code: int) -> int:
        """Shows why, as the last thing, unless the terminal shows it already."""
        assert self._reader is not None
        self._reader.join(_SERVICE_GRACE_S)
        how = f"with status {code}" if code >= 0 else f"by signal {-code}"
        told = [index for index, line in enumerate(self._last_lines) if line.startswith("error: ")]
        if self._ready.is_set():
            for line in self._last_lines[told[-1] if told else -5 :]:
                say(f"service: {line}")
        if self._ready.is_set() or not told:
            say(f"error: the rollout service ended {how}; its log: {self._log_path}")
        return _status(code) or 1

    def _interrupt(self, number: int, _: FrameType | None) -> None:
        """The first signal goes to the learner, whose end ends the run; the second kills everything."""
        if self._interrupted:
            for process in (self._learner, self._service):
                if process is not None and process.poll() is None:
                    kill_tree(process)
            return
        self._interrupted = number
        self._give_up_at = time.monotonic() + _LEARNER_GRACE_S
        self._pass_on()

    def _pass_on(self) -> None:
        """Give the learner the first signal, once, also when that came while the learner was being started."""
        if self._interrupted and self._learner is not None and not self._passed_on:
            self._passed_on = True
            self._learner.send_signal(self._interrupted)


def _log_path(config: Config) -> Path:
    return Path(config.output_dir) / "service.log"


def _ends_with_parent() -> None:
    die_with_parent(signal.SIGTERM)


def _status(code: int) -> int:
    """The shell's exit status for what Popen gives."""
    return code if code >= 0 else 128 - code
