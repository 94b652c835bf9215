"""Calling one reward function on one group of G completions, and holding it to its contract.

    load_reward(name) -> Reward ─┬─► score_group(reward, ScoreRequest) -> float32 [G], or UserCodeError
                                 └─► RewardWorker.score(ScoreRequest)  -> RewardOutcome, in a process of its own

What a function does wrong in one call is in its outcome. What no other call will do better, as asking for a column
that is not there, is a UserCodeError. Killing what hangs is the caller's.
"""

from __future__ import annotations

import asyncio
import copy
import difflib
import functools
import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from rlx.dotted import resolve, user_traceback
from rlx.episode import Episode
from rlx.errors import UserCodeError
from rlx.rewards.environments import COLUMN, EnvironmentState
from rlx.wire import GroupRequest, Outcome, RewardOutcome

_FLOAT32_MAX = float(np.finfo(np.float32).max)


class MissingColumn(UserCodeError):
    """A reward function asks for a column that the group does not have."""

    @property
    def for_episodes(self) -> str:
        """The same where no episode was played, which may have brought the column."""
        asked, _, _ = str(self).partition(", which is neither")
        return f"{asked}, which is no column of the data set: the rollout function or environment must give it."


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

    def failed(self, outcome: Outcome, num_completions: int, message: str) -> RewardOutcome:
        return no_values(self.name, num_completions, outcome, str(self.error(message)))


def no_values(name: str, num_completions: int, outcome: Outcome = "ok", error: str = "") -> RewardOutcome:
    """No value for any of the completions, because of what `error` says."""
    values = np.full(num_completions, np.nan, dtype=np.float32)
    failed = 0 if outcome == "ok" else num_completions
    return RewardOutcome(name, values, 0.0, outcome=outcome, failed=failed, error=error)


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
            completion_ids=[[i for row in e.rows for i in row.sampled_ids.tolist()] for e in episodes],
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


Answer = tuple[RewardOutcome, dict[str, float]]
"""What a function said of a group, and what it logged with `log_metric`."""


class RewardWorker:
    """Entry `index` of `trl.reward_funcs`, for a process that scores group after group with it.

    Async functions see one event loop for the worker's life, so that clients they keep stay usable.
    """

    def __init__(self, name: str, index: int, base_dir: str | Path):
        from rlx.rewards.sources import load_source  # which builds on this module

        self.reward = load_source(name, Path(base_dir), f"trl.reward_funcs[{index}]")
        self._runner = asyncio.Runner()

    def score(self, request: ScoreRequest) -> Answer:
        started, log = time.perf_counter(), RewardLog(len(request.completions))
        outcome = _score(self.reward, request, log, self._runner.run)
        return _answer(outcome, started, log)

    async def score_beside(self, request: ScoreRequest, timeout_s: float) -> Answer:
        """The same in the caller's event loop, beside other groups; cancelled after `timeout_s` seconds."""
        started, log = time.perf_counter(), RewardLog(len(request.completions))
        return _answer(await _score_beside(self.reward, request, log, timeout_s), started, log)

    def close(self) -> None:
        self._runner.close()


def _answer(outcome: RewardOutcome, started: float, log: RewardLog) -> Answer:
    return replace(outcome, seconds=time.perf_counter() - started, extra=log.extra), log.metrics


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


def score_group(reward: Reward, request: ScoreRequest) -> np.ndarray:
    """The rewards of a group, float32 [G], NaN where the function gave None. UserCodeError for everything else."""
    outcome = _score(reward, request, RewardLog(len(request.completions)), asyncio.run)
    if outcome.outcome != "ok":
        raise UserCodeError(outcome.error)
    return outcome.values


def _score(reward: Reward, request: ScoreRequest, log: RewardLog, run: Callable[..., Any]) -> RewardOutcome:
    args, kwargs = _bind(reward, _arguments(request, log))
    try:
        result = reward.function(*args, **kwargs)
        if inspect.isawaitable(result):
            result = run(_wait(result))
        return read_values(reward, result, log.num_completions)
    except BaseException as error:  # whatever the user's code raises is its outcome
        return _raised(reward, error, log.num_completions)


async def _score_beside(reward: Reward, request: ScoreRequest, log: RewardLog, timeout_s: float) -> RewardOutcome:
    args, kwargs = _bind(reward, _arguments(request, log))
    try:
        async with asyncio.timeout(timeout_s) as scope:
            result = await reward.function(*args, **kwargs)
        return read_values(reward, result, log.num_completions)
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # by the caller
            raise
        return _raised(reward, error, log.num_completions)
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # whatever the user's code raises is its outcome
        if scope.expired():
            told = f"did not answer within {timeout_s:g} s (rewards.timeout) and was cancelled."
            return reward.failed("timeout", log.num_completions, told)
        return _raised(reward, error, log.num_completions)


