"""What `trl.environment_factory` and `trl.tools` name, checked, and described to the model. UserCodeError says what to
write where something is missing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlx.config import Config
from rlx.dotted import resolve, user_traceback
from rlx.envs.chat import Chat
from rlx.errors import UserCodeError

_NOT_TOOLS = ("reset", "get_reward", "close", "done")


@dataclass(frozen=True)
class Kind:
    """One kind of environment. `methods` are the names of its tools, `schemas` theirs and those of `trl.tools`. `spare`
    holds those that no episode has yet, at first the one that was made to look at."""

    factory: Callable[[], Any] | None
    methods: tuple[str, ...]
    schemas: tuple[dict[str, Any], ...]
    has_reward: bool
    spare: list[Any] = field(default_factory=list)


def standalone(config: Config) -> dict[str, Callable[..., Any]]:
    functions: dict[str, Callable[..., Any]] = {}
    for index, dotted in enumerate(config.trl.tools):
        function = resolve(dotted, base_dir=config.base_dir, key=f"trl.tools[{index}]")
        name = getattr(function, "__name__", dotted.rpartition(".")[2])
        if name in functions:
            raise UserCodeError(f"trl.tools[{index}] ({dotted}): two tools are called {name!r}. Rename one.")
        functions[name] = function
    return functions


def factories_of(config: Config) -> dict[str | None, Callable[[], Any]]:
    named = config.trl.environment_factory
    if named is None:
        return {}
    key = "trl.environment_factory"
    if isinstance(named, str):
        return {None: resolve(named, base_dir=config.base_dir, key=key)}
    return {name: resolve(dotted, base_dir=config.base_dir, key=f"{key}.{name}") for name, dotted in named.items()}


def kind_of(factory: Callable[[], Any], name: str | None, schemas: list[dict[str, Any]], chat: Chat) -> Kind:
    """What one instance of the environment shows."""
    key = "trl.environment_factory" + (f".{name}" if name else "")
    try:
        environment = factory()
    except (Exception, SystemExit) as error:
        raise UserCodeError(
            f"{key}: making an environment failed.\n{user_traceback(error, hide=[__file__])}"
        ) from error
    kind = type(environment)
    functions = dict(inspect.getmembers(kind, inspect.isfunction))
    if "reset" not in functions:
        raise UserCodeError(
            f"{key} ({kind.__name__}) has no `reset`. Write `def reset(self, **row) -> str | None:` in it; it is called "
            "before each episode with the row of the data set."
        )
    methods = tuple(member for member in functions if not member.startswith("_") and member not in _NOT_TOOLS)
    taken = {schema["function"]["name"] for schema in schemas}
    if twice := taken.intersection(methods):
        raise UserCodeError(f"{key} ({kind.__name__}) and trl.tools both have {min(twice)!r}. Rename one.")
    own = [schema_of(getattr(environment, member), f"{kind.__name__}.{member}", chat) for member in methods]
    return Kind(factory, methods, (*schemas, *own), has_reward="get_reward" in functions, spare=[environment])


def schema_of(function: Callable[..., Any], name: str, chat: Chat) -> dict[str, Any]:
    """The JSON schema of a tool. UserCodeError that says which line is missing."""
    parameters = inspect.signature(function).parameters.values()
    for parameter in parameters:
        if parameter.annotation is parameter.empty:
            raise UserCodeError(
                f"the tool {name} has no type hint for {parameter.name!r}, so the model cannot be told what to give. "
                f"Write `{parameter.name}: str`, or whatever its type is."
            )
    arguments = "".join(f"\n            {p.name}: ..." for p in parameters)
    write = 'Write under its `def` line:\n        """What it does.' + (
        f"\n\n        Args:{arguments}" if arguments else ""
    )
    if not inspect.getdoc(function):
        raise UserCodeError(
            f'the tool {name} has no docstring, which tells the model what it does. {write}\n        """'
        )
    try:
        return chat.tool_schema(function)
    except (ValueError, TypeError) as error:
        raise UserCodeError(
            f'the tool {name} cannot be described to the model: {error} {write}\n        """'
        ) from error
