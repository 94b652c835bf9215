"""A model that is cut over the learner's processes: FSDP2, or DeepSpeed's ZeRO-3.

    arguments ─► accelerate cuts the model ─► whole(parameter): all ranks together, one tensor at a time

Rank 0 decides when weights are published and saved; the other ranks take part when it calls (`Ranks.call`).
Not here: the keys (`core/config/sharding.py`), what is published (`weights/publish.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments

from rlx.config import Config
from rlx.config.sharding import FsdpSection, deepspeed_settings
from rlx.errors import ConfigError


def check_device(config: Config) -> None:
    """Raises ConfigError where a key needs a GPU and there is none."""
    if config.use_liger_kernel and not torch.cuda.is_available():
        raise ConfigError(
            f"{config.path}: use_liger_kernel: Liger's kernels run on GPUs, and none is here. Remove the key."
        )


def device_notes(config: Config) -> list[str]:
    if config.activation_offloading and not torch.cuda.is_available():
        return ["activation_offloading: without a GPU activations are in main memory already"]
    return []


def arguments(config: Config, num_processes: int) -> dict[str, Any]:
    """Those of TrainingArguments that cut the model; none where every process holds all of it."""
    if config.deepspeed is not None:
        return {"deepspeed": deepspeed_settings(config, config.path)}
    if not config.is_sharded or num_processes == 1:
        return {}
    keys = config.fsdp_config or FsdpSection()
    settings: dict[str, Any] = {
        "version": 2,
        "reshard_after_forward": keys.reshard_after_forward,
        "cpu_offload": keys.offload_params and torch.cuda.is_available(),
        "auto_wrap_policy": keys.auto_wrap_policy,
        "min_num_params": keys.min_num_params,
        "activation_checkpointing": keys.activation_checkpointing,
        "state_dict_type": keys.state_dict_type,
    }
    if keys.transformer_layer_cls_to_wrap:
        settings["transformer_layer_cls_to_wrap"] = keys.transformer_layer_cls_to_wrap
    return {"fsdp": True, "fsdp_config": settings}


def process_group_backend(config: Config) -> str:
    """For GPUs; parts that lie in main memory are gathered there."""
    return "cuda:nccl,cpu:gloo" if config.fsdp_config is not None and config.fsdp_config.offload_params else "nccl"


def prepare_fsdp(accelerator: Accelerator, args: TrainingArguments) -> bool:
    """Whether `accelerator` cuts models; nothing is done where it does not.

    On CPUs accelerate has no FSDP of its own, though torch has. Everywhere accelerate would round what a model
    returns to the type that it computes in: log-probabilities stay float32 here, and gradients are summed in float32.
    """
    if args.fsdp_plugin_args is None:
        return False
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    compute = {"bf16": torch.bfloat16}.get(accelerator.mixed_precision)
    state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    return True


def shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """`model`, which is not trained, cut as accelerate cuts the one that is."""
    sharded: nn.Module = fsdp2_prepare_model(accelerator, model)
    return sharded


def plain_name(name: str) -> str:
    """Of a parameter, without what wrappers put into it that recompute activations."""
    return name.replace("_checkpoint_wrapped_module.", "")


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def give_back(model: nn.Module) -> None:
    """Leave each rank its part only, where a forward without backward has left some layers whole: writing to those
    would change nothing."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Its shape when it is whole."""
    return tuple(parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape)


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`, on every rank, without gradient. Where it is cut, every rank calls this for the same tensors in
    the same order."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach()
    if hasattr(tensor, "ds_id"):  # DeepSpeed's mark of a parameter that ZeRO-3 has cut
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()


@torch.no_grad()
def whole_state(model: nn.Module, dtype: torch.dtype | None, keep: bool) -> dict[str, Tensor]:
    """What `model` trains, and all else where it trains everything, by name, on the CPU; empty unless `keep`, which is
    for the ranks that need it. With a `dtype` the parameters are rounded to it first, each in its place, so that what
    is published afterwards is what this gives. All ranks call this together."""
    give_back(model)
    state: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    everything = all(p.requires_grad for p in model.parameters())
    trained = {plain_name(n) for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not everything and name not in trained:
            continue
        if id(tensor) in seen:  # a tied head
            if keep:
                state[name] = state[seen[id(tensor)]]
            continue
        seen[id(tensor)] = name
        if dtype is not None and tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
        full = whole(tensor)
        if keep:
            state[name] = full.detach().to(dtype or full.dtype).cpu()
    return state


@torch.no_grad()
def load_whole(targets: Mapping[str, Tensor], files: Iterable[Path]) -> None:
    """Fill `targets`, cut or not, from safetensors files that hold them whole. Every rank reads; what no file has, such
    as the second name of a tied head, stays."""
    for file in sorted(files):
        with safe_open(file, "pt") as saved:
            for name in sorted(set(saved.keys()) & targets.keys()):
                target, value = targets[name], saved.get_tensor(name)
                if isinstance(target, DTensor):
                    value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
                target.copy_(value)
