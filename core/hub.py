"""Where a model comes from: a local folder, or the hub, whose reachability is found out once and quickly."""

from __future__ import annotations

import os
from pathlib import Path

from rlx.config import Config
from rlx.errors import ConfigError, ModelError

_TIMEOUT_S = 5.0


def settle_hub(config: Config) -> None:
    """When the run names something on the hub and the hub does not answer, set HF_HUB_OFFLINE for this process and
    its children: caches are used, and what is missing fails at once, where libraries would retry for a minute."""
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
    names += [
        d.path for d in (*config.datasets, *config.test_datasets) if not d.data_files and ":" not in (d.path or "")
    ]
    names += [name for name in config.trl.reward_funcs if "/" in name and ":" not in name and not name.endswith(".py")]
    return any(name is not None and config.local(name) == name and not name.startswith("/") for name in names)


def located(config: Config, key: str) -> str:
    """The value of `base_model` or `tokenizer_config`, as a path when it is a local folder. Raises ConfigError."""
    name = getattr(config, key)
    found = config.local(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(found).exists():
        raise ConfigError(
            f"{config.path}: {key}: there is no folder {name!r} next to the YAML or in the current folder."
        )
    if key == "base_model" and Path(found).is_dir() and not (Path(found) / "config.json").is_file():
        raise ConfigError(f"{config.path}: {key}: {found} holds no model: config.json is missing.")
    return found


def check_in_reach(config: Config, key: str) -> None:
    """ModelError when the value of `base_model` or `tokenizer_config` is neither a local folder nor in the hub's cache
    and `settle_hub` found that the hub does not answer."""
    name = located(config, key)
    if Path(name).is_dir() or os.environ.get("HF_HUB_OFFLINE") != "1":
        return
    from huggingface_hub import try_to_load_from_cache

    revision = config.revision_of_model if key == "base_model" else None
    if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        raise ModelError(
            f"{config.path}: {key}: {name!r} is no local folder, the hub cannot be reached, and its cache does not hold "
            "this model. Check the name and the network, or name a local folder."
        )


def unusable(config: Config, key: str, name: str, error: Exception) -> ModelError:
    """What to say when transformers cannot load `name`, the value of `key`."""
    lines = str(error).strip().splitlines()
    if Path(name).is_dir():
        return ModelError(
            f"{config.path}: {key}: the model in {name} cannot be loaded: {lines[0] if lines else error!r}"
        )
    return ModelError(
        f"{config.path}: {key}: {name!r} is no local folder, and the hub could not give it: {lines[0] if lines else error!r} "
        "Check the name and the network, log in with `hf auth login` for a gated model, or name a local folder."
    )
