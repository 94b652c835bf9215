"""Calling one reward function on one group of G completions, and holding it to its contract.

    load_reward(name) -> Reward -> score_group(reward, ScoreRequest) -> float32 [G]
    RewardWorker: the same for one function in a process of its own

Deadlines and the killing of functions that hang are the caller's.
"""

from __future__ import annotations

import asyncio
import copy
import difflib
import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from rlx.dotted import resolve, user_traceback
from rlx.episode import Episode
from rlx.errors import UserCodeError
from rlx.wire import GroupRequest, RewardOutcome

_FLOAT32_MAX = float(np.finfo(np.float32).max)

CONTRACT_ARGUMENTS = (
    "prompts",
    "completions",
    "completion_ids",
    "max_completion_length",
    "trainer_state",
    "log_extra",
    "log_metric",
)
"""What every reward function can ask for besides the columns; a column of such a name is hidden by it."""


@dataclass(frozen=True)
class Reward:
    """A loaded reward function. `name` is what the YAML says, `key` where it says it."""

    name: str
    key: str
    function: Callable[..., Any]
    is_async: bool
    parameters: tuple[inspect.Parameter, ...]

    def error(self, message: str) -> UserCodeError:
        return UserCodeError(f"{self.key} ({self.name}) {message}")


@dataclass(frozen=True)
class ScoreRequest:
    """A group of G completions of one prompt. `columns` are the other columns of its row of the data set,
    `own_columns` those with a value [G] for each completion, which rollout functions add.

    `completions` [G] are strings or lists of messages; `completion_ids` [G][T], what the policy sampled;
    `max_completion_length` in tokens; `step` is the learner's global step.
    """

    prompt: str | list[dict[str, Any]]
    completions: Sequence[str | list[dict[str, Any]]]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Any] = field(default_factory=dict)
    max_completion_length: int = 0
    step: int = 0
    own_columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @staticmethod
    def of(request: GroupRequest, episodes: Sequence[Episode]) -> ScoreRequest:
        names = dict.fromkeys(name for episode in episodes for name in episode.extra)
        return ScoreRequest(
            prompt=request.prompt,
            completions=[_completion_of(request, episode) for episode in episodes],
            completion_ids=[[int(i) for row in e.rows for i in row.ids[row.mask]] for e in episodes],
            columns=request.columns,
            max_completion_length=request.sampling.max_tokens,
            step=request.step,
            own_columns={name: [episode.extra.get(name) for episode in episodes] for name in names},
        )


def _completion_of(request: GroupRequest, episode: Episode) -> str | list[dict[str, Any]]:
    if episode.completion is not None:
        return episode.completion
    plain = isinstance(request.prompt, str)
    return episode.text if plain else [{"role": "assistant", "content": episode.text}]


@dataclass
class RewardLog:
    """What a function logged while scoring a group: `extra` columns [G] for the samples, scalar `metrics`."""

    num_completions: int
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metric_values: dict[str, list[float]] = field(default_factory=dict)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        if len(values) != self.num_completions:
            raise ValueError(f"log_extra({column!r}): {len(values)} values for {self.num_completions} completions")
        self.extra[column] = json.loads(
            json.dumps(list(values))
        )  # it travels as JSON; a TypeError is the function's own

    def log_metric(self, name: str, value: float) -> None:
        self.metric_values.setdefault(name, []).append(float(value))

    @property
    def metrics(self) -> dict[str, float]:
        """Means over the calls within the group."""
        return {name: sum(values) / len(values) for name, values in self.metric_values.items()}


class RewardWorker:
    """Entry `index` of `trl.reward_funcs`, for a process that scores group after group with it.

    Async functions see one event loop for the worker's life, so that clients they keep stay usable.
    """

    def __init__(self, name: str, index: int, base_dir: str | Path):
        self.reward = load_reward(name, Path(base_dir), f"trl.reward_funcs[{index}]")
        self.runner = asyncio.Runner()
        self.log = RewardLog(0)

    def score(self, payload: ScoreRequest) -> RewardOutcome:
        started = time.perf_counter()
        self.log = RewardLog(len(payload.completions))
        values = score_group(self.reward, payload, log=self.log, runner=self.runner)
        return RewardOutcome(self.reward.name, values, time.perf_counter() - started, self.log.extra)

    @property
    def metrics(self) -> dict[str, float]:
        """What the last scored group logged with `log_metric`."""
        return self.log.metrics

    def close(self) -> None:
        self.runner.close()


