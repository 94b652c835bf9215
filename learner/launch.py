"""`rlx train`: N learner processes under torch's elastic agent, which stops all of them when one fails.

Rank 0 has the terminal; the others write to output_dir/logs. What ended the run is told last: by rank 0 itself, or here.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from rlx.config import Config, make_plan
from rlx.config.trackers import check_trackers
from rlx.errors import ConfigError
from rlx.hub import check_in_reach
from rlx.imports import loading
from rlx.learner.policy.kept import newest
from rlx.learner.watch.live import SERVICE_LOG
from rlx.learner.watch.records import append_event, event_record
from rlx.processes import PYTHON_MODULE, start_of

_SCRATCH = "rlx-learner-"


class Failure(Protocol):
    """What the elastic agent says of a process that failed: `timestamp` in whole seconds, `exitcode` as Popen has it."""

    local_rank: int
    exitcode: int
    timestamp: int


def first_cause(failures: Iterable[Failure]) -> Failure:
    """The failure that the others follow from. A process that loses another fails within the same second; the agent
    itself ends the rest with SIGTERM."""
    by_time = sorted(failures, key=lambda f: f.timestamp)
    at_first = [f for f in by_time if f.timestamp <= by_time[0].timestamp + 1]
    return next((f for f in at_first if f.exitcode < 0 and f.exitcode != -signal.SIGTERM), by_time[0])


def train_main(config: Config, overrides: list[str], num_processes: int) -> int:
    """Run `num_processes` of `rlx.learner.process` to the end; the exit code of the first that failed, else 0."""
    # What can be wrong without loading anything belongs here: said once, before anything is started.
    make_plan(config, num_processes)
    check_trackers(config, config.path)
    check_attention(config)
    make_output_dir(config)
    check_in_reach(config, "base_model")
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    with loading():
        from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for module in ("agent.server.api", "multiprocessing.api"):  # each has set a level of its own
        logging.getLogger(f"torch.distributed.elastic.{module}").setLevel(logging.CRITICAL)
    python, *arguments = [*PYTHON_MODULE, "rlx.learner.process", str(num_processes), str(config.path), *overrides]
    _remove_left_behind()
    try:
        with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-") as logs:
            launch = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=num_processes,
                rdzv_backend="c10d",
                rdzv_endpoint="127.0.0.1:0",
                run_id="rlx",
                max_restarts=0,
                monitor_interval=0.2,
                logs_specs=DefaultLogsSpecs(logs),
            )
            elastic_launch(launch, python)(*arguments)
    except ChildFailedError as error:
        _give_terminal_back()
        failure = first_cause(error.failures.values())
        if message := failure_message(config, failure):
            print(message, file=sys.stderr, flush=True)
        if failure.exitcode < 0:  # one that fails by itself has said so in the file
            _write_down(config, message.removeprefix("error: "))
            print(what_is_kept(config, overrides, num_processes), file=sys.stderr, flush=True)
        return 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode or 1
    except SignalException as stopped:
        _give_terminal_back()
        print(message := stopped_message(config, overrides, num_processes, stopped.sigval), flush=True)
        _write_down(config, message, stopped=True)
        return 128 + stopped.sigval
    return 0


def check_attention(config: Config) -> None:
    """Raises ConfigError where the attention that is asked for is not installed."""
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(
        config.attention or ""
    )
    if package is not None and not any(find_spec(name) for name in (package, "kernels")):
        key = "attn_implementation" if config.attn_implementation else "flash_attention"
        raise ConfigError(
            f"{config.path}: {key}: {config.attention} needs the package {package}, which is not installed, and a GPU. "
            "Remove the key, and transformers' own attention is used."
        )


def check_output_dir(config: Config) -> None:
    """Raises ConfigError where `output_dir` cannot be made or written to, as far as can be seen without making it."""
    folder = Path(config.output_dir)
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise _not_writable(config, f"{nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _not_writable(config, f"nothing may be written to {nearest}")


def make_output_dir(config: Config) -> None:
    """Make `output_dir` and write to it once: it would be a pity to learn of it when the model is loaded. Raises
    ConfigError."""
    check_output_dir(config)
    try:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=config.output_dir) as file:
            file.write(b"rlx")
    except OSError as error:
        raise _not_writable(config, error.strerror or str(error)) from None


def _not_writable(config: Config, why: str) -> ConfigError:
    return ConfigError(
        f"{config.path}: output_dir: {config.output_dir} cannot hold the run: {why}. Name a folder that you may write to."
    )


def log_of(config: Config, rank: int) -> Path:
    """What a rank other than 0 prints."""
    return Path(config.output_dir) / "logs" / f"learner-rank-{rank}.log"


def failure_message(config: Config, failure: Failure) -> str:
    """What is to be said of the process that failed first; nothing where it has said so itself on the terminal."""
    rank = failure.local_rank
    log = "" if rank == 0 else f"; its log: {log_of(config, rank)}"
    if failure.exitcode < 0:
        number = -failure.exitcode
        memory = " (the kernel does that when memory runs out; `dmesg` tells)" if number == signal.SIGKILL else ""
        return f"error: learner process {rank} was killed by signal {number}, {_name(number)}{memory}{log}"
    if rank == 0:
        return ""
    return f"error: learner process {rank} failed: {_last_words(log_of(config, rank))}{log}"


def stopped_message(config: Config, overrides: list[str], num_processes: int, number: int) -> str:
    """What a run that was stopped has kept, and how to go on."""
    how = "Ctrl-C" if number == signal.SIGINT else _name(number)
    return f"stopped by {how}; {what_is_kept(config, overrides, num_processes)}"


def what_is_kept(config: Config, overrides: list[str], num_processes: int) -> str:
    """Of a run that did not reach its end; and what to type to go on."""
    checkpoint = newest(Path(config.output_dir))
    if checkpoint is None:
        return f"no checkpoint had been written (save_steps says how often), the logs are in {config.output_dir}"
    if config.auto_resume_from_checkpoints:
        return f"{checkpoint} is kept: the same command goes on from there"
    command = "run" if SERVICE_LOG in os.environ else "train"
    processes = ["--num-processes", str(num_processes)] if num_processes > 1 else []
    again = [os.path.relpath(config.path), *processes, *overrides, "--auto_resume_from_checkpoints", "true"]
    return f"{checkpoint} is kept. To go on: rlx {command} {shlex.join(again)}"


def _write_down(config: Config, message: str, **details: Any) -> None:
    """The end of the run, in its events.jsonl."""
    append_event(Path(config.output_dir), event_record("run_failed", message, **details))


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _last_words(log: Path) -> str:
    """The last error that a process has written: its line `error: ...`, or the last one of its traceback."""
    lines = log.read_text(errors="replace").rstrip().splitlines() if log.exists() else []
    said = next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), None)
    return said or (lines[-1] if lines else "it wrote nothing")


def _give_terminal_back() -> None:
    """Rank 0 may have been killed while its live view had hidden the cursor."""
    if sys.stdout.isatty():
        print("\x1b[?25h", flush=True)


def _remove_left_behind() -> None:
    """Folders of launchers that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*-*"):
        pid = folder.name.removeprefix(_SCRATCH).partition("-")[0]
        if pid.isdigit() and start_of(int(pid)) is None:
            shutil.rmtree(folder, ignore_errors=True)
