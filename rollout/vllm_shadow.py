"""New weights beside those that serve: a twin of vLLM's model is loaded while the model generates, then they trade places.

The twin is the same modules with tensors of their own. vLLM's layer-wise reload fills it, so what is fused, packed or
sharded is vLLM's business; the exchange hands each module its twin's tensors and whatever was made of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any, cast

import psutil
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO, _layerwise_process, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS, to_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import layer_ref_sentinel
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo

from rlx.errors import ModelError

_ROOM = 2.5
"""Free bytes that loading needs for each byte of weights: the twin, and what packing takes."""


def has_room(config: VllmConfig, device: torch.device, nbytes: int) -> bool:
    """Whether parameters may be replaced by others, as nothing has captured their addresses, and fit in twice."""
    replaceable = device.type == "cpu" and config.model_config.enforce_eager and config.quant_config is None
    return replaceable and psutil.virtual_memory().available > _ROOM * nbytes


class Shadow:
    """`load`, in any thread, then `exchange` while nothing generates. For one update."""

    def __init__(self, model: nn.Module, config: VllmConfig):
        self._model, self._dtype = model, config.model_config.dtype
        self._twins: dict[nn.Module, nn.Module] = {}
        self._loaded: list[nn.Module] = []

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Fill the twin; the model is not touched."""
        heads = tied_heads(self._model)
        twin: Any = self._twin(self._model)
        initialize_layerwise_reload(twin)
        infos = {layer: get_layerwise_info(of) for layer, of in self._twins.items()}
        for info in infos.values():
            info.kernel_tensors = None  # else the reload would copy into the tensors that serve
        twin.load_weights(weights)
        for layer, info in infos.items():
            if info.load_numel:  # padding is never loaded, so vLLM waits for more
                if is_deferred_attention_layer(layer):
                    raise ModelError("weights of attention layers are loaded in place only")
                _layerwise_process(self._twins[layer], info)
            if not info.can_load():
                self._loaded.append(layer)
        for head, embedding in heads:
            share(self._twins[head], self._twins[embedding])
            self._loaded.append(head)

    @torch.no_grad()
    def exchange(self) -> None:
        for layer in self._loaded:
            layer.__dict__.update({k: v for k, v in self._twins[layer].__dict__.items() if k != "_modules"})
        layers: Iterable[Any] = self._model.modules()
        for layer in layers:
            if is_deferred_attention_layer(layer):  # some keep what they made of other layers' weights
                layer.process_weights_after_loading(self._dtype)

    def _twin(self, layer: nn.Module) -> nn.Module:
        if layer in self._twins:
            return self._twins[layer]
        twin = self._twins[layer] = object.__new__(type(layer))
        twin.__dict__.update(layer.__dict__)
        twin._parameters = dict(layer._parameters)
        for name, parameter in layer._parameters.items():
            if parameter is not None and name in SKIP_TENSORS:  # which the reload writes into as they are
                twin._parameters[name] = cast(nn.Parameter, _rebound(_copy(parameter), twin))
        twin._buffers = dict(layer._buffers)
        twin._non_persistent_buffers_set = set(layer._non_persistent_buffers_set)
        info = get_layerwise_info(layer)
        parameters, buffers = (
            {name: _rebound(to_meta_tensor(t), twin) for name, t in tensors.items()}
            for tensors in info.restore_metadata
        )
        LAYERWISE_INFO[twin] = LayerReloadingInfo((parameters, buffers), info.restore_device)
        twin._modules = {name: child and self._twin(child) for name, child in layer._modules.items()}
        return twin


def tied_heads(model: nn.Module) -> list[tuple[ParallelLMHead, VocabParallelEmbedding]]:
    """Each LM head that shares its matrix with an embedding, with that embedding."""
    layers = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
    heads = [m for m in layers if isinstance(m, ParallelLMHead)]
    embeddings = [m for m in layers if not isinstance(m, ParallelLMHead)]
    return [(h, e) for h in heads for e in embeddings if h.weight.data_ptr() == e.weight.data_ptr() != 0]


def share(head: Any, embedding: Any) -> None:
    """The head has the embedding's matrix, packed anew: a reload leaves the packed copy of what it was before."""
    head.weight = embedding.weight
    head.quant_method.process_weights_after_loading(head)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.data.clone()
    copy.__class__, copy.__dict__ = tensor.__class__, tensor.__dict__.copy()
    return copy


def _rebound(tensor: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """Its loaders, methods of the layer that it was made for, as methods of `layer`."""
    for name, value in tensor.__dict__.items():
        if isinstance(value, MethodType) and (
            value.__self__ is layer_ref_sentinel or type(value.__self__) is type(layer)
        ):
            tensor.__dict__[name] = value.__func__.__get__(layer)
    return tensor
