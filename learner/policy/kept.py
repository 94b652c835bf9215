"""Which complete checkpoints a folder holds, known from their marker alone; nothing heavy is imported."""

from __future__ import annotations

import json
import re
from pathlib import Path

CHECKPOINT_MARKER = "rlx_state.json"
"""It is written last, and holds the sizes of a checkpoint's files."""


def is_complete(folder: Path) -> bool:
    return re.fullmatch(r"checkpoint-\d+", folder.name) is not None and (folder / CHECKPOINT_MARKER).is_file()


def complete(output_dir: Path) -> list[Path]:
    return [folder for folder in sorted(output_dir.glob("checkpoint-*")) if is_complete(folder)]


def newest(output_dir: Path) -> Path | None:
    return max(complete(output_dir), key=_saved_at, default=None)


def _saved_at(folder: Path) -> float:
    try:
        return float(json.loads((folder / CHECKPOINT_MARKER).read_bytes())["saved_at"])
    except (ValueError, KeyError, TypeError):  # damaged: it is told when nothing newer is there
        return (folder / CHECKPOINT_MARKER).stat().st_mtime
