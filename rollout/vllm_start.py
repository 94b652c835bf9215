"""Starting vLLM: the environment it reads, the first cause when one of its processes fails, and none outliving us.

vLLM's engine core and workers are processes of their own. `ProcessHook` is a logging handler that vLLM's logging
configuration puts into each of them as soon as it imports vLLM, which is the earliest moment we can have:

- When one fails, the host sees only "Engine core initialization failed". The hook writes the exceptions that are
  logged, in order, to a file that the host reads; no log text is parsed.
- When the host or the process's own parent is gone, the process kills itself. It watches process file descriptors,
  not PR_SET_PDEATHSIG, which would also fire when merely the thread that started the process ends.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import multiprocessing
import os
import select
import shutil
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

from rlx.imports import begin_loading

HOST_PID = "RLX_ENGINE_HOST_PID"
"""Environment variable naming the process that vLLM's processes must not outlive."""
_CAUSE_FILE = "RLX_ENGINE_CAUSE_FILE"
_SOCKETS = "VLLM_RPC_BASE_PATH"
_LONGEST_SOCKET_FOLDER = 107 - len("/00000000-0000-0000-0000-000000000000")
"""A path of a socket has at most 107 bytes."""
ENDED = "it ended without a word (killed, out of memory, or a crash)"
_QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


class ProcessHook(logging.Handler):
    """Appends the root of each logged exception to the file that the host named; see the module for the rest."""

    def __init__(self, level: int | str = logging.NOTSET):
        super().__init__(level)
        host = int(os.environ.get(HOST_PID, os.getpid()))
        if host != os.getpid():
            _die_with(host)

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None and os.path.exists(os.environ.get(_CAUSE_FILE, "")):
            error = record.exc_info[1]
            while error.__cause__ is not None:
                error = error.__cause__
            if not _is_dead(error):
                with open(os.environ[_CAUSE_FILE], "a") as file:
                    file.write(json.dumps([type(error).__name__, str(error)]) + "\n")


class _Beginning:
    """In what multiprocessing gives to a child process, before the function that the child then imports to run it. The
    child makes it anew, for its own children, and imports from then on as `begin_loading` says."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _begin, ()


def _begin() -> _Beginning:
    begin_loading()
    return _Beginning()


def prepare_environment(start_timeout_s: float) -> Path:
    """Set what vLLM's processes inherit; must run before vLLM is imported. Returns the file for causes.

    Variables that are set already are kept, `OMP_NUM_THREADS` among them. vLLM's sockets lie in the folder of that
    file, and semaphores bear this process's id, so that `remove_environments` knows them.
    """
    folder = Path(tempfile.mkdtemp(prefix=_prefix(os.getpid())))
    causes = folder / "causes"
    causes.touch()
    config = folder / "logging.json"
    config.write_text(json.dumps(_logging_config()))
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    if len(str(folder)) <= _LONGEST_SOCKET_FOLDER:
        os.environ[_SOCKETS] = str(folder)
    multiprocessing.current_process()._config |= {  # type: ignore[attr-defined]
        "semprefix": f"/{_prefix(os.getpid())}",
        "rlx": _Beginning(),
    }
    os.environ["VLLM_CONFIGURE_LOGGING"] = "1"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ["VLLM_ENGINE_READY_TIMEOUT_S"] = str(int(start_timeout_s))
    os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(config)
    os.environ[HOST_PID] = str(os.getpid())
    os.environ[_CAUSE_FILE] = str(causes)
    return causes


def forget_environment(causes: Path) -> None:
    """Undo `prepare_environment` once the engine is gone, as far as no later engine has replaced it."""
    ours = (
        ("VLLM_LOGGING_CONFIG_PATH", causes.with_name("logging.json")),
        (_CAUSE_FILE, causes),
        (_SOCKETS, causes.parent),
    )
    for key, path in ours:
        if os.environ.get(key) == str(path):
            del os.environ[key]
    multiprocessing.current_process()._config.pop("rlx", None)  # type: ignore[attr-defined]
    shutil.rmtree(causes.parent)


def remove_environments(host: int) -> None:
    """Remove what `prepare_environment`, and vLLM after it, left of a process that was killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_prefix(host)}*"):
        shutil.rmtree(folder, ignore_errors=True)
    for semaphore in Path("/dev/shm").glob(f"sem.{_prefix(host)}*"):
        with contextlib.suppress(OSError):  # it is another user's, whose process had the same id in another container
            semaphore.unlink()


def _prefix(host: int) -> str:
    return f"rlx-engine-{host}-"


def first_cause(causes: Path | None, error: BaseException) -> str:
    """`Type: message` of what failed first, in whichever process; `error` is what the host saw."""
    if causes is not None and (lines := causes.read_text().splitlines()):
        kind, message = json.loads(lines[0])
        return f"{kind}: {message}"
    while error.__cause__ is not None:
        error = error.__cause__
    if _is_dead(error):
        return ENDED
    return f"{type(error).__name__}: {error}"


def reason(causes: Path | None, error: Exception) -> str:
    """What `error`, which the host saw, says; of an engine that died, what it died of."""
    return f"its engine process died: {first_cause(causes, error)}" if _is_dead(error) else str(error)


def _is_dead(error: BaseException) -> bool:
    return type(error).__name__ == "EngineDeadError"  # vLLM's; it points to a stack trace that there is not


@functools.cache
def _die_with(host: int) -> None:
    """Kill this process as soon as the host or its parent is gone."""

    def watch() -> None:
        poller = select.poll()
        try:
            for pid in {host, os.getppid()}:
                poller.register(os.pidfd_open(pid), select.POLLIN)
        except ProcessLookupError:
            pass
        else:
            poller.poll()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="rlx-host-watch", daemon=True).start()


def _logging_config() -> dict[str, Any]:
    console = {
        "class": "logging.StreamHandler",
        "formatter": "vllm",
        "level": os.environ.get("VLLM_LOGGING_LEVEL", _QUIET["VLLM_LOGGING_LEVEL"]),
        "stream": "ext://sys.stderr",
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"vllm": {"format": "%(levelname)s %(asctime)s vllm %(filename)s:%(lineno)d] %(message)s"}},
        "handlers": {"console": console, "cause": {"class": f"{__name__}.ProcessHook", "level": "ERROR"}},
        "loggers": {"vllm": {"handlers": ["console", "cause"], "level": "INFO", "propagate": False}},
    }
