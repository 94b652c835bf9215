"""From the configuration to an engine. Called in the actor's process, which alone imports vLLM."""

from __future__ import annotations

from collections.abc import Callable

from rlx.config import Config
from rlx.hub import located
from rlx.rollout.engine import Engine

EngineFactory = Callable[[Config, int], Engine]
"""Makes engine number `index` of `vllm.data_parallel_size`; a function of a module, as it travels to the actor."""


def vllm_engine(config: Config, index: int) -> Engine:
    from rlx.rollout.vllm_engine import VllmEngine
    from rlx.rollout.vllm_params import VllmOptions

    vllm = config.vllm
    extra = {} if config.tokenizer_config is None else {"tokenizer": located(config, "tokenizer_config")}
    return VllmEngine(
        VllmOptions(
            model=located(config, "base_model"),
            dtype=vllm.dtype,
            max_model_len=config.max_model_len,
            tensor_parallel_size=vllm.tensor_parallel_size,
            gpu_memory_utilization=vllm.gpu_memory_utilization,
            enable_prefix_caching=vllm.enable_prefix_caching,
            enforce_eager=vllm.enforce_eager,
            max_num_seqs=vllm.max_num_seqs,
            seed=config.seed + index,
            kv_cache_gib=vllm.cpu_kv_cache_gib,
            trust_remote_code=config.trust_remote_code,
            revision=config.revision_of_model,
            served_model_name=config.base_model,
            start_timeout_s=vllm.start_timeout,
            lora_rank=config.lora_r if config.adapter is not None and config.lora_sync == "adapter" else None,
            sync_timeout_s=config.service.publish_timeout,
            extra=extra,
        )
    )
