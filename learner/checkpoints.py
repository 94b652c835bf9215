"""Which checkpoint to go on from, and the final model."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlx.config import Config
from rlx.errors import ConfigError
from rlx.learner.trainer import CHECKPOINT_MARKER


@dataclass(frozen=True)
class ResumePoint:
    """A complete checkpoint: `step` optimizer steps were taken, `weight_version` had been published, and `ledger` says
    which prompts had not been trained, None in a checkpoint from before there was a ledger."""

    folder: Path
    step: int
    weight_version: int
    ledger: dict[str, Any] | None
    saved_at: float
    """Seconds since 1970. The newest is not always that of the most steps: a folder may hold those of two runs."""


def find_resume_point(config: Config) -> ResumePoint | None:
    """What `resume_from_checkpoint` or `auto_resume_from_checkpoints` asks for. Raises ConfigError."""
    if config.resume_from_checkpoint is not None:
        folder = Path(config.local(config.resume_from_checkpoint))
        point = _read(folder)
        if point is None:
            complete = ", ".join(p.folder.name for p in _complete(Path(config.output_dir)))
            raise ConfigError(
                f"{config.path}: resume_from_checkpoint: {folder} is no complete checkpoint of rlx ({CHECKPOINT_MARKER} is "
                f"missing). {f'In {config.output_dir} there is: {complete}.' if complete else 'Remove the key to start anew.'}"
            )
        return point
    if config.auto_resume_from_checkpoints:
        return max(_complete(Path(config.output_dir)), key=lambda p: p.saved_at, default=None)
    return None


def _complete(output_dir: Path) -> list[ResumePoint]:
    points = (_read(folder) for folder in sorted(output_dir.glob("checkpoint-*")))
    return [point for point in points if point is not None]


def _read(folder: Path) -> ResumePoint | None:
    marker = folder / CHECKPOINT_MARKER
    if not re.fullmatch(r"checkpoint-\d+", folder.name) or not marker.is_file():
        return None
    state = json.loads(marker.read_text())
    return ResumePoint(folder, state["step"], state["weight_version"], state.get("ledger"), state["saved_at"])


def save_final(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, output_dir: Path
) -> None:
    """The trained model in Hugging Face format beside the checkpoints: all files or none. Leaves `model` in `dtype`."""
    temporary = output_dir / ".final"
    shutil.rmtree(temporary, ignore_errors=True)
    model.config.use_cache = True
    model.to(dtype).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    for file in temporary.iterdir():
        file.replace(output_dir / file.name)
    temporary.rmdir()
