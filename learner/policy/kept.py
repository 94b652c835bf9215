"""Which complete checkpoints a folder holds, known from their marker alone; nothing heavy is imported."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

CHECKPOINT_MARKER = "rlx_state.json"
"""It is written last, and holds the sizes and digests of a checkpoint's files."""
_NAME = re.compile(r"checkpoint-\d+")


def is_complete(folder: Path) -> bool:
    return _NAME.fullmatch(folder.name) is not None and (folder / CHECKPOINT_MARKER).is_file()


def complete(output_dir: Path) -> list[Path]:
    return [folder for folder in sorted(output_dir.glob("checkpoint-*")) if is_complete(folder)]


def newest(output_dir: Path) -> Path | None:
    return max(complete(output_dir), key=_saved_at, default=None)


def time_of_next(output_dir: Path) -> float:
    """`saved_at` of a checkpoint that is complete now: also where the clock was set back, it is the newest."""
    return max(time.time(), *(_saved_at(folder) + 1e-3 for folder in complete(output_dir)), 0.0)


def drop_older(output_dir: Path, most: int) -> None:
    """Only the `most` newest stay; what was not finished goes, too."""
    stay = sorted(complete(output_dir), key=_saved_at)[-most:]
    for folder in output_dir.glob("checkpoint-*"):
        if _NAME.fullmatch(folder.name) and folder not in stay:
            shutil.rmtree(folder, ignore_errors=True)


def _saved_at(folder: Path) -> float:
    try:
        return float(json.loads((folder / CHECKPOINT_MARKER).read_bytes())["saved_at"])
    except (ValueError, KeyError, TypeError):  # damaged: it is told when nothing newer is there
        return (folder / CHECKPOINT_MARKER).stat().st_mtime
