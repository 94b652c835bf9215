"""Starting vLLM: the environment it reads, and the first cause when one of its processes fails.

vLLM's engine core and workers are processes of their own; when one fails, the host sees only "Engine core
initialization failed". `FirstCause` is a logging handler that vLLM's logging configuration puts into each of them: it
writes the exceptions they log, in order, to a file that the host reads. No log text is parsed.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

_CAUSE_FILE = "RLX_ENGINE_CAUSE_FILE"
_QUIET = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


class FirstCause(logging.Handler):
    """Appends the root of each logged exception to the file that the host named."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None and _CAUSE_FILE in os.environ:
            error = record.exc_info[1]
            while error.__cause__ is not None:
                error = error.__cause__
            with open(os.environ[_CAUSE_FILE], "a") as file:
                file.write(json.dumps([type(error).__name__, str(error)]) + "\n")


def prepare_environment(start_timeout_s: float) -> Path:
    """Set what vLLM's processes inherit; must run before vLLM is imported. Returns the file for causes.

    Variables that are set already are kept, `OMP_NUM_THREADS` among them.
    """
    folder = Path(tempfile.mkdtemp(prefix="rlx-engine-"))
    causes = folder / "causes"
    causes.touch()
    config = folder / "logging.json"
    config.write_text(json.dumps(_logging_config()))
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ["VLLM_ENGINE_READY_TIMEOUT_S"] = str(int(start_timeout_s))
    os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(config)
    os.environ["RLX_ENGINE_HOST_PID"] = str(os.getpid())
    os.environ[_CAUSE_FILE] = str(causes)
    return causes


def first_cause(causes: Path, error: BaseException) -> str:
    """`Type: message` of what failed first, in whichever process; `error` is what the host saw."""
    if lines := causes.read_text().splitlines():
        kind, message = json.loads(lines[0])
        return f"{kind}: {message}"
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


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
        "handlers": {"console": console, "cause": {"class": f"{__name__}.FirstCause", "level": "ERROR"}},
        "loggers": {"vllm": {"handlers": ["console", "cause"], "level": "INFO", "propagate": False}},
    }