_OF_LISTS = ("'list' object has no attribute", "expected string or bytes-like object, got 'list'")


def _raised(reward: Reward, error: BaseException, num_completions: int) -> RewardOutcome:
    if isinstance(error, UserCodeError):  # of a built-in reward: the data set is not what it needs
        raise reward.error(str(error)) from error
    trace = user_traceback(error, hide=[__file__])
    told = f"raised {type(error).__name__}.\n{trace}"
    if str(error).startswith(_OF_LISTS):
        told += (
            '\nWhere prompts are chat messages, completions are, too: the text of one is `completion[0]["content"]`.'
        )
    return reward.failed("exception", num_completions, told)


def read_values(reward: Reward, result: Any, num_completions: int) -> RewardOutcome:
    """What a function returned: all values, or none if it is not a list of the right length. Values that are not
    finite numbers or None are left out, and the first is explained."""
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, list | tuple):
        told = f"returned {_describe(result)}. Return a list with one number or None per completion."
        return reward.failed("invalid", num_completions, told)
    if len(values) != num_completions:
        told = f"returned {len(values)} values for {num_completions} completions. Return one for each."
        return reward.failed("invalid", num_completions, told)
    numbers, wrong = np.full(num_completions, np.nan, dtype=np.float32), []
    for index, value in enumerate(v.tolist() if hasattr(v, "tolist") else v for v in values):
        if value is not None and (told := _wrong_with(value, index)):
            wrong.append(told)
        elif value is not None:
            numbers[index] = value
    if not wrong:
        return RewardOutcome(reward.name, numbers, 0.0)
    error = str(reward.error(wrong[0]))
    return RewardOutcome(reward.name, numbers, 0.0, outcome="invalid", failed=len(wrong), error=error)


def _wrong_with(value: Any, index: int) -> str:
    """Why `value` is not a reward; empty when it is one."""
    if not isinstance(value, int | float):
        return f"returned {_describe(value)} for completion {index}. Return a number or None."
    if not abs(value) <= _FLOAT32_MAX:
        return f"returned {value} for completion {index}. Return a finite number, or None if not applicable."
    return ""


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
        **{name: _own(name, values) for name, values in request.own_columns.items()},
        "prompts": [request.prompt] * num_completions,
        "completions": copy.deepcopy(list(request.completions)),
        "completion_ids": [list(ids) for ids in request.completion_ids],
        "max_completion_length": request.max_completion_length,
        "trainer_state": SimpleNamespace(global_step=request.step),
        "log_extra": log.log_extra,
        "log_metric": log.log_metric,
    }


def _own(name: str, values: Sequence[Any]) -> list[Any]:
    """A column that the episodes brought."""
    return [EnvironmentState(v) if name == COLUMN and isinstance(v, dict) else v for v in values]


def _bind(reward: Reward, arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The positional and keyword arguments that the function accepts."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    arguments = {**arguments, **_plurals(reward, arguments)}
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


def _plurals(reward: Reward, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Columns that the function asks for by their plural: `answers` for the column `answer`, told once each."""
    named = (p.name for p in reward.parameters if p.default is p.empty)
    asked = {name: name.removesuffix("s") for name in named if name not in arguments and name.endswith("s")}
    found = {name: column for name, column in asked.items() if column in arguments and column not in CONTRACT_ARGUMENTS}
    for name, column in found.items():
        _tell_once(f"{reward.key} ({reward.name}): its parameter {name!r} is given the column {column!r}.")
    return {name: arguments[column] for name, column in found.items()}


@functools.cache
def _tell_once(note: str) -> None:
    print(note, flush=True)


def _missing_column(reward: Reward, name: str, arguments: Mapping[str, Any]) -> MissingColumn:
    columns = [column for column in arguments if column not in CONTRACT_ARGUMENTS]
    close = difflib.get_close_matches(name, list(arguments), n=1)
    return MissingColumn(
        f"{reward.key} ({reward.name}) asks for {name!r}, which is neither a column of this data set nor given to every reward function. "
        f"Columns: {', '.join(columns) or 'none'}. Given to all: {', '.join(CONTRACT_ARGUMENTS)}. "
        + (f"Did you mean {close[0]!r}? " if close else "")
        + f"Rename the parameter, or have the transform return {name!r}."
    )
