"""What the YAML names as a rollout function, as one native function: `async (Rollout) -> float | None`.

trl.rollout_func                     a function of four shapes, told apart by the names of its parameters
trl.environment_factory, trl.tools   rlx.envs.tool_loop
envs                                 rlx.envs.play
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlx.config import Config
from rlx.dotted import resolve
from rlx.envs.chat import Chat
from rlx.envs.runner import Native
from rlx.errors import ConfigError, UserCodeError

_KEY = "trl.rollout_func"
_SHAPES = {
    "documented": ("model", "processing_class", "prompts"),
    "trl_0_25": ("prompts", "args", "processing_class"),
    "trl": ("prompts", "trainer"),
}
_OPTIONAL = ("generation_config",)
_NAMES = {name for names in _SHAPES.values() for name in names} | set(_OPTIONAL)
_TRL_OPENENV = "trl.experimental.openenv"

FOUR_SHAPES = """\
    async def rollout(ctx) -> float | None                                        one episode
    def rollout(model, processing_class, prompts, generation_config=None)         returns list[str]
    def rollout(prompts, args, processing_class)                                  returns a dict, as in TRL 0.25
    def rollout(prompts, trainer)                                                 returns a dict, as in TRL"""


@dataclass(frozen=True)
class LoadedRollout:
    """`many_turns`: whether an episode may have bridges between turns, so that the chat template must preserve
    prefixes. `own_reward`: whether an episode may bring a reward of its own."""

    function: Native
    many_turns: bool
    own_reward: bool


def load_rollout(config: Config, chat: Chat) -> LoadedRollout:
    """UserCodeError or ConfigError with the key where what is named cannot be used."""
    if config.trl.rollout_func:
        return _load_function(config.trl.rollout_func, config, chat)
    if config.trl.environment_factory or config.trl.tools:
        from rlx.envs.tool_loop import ToolLoop

        loop = ToolLoop(config, chat)
        return LoadedRollout(loop, many_turns=True, own_reward=loop.own_reward)
    if config.envs:
        from rlx.envs.play import player

        return LoadedRollout(player(config), many_turns=True, own_reward=True)
    raise ConfigError(
        f"{config.path}: there is no rollout_func, environment_factory, tools or envs to make episodes with."
    )


def returns_text(config: Config) -> bool:
    """Whether the reward functions get strings even for prompts that are messages: the rollout function has the
    documented shape. UserCodeError when it cannot be loaded."""
    name = config.trl.rollout_func
    return name is not None and shape_of(_resolved(name, config), name) == "documented"


def _load_function(name: str, config: Config, chat: Chat) -> LoadedRollout:
    function = _resolved(name, config)
    shape = shape_of(function, name)
    if shape == "native":
        return LoadedRollout(function, many_turns=True, own_reward=True)
    from rlx.envs.legacy import Legacy

    return LoadedRollout(Legacy(function, shape, config, chat), many_turns=False, own_reward=False)


def _resolved(name: str, config: Config) -> Callable[..., Any]:
    try:
        return resolve(name, base_dir=config.base_dir, key=_KEY, main="rollout")
    except UserCodeError as error:
        if _TRL_OPENENV not in str(error):
            raise
        raise UserCodeError(
            f"{error}\nTRL {_trl_version()} has no {_TRL_OPENENV}. Write "
            "`from rlx.envs.facades import generate_rollout_completions`, which takes and returns the same."
        ) from error


def shape_of(function: Callable[..., Any], name: str) -> str:
    """native, documented, trl_0_25 or trl; UserCodeError that shows what was found and the four."""
    try:
        signature = inspect.signature(function)
    except ValueError as error:
        raise UserCodeError(f"{_KEY} ({name}) does not tell its parameters. Wrap it in a Python function.") from error
    positional = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    named = {p.name for p in positional if p.kind is not p.POSITIONAL_ONLY}
    required = [p.name for p in positional if p.default is p.empty]
    for shape, names in _SHAPES.items():
        if named.issuperset(names) and set(required).issubset(names):
            return shape
    if len(required) == 1 and required[0] not in _NAMES and positional[0].name == required[0]:
        if _is_async(function):
            return "native"
        problem = f"is not a coroutine function. Write `async def` before {_called(function)}{signature}"
    else:
        problem = f"has parameters that fit none of the four shapes: {_called(function)}{signature}"
    raise UserCodeError(f"{_KEY} ({name}) {problem}\n{FOUR_SHAPES}")


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _called(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _trl_version() -> str:
    from importlib.metadata import version

    return version("trl")
