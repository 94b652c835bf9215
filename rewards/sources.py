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

from rlx.errors import ConfigError, ModelError, UserCodeError
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
    try:
        function = _model(name, base_dir) if kind == "model" else _remote(name)
    except (ConfigError, ModelError) as error:
        raise UserCodeError(f"{key} ({name}): {error}") from error
    parameters = tuple(inspect.signature(function).parameters.values())
    return Reward(name, key, function, kind == "url", parameters)


def _model(name: str, base_dir: Path) -> Callable[..., Any]:
    from rlx.rewards.model import RewardModel

    return RewardModel(_local(name, base_dir))


def _remote(url: str) -> Callable[..., Any]:
    from rlx.rewards.remote import RemoteReward

    return RemoteReward(url)


def _local(name: str, base_dir: Path) -> str:
    """As `Config.local`: the absolute path of a file or folder next to the YAML or in the current folder."""
    for candidate in (base_dir / Path(name).expanduser(), Path(name).expanduser().absolute()):
        if candidate.exists():
            return str(candidate.resolve())
    return name
