"""LoRA with PEFT: the model with an adapter, the reference without it, and the files that are saved.

    base_model ─► with_adapter ─► trained: only the adapter's parameters
                       └─► without_adapter: the reference of the KL term, the same weights

Not here: the keys (`core/config/lora.py`), what the workers get (`adapter_weights.py`).
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlx.config import Config
from rlx.errors import ConfigError
from rlx.learner.policy.adapter_weights import check_sent_alone
from rlx.learner.policy.model import disable_dropout, load_model
from rlx.learner.policy.sharding import whole

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEYS = {"lora_r": "r", "lora_alpha": "lora_alpha", "peft_use_dora": "use_dora", "peft_use_rslora": "use_rslora"}
"""Keys of ours by what adapter_config.json calls them"""


def with_adapter(model: PreTrainedModel, config: Config) -> nn.Module:
    """`model` itself without `adapter`. Else it is wrapped, frozen, and has a new adapter, which changes nothing yet
    and is the same on every rank, or that of `lora_model_dir`. Raises ConfigError."""
    if config.adapter is None:
        return model
    if config.lora_model_dir is not None:
        check_folder(config)
        wrapped = PeftModel.from_pretrained(model, config.local(config.lora_model_dir), is_trainable=True)
    else:
        settings = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=_targets(model, config),
            modules_to_save=config.lora_modules_to_save or None,
            use_dora=config.peft_use_dora,
            use_rslora=config.peft_use_rslora,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            try:
                wrapped = get_peft_model(model, settings)
            except ValueError as error:  # PEFT finds none of the layers, or cannot update one of them
                raise ConfigError(f"{config.path}: lora_target_modules: {error}") from error
        _check_saved_whole(wrapped, config)
    _check_tied(wrapped, config)
    check_sent_alone(wrapped, config)
    if config.trl.disable_dropout:
        disable_dropout(wrapped)
    return wrapped


def check_folder(config: Config) -> None:
    """ConfigError where `lora_model_dir` holds no LoRA adapter, or one that keys in the YAML contradict."""
    if config.lora_model_dir is None:
        return
    file = Path(config.local(config.lora_model_dir)) / SETTINGS
    if not file.is_file() or not (file.with_name(WEIGHTS)).is_file():
        raise ConfigError(
            f"{config.path}: lora_model_dir: {file.parent} lacks {SETTINGS} or {WEIGHTS}; name the folder of an adapter"
        )
    found = json.loads(file.read_text())
    if found.get("peft_type") != "LORA":
        raise ConfigError(f"{config.path}: lora_model_dir: {file.parent} holds {found.get('peft_type')}, not LORA")
    _compare(found, config, f"{config.path}: lora_model_dir: {file.parent}", config.model_fields_set)


def check_checkpoint(folder: Path, config: Config) -> None:
    """ConfigError unless the checkpoint is of an adapter where one is trained, with the same rank, scale and kind."""
    label, file = f"{config.path}: resume_from_checkpoint: {folder}", folder / SETTINGS
    if config.adapter is None and file.is_file():
        raise ConfigError(f"{label} is of an adapter; write `adapter: lora` as in that run, or resume another one")
    if config.adapter is not None and not file.is_file():
        raise ConfigError(f"{label} is of a whole model; remove `adapter`, or resume another one")
    if config.adapter is not None and config.lora_model_dir is None:
        _compare(json.loads(file.read_text()), config, label, set(_KEYS))


def _compare(found: dict[str, Any], config: Config, label: str, keys: set[str]) -> None:
    for key, name in _KEYS.items():
        if key in keys and found.get(name) != getattr(config, key):
            raise ConfigError(f"{label} has {key} {found.get(name)}, the YAML {getattr(config, key)}; write the former")


def _targets(model: PreTrainedModel, config: Config) -> list[str] | str | None:
    named = config.lora_target_modules
    if isinstance(named, str) or not config.lora_target_linear:
        return named
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    ends = {n if n.rpartition(".")[2].isdigit() else n.rpartition(".")[2] for n in linear}
    return sorted(ends | set(named or ()))


def _check_saved_whole(model: PeftModel, config: Config) -> None:
    ends = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
    if missing := sorted(set(config.lora_modules_to_save) - ends):
        raise ConfigError(f"{config.path}: lora_modules_to_save: the model has no layer {missing[0]!r}")


def _check_tied(model: PeftModel, config: Config) -> None:
    """A tied model's embedding is its head: an adapter would part them, and the workers would still have one matrix."""
    base = model.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if base.config.get_text_config().tie_word_embeddings and any(
        isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in ends
    ):
        raise ConfigError(
            f"{config.path}: the adapter would change the embedding or the head, which are one matrix in this model; "
            "take them out of lora_target_modules and lora_modules_to_save"
        )


def reference_model(config: Config) -> nn.Module | None:
    """The second model that `trl.beta` needs; None where the model without its adapter is the reference."""
    if config.trl.beta == 0 or (config.adapter is not None and not config.rl_adapter_ref_model):
        return None
    model = load_model(config)
    return with_adapter(model, config) if config.lora_model_dir is not None else model


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside, with the adapter's layers in it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def without_adapter(model: PeftModel) -> Iterator[nn.Module]:
    """The model as it was before the adapter, without dropout; it comes back in its mode."""
    training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            yield model
    finally:
        model.train(training)


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of `model` holds, by the names there; writing to a tensor changes the model."""
    if isinstance(model, PeftModel):
        return get_peft_model_state_dict(model, save_embedding_layers=False)
    return model.state_dict()


def adapter_files(model: nn.Module) -> dict[str, bytes] | None:
    """The adapter as PEFT saves it, by file name; None where there is none."""
    if not isinstance(model, PeftModel):
        return None
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    settings: PeftConfig = copy.copy(model.peft_config[model.active_adapter])
    settings.inference_mode = True
    with tempfile.TemporaryDirectory() as folder:
        settings.save_pretrained(folder)
        text = (Path(folder) / SETTINGS).read_bytes()
    tensors = {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in state.items()}
    return {SETTINGS: text, WEIGHTS: safetensors.torch.save(tensors, {"format": "pt"})}
