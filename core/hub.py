"""Whether the model hub can be reached, found out once and quickly, before libraries retry for a minute in silence."""

from __future__ import annotations

import os

from rlx.config import Config

_TIMEOUT_S = 5.0


def settle_hub(config: Config) -> None:
    """When the run names something on the hub and the hub does not answer, set HF_HUB_OFFLINE for this process and
    its children: caches are used, and what is missing fails at once."""
    if "HF_HUB_OFFLINE" in os.environ or not _names_hub(config):
        return
    import httpx

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        httpx.head(endpoint, timeout=_TIMEOUT_S)
    except httpx.TransportError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _names_hub(config: Config) -> bool:
    names = [config.base_model, config.tokenizer_config]
    names += [d.path for d in (*config.datasets, *config.test_datasets) if not d.data_files]
    return any(name is not None and config.local(name) == name and not name.startswith("/") for name in names)
