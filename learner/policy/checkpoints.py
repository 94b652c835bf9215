"""Checkpoints: what makes one complete, which one to go on from, and the final model.

The library writes the files of a checkpoint; the marker comes last and holds their sizes and digests, so that one that
was not finished, or was changed since, is known.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlx.config import Config
from rlx.errors import ConfigError
from rlx.learner.durable import digest, settle, write_atomically
from rlx.learner.policy import kept
from rlx.learner.policy.adapters import WEIGHTS, check_checkpoint
from rlx.learner.policy.kept import CHECKPOINT_MARKER
from rlx.safetensors_layout import read_specs

_FORMAT = 2
"""1 had neither `format` nor `files` in the marker; it is read."""
_LOOKED_AT = 256
"""Elements of each parameter that tell one base model from another"""


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
    base: str | None = None
    """`base_fingerprint` of the model that the adapter was trained on"""

    @property
    def feed_state(self) -> dict[str, Any]:
        """As `Rollouts.state` gave it."""
        return {"weight_version": self.weight_version} | ({} if self.ledger is None else {"ledger": self.ledger})


def clear(folder: Path) -> None:
    """Before a checkpoint is written to `folder`: what an earlier run left there must not complete it."""
    (folder / CHECKPOINT_MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def seal(folder: Path, state: Mapping[str, Any]) -> None:
    """When all files of a checkpoint are written: from here on it is one."""
    files = settle(folder)
    sizes, digests = ({name: both[i] for name, both in files.items()} for i in (0, 1))
    now = kept.time_of_next(folder.parent)
    marker = {"format": _FORMAT, "saved_at": now, "files": sizes, "digests": digests, **state}
    write_atomically(folder / CHECKPOINT_MARKER, json.dumps(marker))


def find_resume_point(config: Config, num_processes: int = 1) -> ResumePoint | None:
    """What `resume_from_checkpoint` or `auto_resume_from_checkpoints` asks for. Raises ConfigError."""
    point = _find(config)
    if point is not None:
        check_checkpoint(point.folder, config)
        _check_sharding(point.folder, config, num_processes)
    return point


_STATES = {
    "optimizer.pt": "without `fsdp` or `deepspeed`, or with one process",
    "optimizer.bin": "with fsdp and state_dict_type: FULL_STATE_DICT",
    "optimizer_0": "with fsdp and state_dict_type: SHARDED_STATE_DICT",
}
"""What holds the optimizer's states in a checkpoint, and how that is written"""


def _check_sharding(folder: Path, config: Config, num_processes: int) -> None:
    if config.deepspeed is not None:
        return
    expected = "optimizer.pt"
    if config.is_sharded and num_processes > 1:
        sharded = config.fsdp_config is not None and config.fsdp_config.state_dict_type == "SHARDED_STATE_DICT"
        expected = "optimizer_0" if sharded else "optimizer.bin"
    found = next((name for name in _STATES if (folder / name).exists()), expected)
    if found != expected:
        raise ConfigError(
            f"{config.path}: the checkpoint {folder} was written {_STATES[found]}, and this run is one {_STATES[expected]}. "
            "Nothing was changed. Start it as that run was."
        )


def _find(config: Config) -> ResumePoint | None:
    if config.resume_from_checkpoint is not None:
        folder = Path(config.local(config.resume_from_checkpoint))
        if not kept.is_complete(folder):
            raise ConfigError(
                f"{config.path}: resume_from_checkpoint: {folder} is no complete checkpoint of rlx ({CHECKPOINT_MARKER} is "
                f"missing). {_others(config, folder)}"
            )
        return _read(config, folder)
    if config.auto_resume_from_checkpoints:
        newest = kept.newest(Path(config.output_dir))
        return None if newest is None else _read(config, newest)
    return None


def _others(config: Config, folder: Path) -> str:
    others = [other.name for other in kept.complete(Path(config.output_dir)) if other != folder]
    return f"In {config.output_dir} there is: {', '.join(others)}." if others else "Remove the key to start anew."


