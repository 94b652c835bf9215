"""The keys of models that do not fit one process: cut over the processes, activations recomputed or kept in main memory.

Names are Axolotl's, those of `fsdp_config` with or without the prefix `fsdp_`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlx.config.section import Section
from rlx.errors import ConfigError

_OPTIONS: dict[str, dict[str, Any]] = {
    "auto_wrap": {},
    "full_shard": {"reshard_after_forward": True},
    "shard_grad_op": {"reshard_after_forward": False},
    "offload": {"offload_params": True},
}
"""The list form of `fsdp:`, by what `fsdp_config` calls it"""


_CHECKPOINT_KWARGS = {"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"}
"""What a YAML can say to torch.utils.checkpoint"""


class FsdpSection(Section):
    """`fsdp_config:` how FSDP2 cuts the model."""

    reshard_after_forward: bool = Field(
        True,
        description="Give a layer's gathered weights back after its forward, and gather them again for the backward.",
    )
    offload_params: bool = Field(
        False, description="Keep each process's part of weights, gradients and optimizer states in main memory."
    )
    auto_wrap_policy: Literal["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"] = Field(
        "TRANSFORMER_BASED_WRAP", description="What is gathered together: a layer, modules of min_num_params, or all."
    )
    transformer_layer_cls_to_wrap: list[str] = Field(
        default=[], description="Classes of the layers; default: what the model names itself."
    )
    min_num_params: int = Field(0, ge=0, description="For SIZE_BASED_WRAP.")
    activation_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass; in place of gradient_checkpointing."
    )
    state_dict_type: Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"] = Field(
        "FULL_STATE_DICT",
        description="Checkpoints: gathered on rank 0, with the weights also as a model that transformers loads, or a part from each process.",
    )
    final_state_dict_type: Literal["FULL_STATE_DICT"] = Field(
        "FULL_STATE_DICT", description="The final model is always saved whole."
    )
    cpu_ram_efficient_loading: bool = Field(
        False, description="Changes nothing: every process loads the model into main memory before it is cut."
    )
    sync_module_states: bool = Field(True, description="Of FSDP1; changes nothing.")
    use_orig_params: bool = Field(True, description="Of FSDP1; changes nothing.")
    version: Literal[2] = Field(2, description="Same as fsdp_version.")

    @model_validator(mode="before")
    @classmethod
    def prefixes_are_left_out(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {name.removeprefix("fsdp_") if isinstance(name, str) else name: value for name, value in values.items()}

    @field_validator("transformer_layer_cls_to_wrap", mode="before")
    @classmethod
    def one_class_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("state_dict_type", "final_state_dict_type", "auto_wrap_policy", mode="before")
    @classmethod
    def capitals_do_not_matter(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value


class ShardingKeys(Section):
    """How the learner's processes share a model, and what they keep of its activations."""

    fsdp: bool = Field(
        False,
        description="Cut weights, gradients and optimizer states over the processes with FSDP2 (docs/guides/large_models.md). The older list form, such as [full_shard, auto_wrap], is read as well.",
    )
    fsdp_config: FsdpSection | None = Field(None, description="How; giving it means fsdp: true.")
    fsdp_version: Literal[2] = Field(2, description="FSDP1 is not supported.")
    deepspeed: str | dict[str, Any] | None = Field(
        None,
        description="DeepSpeed's settings, in place of fsdp: a JSON file next to the YAML, or written out. Never run by us (docs/guides/large_models.md).",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass (TRL's default is true). `offload`: true, and activation_offloading.",
    )
    gradient_checkpointing_kwargs: dict[str, Any] = Field(default={}, description="Its arguments.")
    activation_offloading: bool = Field(
        False,
        description="Keep what the backward pass needs in main memory meanwhile; on a CPU it is there already. Besides gradient_checkpointing, or alone.",
    )
    use_liger_kernel: bool = Field(
        False,
        description="Liger's GPU kernels for norms, rotary embeddings and MLPs, where the package is installed. The loss stays rlx's, which never holds all logits either.",
    )

    @model_validator(mode="before")
    @classmethod
    def older_forms_are_read(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        if values.get("gradient_checkpointing") == "offload":
            values |= {"gradient_checkpointing": True, "activation_offloading": True}
        options = values.get("fsdp")
        if isinstance(options, str | list):
            names = [str(name) for name in (options.split() if isinstance(options, str) else options)]
            unknown = next((name for name in names if name not in _OPTIONS), None)
            if unknown is not None:
                raise ValueError(f"fsdp: {unknown!r} is not of FSDP2; write `fsdp: true`, or of {', '.join(_OPTIONS)}")
            asked = {key: value for name in names for key, value in _OPTIONS[name].items()}
            values["fsdp"] = bool(names)
            if asked:
                values["fsdp_config"] = asked | dict(values.get("fsdp_config") or {})
        for name in ("fsdp_config", "deepspeed"):
            if values.get(name) in ({}, "", False, []):
                del values[name]
        return values

    @model_validator(mode="after")
    def activations_are_recomputed_as_torch_does(self) -> ShardingKeys:
        given = self.gradient_checkpointing_kwargs
        if given and not self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing_kwargs has no effect without gradient_checkpointing: true")
        if unknown := sorted(given.keys() - _CHECKPOINT_KWARGS):
            raise ValueError(
                f"gradient_checkpointing_kwargs: torch knows no {unknown[0]!r}; write of {', '.join(sorted(_CHECKPOINT_KWARGS))}"
            )
        return self

    @model_validator(mode="after")
    def one_way_to_cut_the_model(self) -> ShardingKeys:
        if self.is_sharded and self.deepspeed is not None:
            raise ValueError("fsdp and deepspeed are both given; keep one")
        if self.fsdp_config is not None and "fsdp" in self.model_fields_set and not self.fsdp:
            raise ValueError("fsdp: false and fsdp_config are both given; keep one")
        if self.fsdp_config is not None and self.fsdp_config.activation_checkpointing and self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing and fsdp_config.activation_checkpointing are the same; keep one")
        return self

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 is asked for; it takes two processes to be used."""
        return self.fsdp or self.fsdp_config is not None


def check_sharding(keys: ShardingKeys, path: Path, num_processes: int) -> list[str]:
    """Notes on what changes nothing here. Raises ConfigError where a package is missing."""
    notes = []
    if keys.is_sharded and num_processes == 1:
        notes.append("fsdp: one process has the whole model; start more with --num-processes N")
    if "fsdp_version" in keys.model_fields_set and not keys.is_sharded:
        notes.append("fsdp_version alone changes nothing; write `fsdp: true` to cut the model over the processes")
    section = keys.fsdp_config
    if section is not None:
        idle = [n for n in ("cpu_ram_efficient_loading", "sync_module_states", "use_orig_params")
                if n in section.model_fields_set and getattr(section, n)]  # fmt: skip
        if idle:
            notes.append(f"fsdp_config: {', '.join(idle)} changes nothing (docs/configuration.md)")
    if keys.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(
            f"{path}: use_liger_kernel: the package liger-kernel is not installed. Install it, or remove the key."
        )
    if keys.deepspeed is not None:
        deepspeed_settings(keys, path)
        if importlib.util.find_spec("deepspeed") is None:
            raise ConfigError(
                f"{path}: deepspeed: the package deepspeed is not installed. Install it, or write `fsdp: true` in its place."
            )
    return notes


def deepspeed_settings(keys: ShardingKeys, path: Path) -> dict[str, Any]:
    """Raises ConfigError where the file of `deepspeed` is not there or no JSON."""
    if not isinstance(keys.deepspeed, str):
        return dict(keys.deepspeed or {})
    file = next((f for f in (path.parent / keys.deepspeed, Path(keys.deepspeed)) if f.is_file()), None)
    if file is None:
        raise ConfigError(f"{path}: deepspeed: there is no file {keys.deepspeed}, next to the YAML or from here")
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: deepspeed: {file} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: deepspeed: {file} holds no mapping of settings")
    return settings
