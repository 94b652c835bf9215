"""What an entry of `trl.reward_funcs` is: a function, a reward model, or the address of a scorer.

rewards.exact, rewards.py:exact     function   by the rule of rlx.dotted
org/model, ./folder, folder         model      a folder holds a config.json
http://host:8000/score              url
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from rlx.errors import ModelError, UserCodeError
from rlx.rewards.scoring import Reward, load_reward

Kind = Literal["function", "model", "url"]


def kind_of(name: str, base_dir: Path) -> Kind:
    """What the entry `name` of the YAML in `base_dir` stands for, whether or not it can be had."""
    if name.lower().startswith(("http://", "https://")):
        return "url"
    if name.endswith(".py") or ".py:" in name:
        return "function"
    if "/" in name or name.startswith((".", "~")):
        return "model"
    return "model" if (Path(_local(name, base_dir)) / "config.json").is_file() else "function"


def load_source(name: str, base_dir: Path, key: str) -> Reward:
    """The entry `name` as a reward that can be called; `key` is where the YAML says it. UserCodeError when it cannot
    be had, with the user's traceback where a module does not import."""
    kind = kind_of(name, base_dir)
    if kind == "function":
        return load_reward(name, base_dir, key)
    check_source(name, base_dir, key)
    try:
        function = _model(_local(name, base_dir)) if kind == "model" else _remote(name)
    except ModelError as error:
        raise UserCodeError(f"{key} ({name}): {error}") from error
    return Reward(name, key, function, kind == "url", tuple(inspect.signature(function).parameters.values()))


def check_source(name: str, base_dir: Path, key: str) -> None:
    """What can be known of a model or an address without loading or calling it; UserCodeError when it is wrong."""
    if kind_of(name, base_dir) == "url":
        parts = urlsplit(name)
        if not parts.hostname or parts.username or parts.password:
            raise UserCodeError(
                f"{key} ({name.rpartition('@')[2]}): this is not an address to POST to. Write http://HOST:PORT/PATH; a "
                "secret belongs into the environment variable RLX_REWARD_TOKEN, which is sent as bearer token."
            )
        return
    found = Path(_local(name, base_dir))
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not found.is_dir():
        raise UserCodeError(f"{key} ({name}): there is no folder {name!r} next to the YAML or in the current folder.")
    if found.is_dir() and not (found / "config.json").is_file():
        raise UserCodeError(f"{key} ({name}): {found} holds no model: config.json is missing.")


def _model(name: str) -> Callable[..., Any]:
    from rlx.rewards.model import RewardModel

    return RewardModel(name)


def _remote(url: str) -> Callable[..., Any]:
    from rlx.rewards.remote import RemoteReward

    return RemoteReward(url)


def _local(name: str, base_dir: Path) -> str:
    """As `Config.local`: the absolute path of a file or folder next to the YAML or in the current folder."""
    for candidate in (base_dir / Path(name).expanduser(), Path(name).expanduser().absolute()):
        if candidate.exists():
            return str(candidate.resolve())
    return name
