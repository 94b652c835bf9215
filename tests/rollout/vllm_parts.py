"""What tests of a real vLLM engine begin with."""

from __future__ import annotations

from pathlib import Path

from rlx.rollout.vllm_params import VllmOptions


def vllm_options(model: str) -> VllmOptions:
    return VllmOptions(model=model, max_model_len=1024, kv_cache_gib=0.25, served_model_name="tiny")


def tiny_model(folder: Path) -> None:
    from tiny_models import make_tiny_model  # imports transformers, for seconds

    make_tiny_model(folder)
