"""Does it learn? Three tasks whose best answer is known, five seeds each, and the mistakes that must keep it from
learning: the sign of the advantage, the mask off by one, the log-probabilities off by one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fake_service import Score, config_for, lines, serve
from policy_service import WORDS, PolicyWorker, make_word_model
from quickstart_model import QUICKSTART, make_quickstart
from transformers import AutoModelForCausalLM

from rlx.episode import Episode
from rlx.learner.incoming import stream
from rlx.learner.main import train
from rlx.learner.microbatches import batching
from rlx.wire import GroupRequest, Sampling

pytestmark = pytest.mark.slow

SEEDS = range(5)
PAYS = dict(zip("abcdefghij", (0.1, 0.5, 0.2, 1.0, 0.0, 0.3, 0.6, 0.4, 0.1, 0.2), strict=True))
BEST = "d"
TARGET, LONGEST = 3, 10

Rewards = tuple[dict[str, list[float]], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Task:
    """`prepare(folder, seed)` makes model and data there; `measure(folder)` says how good the trained model is."""

    prepare: Callable[[Path, int], None]
    score: Score
    settings: dict[str, Any]
    measure: Callable[[Path], float]
    threshold: float


def words(folder: Path, seed: int) -> None:
    make_word_model(folder / "model", seed)
    (folder / "data.jsonl").write_text("".join(json.dumps({"prompt": "go"}) + "\n" for _ in range(8)))


def quickstart(folder: Path, seed: int) -> None:
    out = make_quickstart()
    shutil.copytree(out / "model", folder / "model")
    shutil.copy(out / "data" / "train.jsonl", folder / "data.jsonl")
    shutil.copy(QUICKSTART / "rewards.py", folder / "rewards.py")


def of_word(request: GroupRequest, episodes: list[Episode]) -> Rewards:
    """A bandit: what the one word pays."""
    return {"rewards.paid": [PAYS.get(e.text, 0.0) for e in episodes]}, {}


def of_length(request: GroupRequest, episodes: list[Episode]) -> Rewards:
    """1 for TARGET tokens with the end, less the farther from it."""
    return {"rewards.paid": [_closeness(e.num_sampled) for e in episodes]}, {}


def of_sum(request: GroupRequest, episodes: list[Episode]) -> Rewards:
    return {"rewards.paid": [float(e.text == request.columns["answer"]) for e in episodes]}, {}


def _closeness(length: int) -> float:
    return 1 - abs(length - TARGET) / TARGET


def chance_of_the_best_arm(folder: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
    with torch.no_grad():
        logits_V = model(torch.tensor([[WORDS.index("go")]])).logits[0, -1]
    return float(logits_V.softmax(-1)[WORDS.index(BEST)])


def closeness_to_the_length(folder: Path) -> float:
    worker = PolicyWorker(folder / "out", 1234)
    completions = worker.sample(np.array([WORDS.index("go")], np.int32), 512, Sampling(LONGEST))
    return float(np.mean([_closeness(c.ids.size) for c in completions]))


def share_solved(folder: Path) -> float:
    """Of the 640 completions of the last five steps."""
    return float(np.mean([line["reward"] for line in lines(folder / "out" / "metrics.jsonl")][-5:]))


TASKS = {
    "bandit": Task(words, of_word, {"max_steps": 25, "trl": {"max_completion_length": 1}}, chance_of_the_best_arm, 0.9),
    "length": Task(
        words, of_length, {"max_steps": 40, "trl": {"max_completion_length": LONGEST}}, closeness_to_the_length, 0.55
    ),  # of 22 other streams of samples the worst ended at 0.74; the best mistake ends at 0.34
    # the model that is trained solves 44 %
    "arithmetic": Task(
        quickstart,
        of_sum,
        {
            "max_steps": 20,
            "trl": {"max_completion_length": 8, "num_generations": 8},
            "micro_batch_size": 128,
            "learning_rate": 3e-4,
            "datasets": [{"path": "data.jsonl", "type": "rewards.to_prompt"}],
        },
        share_solved,
        0.75,
    ),
}
NAMES = ["bandit", "length", "arithmetic"]


def learned(task: Task, seed: int, folder: Path) -> float:
    task.prepare(folder, seed)
    settings = {
        "base_model": "model",
        "rl": "grpo",
        "datasets": [{"path": "data.jsonl"}],
        "vllm": {"dtype": "float32"},
        "async": {"max_staleness": 0},  # at these learning rates a sample of the step before is of another policy
        "micro_batch_size": 64,
        "learning_rate": 1e-2,
        "lr_scheduler": "constant",
        "seed": seed,
        "save_strategy": "no",
        "output_dir": str(folder / "out"),
    } | task.settings
    settings["trl"] = {"num_generations": 16, "reward_funcs": ["rewards.paid"]} | task.settings["trl"]
    (folder / "cfg.yaml").write_text(yaml.safe_dump(settings))
    with serve(task.score, worker=PolicyWorker(folder / "model", seed)) as served:
        train(config_for(folder / "cfg.yaml", served), 1)
    return task.measure(folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", SEEDS)
def test_it_learns_from_every_seed(name, seed, tmp_path):
    assert learned(TASKS[name], seed, tmp_path) >= TASKS[name].threshold


def flip_the_advantage(monkeypatch: pytest.MonkeyPatch) -> None:
    right = stream.group_advantages

    def wrong(*arguments: Any) -> Any:
        made = right(*arguments)
        return dataclasses.replace(made, advantages=-made.advantages)

    monkeypatch.setattr(stream, "group_advantages", wrong)


def shift_the_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token is scored as its neighbour in the micro-batch."""
    right = stream.collate

    def wrong(*arguments: Any) -> Any:
        made = right(*arguments)
        return dataclasses.replace(made, target_ids_T=made.target_ids_T.roll(1))

    monkeypatch.setattr(stream, "collate", wrong)


def shift_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask begins one token late. (One that ends a token early keeps none but the bandit from learning.)"""
    right = batching.Sample.trained.func
    monkeypatch.setattr(batching.Sample, "trained", property(lambda sample: right(sample)[1:]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mistake", [flip_the_advantage, shift_the_mask, shift_the_logprobs])
def test_a_mistake_keeps_it_from_learning(name, mistake, tmp_path, monkeypatch):
    mistake(monkeypatch)
    assert learned(TASKS[name], 0, tmp_path) < TASKS[name].threshold