def load_reward(name: str, base_dir: Path, key: str) -> Reward:
    """The reward function `name` of the YAML in `base_dir`; of a module, its function `reward`."""
    function = resolve(name, base_dir=base_dir, key=key, main="reward")
    if inspect.isclass(function):
        raise UserCodeError(f"{key} ({name}) is a class. Name a function, or an instance that can be called.")
    try:
        parameters = tuple(inspect.signature(function).parameters.values())
    except ValueError as error:
        raise UserCodeError(f"{key} ({name}) does not tell its parameters. Wrap it in a Python function.") from error
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    return Reward(name, key, function, is_async, parameters)


def score_group(
    reward: Reward, request: ScoreRequest, *, log: RewardLog | None = None, runner: asyncio.Runner | None = None
) -> np.ndarray:
    """The rewards of a group, float32 [G], NaN where the function gave None."""
    num_completions = len(request.completions)
    args, kwargs = _bind(reward, _arguments(request, log or RewardLog(num_completions)))
    try:
        result = reward.function(*args, **kwargs)
        if inspect.isawaitable(result):
            result = runner.run(_wait(result)) if runner else asyncio.run(_wait(result))
    except UserCodeError as error:
        raise reward.error(str(error)) from error
    except (Exception, SystemExit) as error:
        trace = user_traceback(error, hide=[__file__])
        raise reward.error(f"raised {type(error).__name__}.\n{trace}") from error
    return validate_values(reward, result, num_completions)


def validate_values(reward: Reward, result: Any, num_completions: int) -> np.ndarray:
    """What a function returned, as float32 [num_completions]."""
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, list | tuple):
        raise reward.error(f"returned {_describe(result)}. Return a list with one number or None per completion.")
    if len(values) != num_completions:
        raise reward.error(f"returned {len(values)} values for {num_completions} completions. Return one for each.")
    return np.array([_number(reward, index, value) for index, value in enumerate(values)], dtype=np.float32)


def _number(reward: Reward, index: int, value: Any) -> float:
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None:
        return np.nan
    if not isinstance(value, int | float):
        raise reward.error(f"returned {_describe(value)} for completion {index}. Return a number or None.")
    if not abs(value) <= _FLOAT32_MAX:
        raise reward.error(
            f"returned {value} for completion {index}. Return a finite number, or None if not applicable."
        )
    return float(value)


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} (a value of type {type(value).__name__})"


async def _wait(result: Any) -> Any:
    return await result


def _arguments(request: ScoreRequest, log: RewardLog) -> dict[str, Any]:
    """Everything that can be asked for, by name."""
    num_completions = len(request.completions)
    return {
        **{name: [value] * num_completions for name, value in request.columns.items()},
        **{name: list(values) for name, values in request.own_columns.items()},
        "prompts": [request.prompt] * num_completions,
        "completions": copy.deepcopy(list(request.completions)),
        "completion_ids": [list(ids) for ids in request.completion_ids],
        "max_completion_length": request.max_completion_length,
        "trainer_state": SimpleNamespace(global_step=request.step),
        "log_extra": log.log_extra,
        "log_metric": log.log_metric,
    }


def _bind(reward: Reward, arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The positional and keyword arguments that the function accepts."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for parameter in reward.parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            named = {p.name for p in reward.parameters}
            kwargs |= {name: value for name, value in arguments.items() if name not in named}
        elif parameter.kind is parameter.VAR_POSITIONAL:
            continue
        elif parameter.name not in arguments and parameter.default is parameter.empty:
            raise _missing_column(reward, parameter.name, arguments)
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            args.append(arguments.get(parameter.name, parameter.default))
        elif parameter.name in arguments:
            kwargs[parameter.name] = arguments[parameter.name]
    return args, kwargs


def _missing_column(reward: Reward, name: str, arguments: Mapping[str, Any]) -> UserCodeError:
    columns = [column for column in arguments if column not in CONTRACT_ARGUMENTS]
    close = difflib.get_close_matches(name, list(arguments), n=1)
    return reward.error(
        f"asks for {name!r}, which is neither a column of this data set nor given to every reward function. "
        f"Columns: {', '.join(columns) or 'none'}. Given to all: {', '.join(CONTRACT_ARGUMENTS)}. "
        + (f"Did you mean {close[0]!r}? " if close else "")
        + f"Rename the parameter, or have the transform return {name!r}."
    )
