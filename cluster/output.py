"""Where the processes of the cluster write what they print."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def write_output_to(log: Path) -> None:
    """Everything that this process and its children print goes to `log`, from here on."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
