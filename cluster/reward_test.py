"""`rlx reward test`: every reward on completions whose worth is plain, or on those that a run has saved.

    data set rows × (nothing, the prompt, the answer, a long text) ─┐
    samples.jsonl, its groups ──────────────────────────────────────┴─► reward processes ─► a table, what is odd

The processes, deadlines and checks are those of a run; the failure budget is not.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from rlx.cluster import watchdog
from rlx.cluster.ray_runtime import RayRuntime
from rlx.cluster.ray_scorer import RayScorer
from rlx.cluster.reward_cases import SAVED, Case, saved_cases, trivial_cases
from rlx.cluster.reward_pool import RewardPool
from rlx.cluster.reward_report import STUCK, Call, Scores, show
from rlx.config import Config
from rlx.errors import ConfigError, RlxError
from rlx.rewards.scoring import MissingColumn


def reward_test_main(config: Config, samples: Path | None, rows: int, answer_column: str | None) -> int:
    """Print what every reward gives; 1 when one failed, else 0. Raises rlx.errors when there is nothing to score."""
    if not config.trl.reward_funcs:
        hint = " The episodes' own reward: `rlx rollout test`." if config.has_episodes else ""
        raise ConfigError(f"{config.path}: trl.reward_funcs is empty: there is nothing to test.{hint}")
    console = Console(highlight=False)
    cases = trivial_cases(config, rows, answer_column) if samples is None else saved_cases(config, samples)
    logging.getLogger(RewardPool.__module__).setLevel(logging.ERROR)  # it tells of failures, which the report does
    watchdog.guard()
    config = _for_testing(config)
    runtime = RayRuntime(config)
    try:
        with console.status("starting Ray and the rewards"):
            runtime.start()
            scores = asyncio.run(score_all(config, cases))
    finally:
        runtime.stop()
    show(console, scores, saved=samples is not None)
    return int(any(score.failed for score in scores))


def _for_testing(config: Config) -> Config:
    """Nothing but reward processes; a failure is shown, not counted against a budget."""
    return config.model_copy(
        update={
            "cluster": config.cluster.model_copy(update={"dashboard": False}),
            "vllm": config.vllm.model_copy(update={"data_parallel_size": 1, "tensor_parallel_size": 1}),
            "rewards": config.rewards.model_copy(update={"reward_failure_budget": 1.0}),
        }
    )


async def score_all(config: Config, cases: Sequence[Case]) -> list[Scores]:
    """Every reward on every case, the rewards side by side, on the Ray that runs."""
    scorer = RayScorer(config)
    try:
        return list(
            await asyncio.gather(*(_score(function, cases, config.has_episodes) for function in scorer.functions))
        )
    finally:
        await scorer.close()


async def _score(function: RewardPool, cases: Sequence[Case], has_episodes: bool) -> Scores:
    """A kind of completion that blocks the reward once is not tried again. `has_episodes`: in a run they may bring
    columns."""
    scores = Scores(function.name)
    try:
        await function.start()
    except RlxError as error:
        return Scores(function.name, broken=str(error))
    for case in cases:
        if any(call.outcome in STUCK for call in scores.of(case.kind)) and case.kind != SAVED:
            continue
        start = time.perf_counter()
        try:
            outcome, _ = await function.score(case.request)
            given: tuple[list[float], str, str] = outcome.values.tolist(), outcome.outcome, outcome.error
        except RlxError as error:  # no call will get it to work: the others are not tried
            if isinstance(error, MissingColumn) and has_episodes and case.kind != SAVED:
                return Scores(
                    function.name, untried=f"{error.for_episodes} `--samples` tries it on what a run has saved."
                )
            given = [math.nan] * len(case.request.completions), "refused", str(error)
        values, how, told = given
        scores.calls.append(Call(case, values, time.perf_counter() - start, how, told))
        if how == "refused":
            break
    return scores
