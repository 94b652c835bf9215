"""The quickstart's model, for all tests that need it."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
MAKE = [sys.executable, str(QUICKSTART / "make_model.py"), "--out", str(QUICKSTART / "out")]


def make_quickstart() -> Path:
    """Where `make quickstart` has the model and its data. They are made once; a second process waits for the first."""
    with Path(MAKE[1]).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(MAKE, check=True, timeout=600, stdout=subprocess.DEVNULL)
    return QUICKSTART / "out"
