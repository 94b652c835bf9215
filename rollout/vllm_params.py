"""Our options and sampling parameters in vLLM's terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlx.config.lora import engine_rank
from rlx.errors import ServiceError
from rlx.wire import Sampling


@dataclass(frozen=True)
class VllmOptions:
    """How to start vLLM. `kv_cache_gib` counts on CPU only, `gpu_memory_utilization` on GPU only.

    `transport` is how weights come: `cpu` from a file, `nccl` over NCCL. With `lora_rank` updates are adapters of at
    most that rank, and the model stays. `extra` are more fields of AsyncEngineArgs.
    """

    model: str
    dtype: str = "auto"
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool | None = None
    enforce_eager: bool | None = None
    max_num_seqs: int = 256
    seed: int = 0
    transport: Literal["cpu", "nccl"] = "cpu"
    lora_rank: int | None = None
    kv_cache_gib: float = 1.0
    trust_remote_code: bool = False
    revision: str | None = None
    served_model_name: str | None = None
    worker_extension_cls: str = "rlx.rollout.vllm_worker.RlxWorkerExtension"
    start_timeout_s: float = 600.0
    sync_timeout_s: float = 300.0
    extra: Mapping[str, Any] = field(default_factory=dict)


def engine_args(options: VllmOptions) -> Any:
    """vLLM's AsyncEngineArgs; what is None stays vLLM's own choice."""
    from vllm import AsyncEngineArgs
    from vllm.config import WeightTransferConfig
    from vllm.platforms import current_platform
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    o, on_cpu = options, current_platform.is_cpu()
    # vLLM asks for a worker process of its own on a CPU, to set its OpenMP threads there. They are set in the
    # environment before the engine core starts (`prepare_environment`), so one process less does the same work.
    in_one_process = on_cpu and o.tensor_parallel_size == 1
    fields = {
        "model": o.model,
        "dtype": o.dtype,
        "max_model_len": o.max_model_len,
        "tensor_parallel_size": o.tensor_parallel_size,
        "max_num_seqs": o.max_num_seqs,
        "seed": o.seed,
        "enable_prefix_caching": o.enable_prefix_caching,
        "enforce_eager": on_cpu if o.enforce_eager is None else o.enforce_eager,
        "trust_remote_code": o.trust_remote_code,
        "revision": o.revision,
        "served_model_name": o.served_model_name,
        "kv_cache_memory_bytes": int(o.kv_cache_gib * 2**30) if on_cpu else None,
        "gpu_memory_utilization": None if on_cpu else o.gpu_memory_utilization,
        "worker_extension_cls": o.worker_extension_cls,
        "weight_transfer_config": WeightTransferConfig(backend="rlx_file" if o.transport == "cpu" else "nccl"),
        "logprobs_mode": "processed_logprobs",
        "distributed_executor_backend": UniProcExecutor if in_one_process else None,
        "disable_log_stats": False,  # for `vllm_load.py`
    }
    if o.lora_rank is not None:
        # An update takes the place of the adapter before it, so there is only one.
        fields |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": engine_rank(o.lora_rank)}
    return AsyncEngineArgs(**{**{k: v for k, v in fields.items() if v is not None}, **o.extra})


def sampling_params(n: int, sampling: Sampling) -> Any:
    """vLLM's SamplingParams: the sampled token's log-probability and one output at the end, nothing per step.

    Text is assembled per token only where stop strings need it.
    """
    from vllm import SamplingParams
    from vllm.platforms import current_platform
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    if "seed" in sampling.extra and current_platform.is_cpu():
        raise ServiceError("`seed` of a request is not supported on CPU (it kills vLLM's CPU build); remove it")
    fields = {
        "n": n,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "stop": list(sampling.stop) or None,
        "seed": None if current_platform.is_cpu() else sampling.seed,
        "structured_outputs": StructuredOutputsParams(regex=sampling.regex) if sampling.regex else None,
    }
    ours = {
        "logprobs": 0,
        "flat_logprobs": True,
        "detokenize": bool(sampling.stop),
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    try:
        return SamplingParams(**{**fields, **sampling.extra, **ours})
    except (TypeError, ValueError) as error:
        raise ServiceError(f"these sampling parameters cannot be used: {error}") from error


def prompt_logprobs_params() -> Any:
    """SamplingParams that score the prompt at temperature 1."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        prompt_logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
