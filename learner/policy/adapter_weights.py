"""What the workers get of a model: every parameter with its adapter merged in, not quantised, or the adapter alone.

    published_weights(model)  names and shapes of the base model; a layer's update is merged in when it is asked for
    adapter_weights(model)    A and B of each layer under PEFT's names; B holds the scale, so that readers need none

Not here: how weights travel (`weights/publish.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rlx.config import Config
from rlx.errors import ConfigError
from rlx.learner.policy.quantized import is_quantized, matrix_of, shape_of
from rlx.learner.policy.sharding import full_shape, plain_name


@dataclass(frozen=True)
class Weight:
    """One tensor as the workers get it: `scale` × `parameter`, or that with the update of `layer` merged in."""

    parameter: Tensor
    layer: LoraLayer | None = None
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.parameter) if is_quantized(self.parameter) else full_shape(self.parameter)

    @torch.no_grad()
    def value(self) -> Tensor:
        """Float32; the parameter itself where nothing is to be computed."""
        value = matrix_of(self.parameter)
        if self.layer is None:
            return value if self.scale == 1 else value * self.scale
        (name,) = self.layer.active_adapters
        if name in self.layer.lora_variant:
            return self.layer.lora_variant[name].merge_safe(self.layer, name, value)
        return value + self.layer.get_delta_weight(name)


def published_weights(model: nn.Module) -> dict[str, Weight]:
    """Every parameter of the base model by its name there, a tied one once. Nothing is computed yet."""
    if not isinstance(model, PeftModel):
        return {plain_name(name): Weight(p) for name, p in model.named_parameters()}
    base, weights = model.get_base_model(), {}
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in base.named_parameters():
        path = name.split(".")
        if any(part.startswith("lora_") for part in path) or "original_module" in path:
            continue
        if "modules_to_save" in path:
            at = path.index("modules_to_save")
            path[at : at + 2] = []
        layer = None
        if "base_layer" in path:
            at = path.index("base_layer")
            layer = layers[".".join(path[:at])] if path[-1] == "weight" else None
            path[at : at + 1] = []
        weights[".".join(path)] = Weight(parameter if is_quantized(parameter) else parameter.detach(), layer)
    return weights


def adapter_weights(model: nn.Module) -> dict[str, Weight]:
    """A [rank, in] and B [out, rank] of each layer that has an update. Nothing is computed yet."""
    assert isinstance(model, PeftModel)
    weights = {}
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            (name,) = layer.active_adapters
            for half, scale in (("lora_A", 1.0), ("lora_B", layer.scaling[name])):
                parameter = getattr(layer, half)[name].weight.detach()
                weights[f"base_model.model.{path}.{half}.weight"] = Weight(parameter, scale=scale)
    return weights


def check_sent_alone(model: PeftModel, config: Config) -> None:
    """ConfigError where `lora_sync: adapter` could not bring all that is trained to the workers, or they have too
    little room for it."""
    if config.lora_sync != "adapter":
        return
    base = model.get_base_model()
    ends = {id(base.get_input_embeddings()), id(base.get_output_embeddings())}
    linear = {
        path: layer
        for path, layer in base.named_modules()
        if isinstance(layer, LoraLayer) and isinstance(layer.base_layer, nn.Linear) and id(layer) not in ends
    }
    sent = {f"{path}.{half}" for path in linear for half in ("lora_A", "lora_B")}
    for name, parameter in base.named_parameters():
        if parameter.requires_grad and name.removesuffix(".weight").rpartition(".")[0] not in sent:
            raise ConfigError(
                f"{config.path}: lora_sync: adapter would not bring {name} to the workers: only updates of linear layers "
                "between embedding and head are sent so. Write `lora_sync: merged`, or train other layers"
            )
    rank, path = max((next(iter(layer.r.values())), path) for path, layer in linear.items())
    if rank > config.lora_r:
        raise ConfigError(
            f"{config.path}: lora_sync: adapter: {path} has rank {rank}, and the workers make room for lora_r "
            f"({config.lora_r}); write `lora_sync: merged`, or that rank as lora_r"
        )
