"""Groups per second of a CPU-bound reward function with 1 and 2 processes, and the time that a hung one costs.

Throughput: the same groups through `RayScorer`, A/B/A/B, beside plain calls of the same function in this process.
Replacement: a call that never ends runs into its deadline; measured is the time from the deadline to the answer of
its group, and to the first score of the next group, which waits for the fresh process. Limit: on two cores the
gateway's part and Ray take their time from the second reward process.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from service import print_versions

from rlx.cluster.ray_runtime import RayRuntime
from rlx.cluster.ray_scorer import RayScorer
from rlx.config import Config, load_config
from rlx.episode import Episode, Row
from rlx.rewards.scoring import ScoreRequest, load_reward, score_group
from rlx.wire import GroupRequest, Sampling

GROUPS, GENERATIONS, REPEATS, TIMEOUT_S = 100, 8, 5, 1.0
REWARDS = """
import time

def busy(completions, **kwargs):
    return [float(sum(i * i for i in range(40_000)) % 7) for _ in completions]

busy_in_two = busy

def hangs_on_odd_steps(completions, trainer_state, **kwargs):
    time.sleep(1000 * (trainer_state.global_step % 2))
    return [0.0] * len(completions)
"""


def config_in(folder: Path, function: str, workers: int = 1) -> Config:
    folder.mkdir(exist_ok=True)
    (folder / "functions.py").write_text(REWARDS)
    (folder / "cfg.yaml").write_text(
        f"{{base_model: none, rl: grpo, output_dir: {folder}/out, datasets: [{{path: none}}], "
        f"trl: {{reward_funcs: [functions.{function}], max_prompt_length: 16, max_completion_length: 16}}, "
        f"rewards: {{workers: {workers}, timeout: {TIMEOUT_S if function.startswith('hangs') else 60}, "
        "reward_failure_budget: 1}}"
    )
    return load_config(folder / "cfg.yaml")


def group(step: int = 0) -> tuple[GroupRequest, list[Episode]]:
    row = Row(np.arange(64, dtype=np.int32), np.zeros(64, np.float32), ((0, 64),))
    return GroupRequest("k", "p", np.ones(16, np.int32), GENERATIONS, Sampling(64), step=step), [
        Episode((row,), "x" * 256)
    ] * GENERATIONS


async def through(scorer: RayScorer) -> float:
    began = time.perf_counter()
    await asyncio.gather(*(scorer.score(*group()) for _ in range(GROUPS)))
    return GROUPS / (time.perf_counter() - began)


def directly(folder: Path) -> float:
    reward = load_reward("functions.busy", folder, "trl.reward_funcs[0]")
    request = ScoreRequest.of(*group())
    began = time.perf_counter()
    for _ in range(GROUPS):
        score_group(reward, request)
    return GROUPS / (time.perf_counter() - began)


async def replacement(scorer: RayScorer) -> tuple[float, float]:
    await scorer.score(*group(step=0))
    deadline = time.perf_counter() + TIMEOUT_S
    (outcome,), _ = await scorer.score(*group(step=1))
    answered = time.perf_counter() - deadline
    assert outcome.outcome == "timeout"
    (outcome,), _ = await scorer.score(*group(step=2))
    assert outcome.outcome == "ok"
    return answered, time.perf_counter() - deadline


async def measure(folder: Path) -> None:
    one, two, hangs = scorers = [
        RayScorer(config_in(folder / "one", "busy")),
        RayScorer(config_in(folder / "two", "busy_in_two", workers=2)),
        RayScorer(config_in(folder / "hangs", "hangs_on_odd_steps")),
    ]
    try:
        for scorer in scorers:
            await scorer.start()
        await through(one), await through(two)
        rounds = [(directly(folder / "one"), await through(one), await through(two)) for _ in range(REPEATS)]
        report("called directly, groups/s", [direct for direct, _, _ in rounds], 1)
        report("1 process, groups/s", [first for _, first, _ in rounds], 1)
        report("2 processes, groups/s", [second for _, _, second in rounds], 1)
        report("2 processes ÷ 1 process", [second / first for _, first, second in rounds], 2)
        times = [await replacement(hangs) for _ in range(REPEATS)]
        report("deadline → answer of the hung group, s", [answer for answer, _ in times], 3)
        report("deadline → first score of the fresh process, s", [score for _, score in times], 3)
    finally:
        await asyncio.gather(*(scorer.close() for scorer in scorers))


def report(name: str, values: list[float], digits: int) -> None:
    low, middle, high = (f"{v:.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
    print(f"  {name:48} {middle:>8}  ({low} to {high})")


def main() -> None:
    print_versions()
    print(f"load average before: {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
    print(f"{GROUPS} groups × {GENERATIONS} completions, {REPEATS} rounds, median (min to max)")
    with tempfile.TemporaryDirectory() as folder:
        runtime = RayRuntime(config_in(Path(folder) / "ray", "busy"))
        runtime.start()
        try:
            asyncio.run(measure(Path(folder)))
        finally:
            runtime.stop()


if __name__ == "__main__":
    main()