def _read(config: Config, folder: Path) -> ResumePoint:
    """Raises ConfigError where the checkpoint is of another format, or its files are not those that were written."""

    def refuse(problem: str) -> ConfigError:
        return ConfigError(
            f"{config.path}: the checkpoint {folder} {problem}. Nothing was changed. To go on from another one, name it in "
            f"resume_from_checkpoint. {_others(config, folder)}"
        )

    try:
        state = json.loads((folder / CHECKPOINT_MARKER).read_bytes())
        point = ResumePoint(
            folder, state["step"], state["weight_version"], state.get("ledger"), state["saved_at"], state.get("base")
        )
    except (ValueError, KeyError, TypeError) as error:
        raise refuse(f"is damaged: {CHECKPOINT_MARKER} is not readable ({error})") from error
    if (version := state.get("format", 1)) not in (1, _FORMAT):
        raise refuse(f"has format {version}, this rlx reads formats 1 and {_FORMAT}: it is of another version of rlx")
    for name, size in state.get("files", {}).items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            there = "is missing" if found is None else f"has {found} of {size} bytes"
            raise refuse(f"is damaged: {name} {there}")
    if (used := state.get("optimizer", config.optimizer)) != config.optimizer:
        raise refuse(
            f"holds the states of optimizer: {used}, which {config.optimizer} cannot go on from; write the former"
        )
    if os.environ.get("RANK", "0") == "0":  # once for all: it reads the whole checkpoint
        digests = state.get("digests", {})
        for name in sorted(state.get("files", {}).keys() & digests.keys()):
            if digest(folder / name) != digests[name]:
                raise refuse(f"is damaged: {name} has its size, and not what was written")
    return point


def check_model(point: ResumePoint, model: nn.Module, base_model: str) -> None:
    """Raises ConfigError where the checkpoint's weights do not belong to `model`."""
    is_adapter = isinstance(model, PeftModel)
    files = point.folder.glob(WEIGHTS if is_adapter else "model*.safetensors")
    there = {tensor.name: tensor.shape for file in files for tensor in read_specs(file)}
    if not there:
        return  # in another format; whoever reads it looks
    state = (
        get_peft_model_state_dict(model, save_embedding_layers=False)
        if is_adapter
        else model.state_dict(keep_vars=True)
    )
    here = {name: tuple(tensor.shape) for name, tensor in state.items()}
    tied = {state[name].data_ptr() for name in there if name in state}
    here = {name: shape for name, shape in here.items() if name in there or state[name].data_ptr() not in tied}
    # PEFT may save embeddings of the base model beside an adapter.
    compared = here.keys() | {name for name in there if ".lora_" in name or not is_adapter}
    wrong = next((name for name in sorted(compared) if here.get(name) != there.get(name)), None)
    if wrong is not None:
        raise ConfigError(
            f"the checkpoint {point.folder} is of another model than base_model ({base_model})"
            f"{', or its adapter of other layers' if is_adapter else ''}: {wrong} has shape "
            f"{_said(there.get(wrong))} there and {_said(here.get(wrong))} here. Nothing was changed. Name the model of that run, "
            "or another output_dir to start anew."
        )
    if point.base not in (None, base_fingerprint(model)):
        raise ConfigError(
            f"the adapter of the checkpoint {point.folder} was trained on other weights than those of base_model "
            f"({base_model}), or they are quantized in another way here. Nothing was changed. Name the model of that run, or "
            "another output_dir to start anew."
        )


def base_fingerprint(model: nn.Module) -> str | None:
    """XXH3 of elements spread over all frozen parameters of a model with an adapter, rounded to bfloat16, so that a run may
    load the same weights in another dtype; None without an adapter, as a checkpoint then holds the whole model."""
    if not isinstance(model, PeftModel):
        return None
    found = xxhash.xxh3_128()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            values = parameter.detach().flatten()
            values = values[:: max(1, len(values) // _LOOKED_AT)]
            values = values.to(torch.bfloat16) if values.is_floating_point() else values
            found.update(values.contiguous().cpu().view(torch.uint8).numpy())
    return found.hexdigest()


def _said(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def save_final(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    output_dir: Path,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """The trained model in Hugging Face format beside the checkpoints: all files or none. Leaves `model` in `dtype`.

    `model` is one of transformers', or has an adapter. Of the latter that alone, in float32, and the model stays as it is.
    `state` is what is saved of a model that is cut over processes.
    """
    temporary = output_dir / ".final"
    shutil.rmtree(temporary, ignore_errors=True)
    model.config.use_cache = True
    if isinstance(model, PeftModel):
        model.save_pretrained(temporary, save_embedding_layers=False, state_dict=state)
    elif state is not None:
        model.config.dtype = dtype
        model.save_pretrained(temporary, state_dict=state)
    else:
        model.to(dtype).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    for file in temporary.iterdir():
        file.replace(output_dir / file.name)
    temporary.rmdir()
