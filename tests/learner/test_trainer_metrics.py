"""What a run writes down and prints, in numbers; and steps in which little or nothing can be trained."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from fake_service import ScriptedWorker, config_for, length_reward, lines, place, serve, write_run
from PIL import Image
from transformers import TrainingArguments

from rlx.config import Config
from rlx.episode import Episode
from rlx.errors import ConfigError
from rlx.learner.arguments import check_optimizer, training_arguments
from rlx.learner.main import train
from rlx.wire import GroupRequest

pytestmark = pytest.mark.slow

Rewards = tuple[dict[str, list[float]], dict[str, float]]


def test_metrics_samples_and_evaluations_are_what_the_rollouts_were(tmp_path: Path, capsys) -> None:
    trl = {"log_completions": True, "num_completions_to_print": 1}
    path = write_run(tmp_path, max_steps=2, samples_per_step=100, trl=trl)
    with serve(worker=ScriptedWorker(slow=0.2)) as served:
        train(config_for(path, served), 1)
    out = tmp_path / "out"
    metrics, samples, evals = (lines(out / f"{name}.jsonl") for name in ("metrics", "samples", "evals"))
    assert [r["step"] for r in metrics] == [1, 2]
    for record in metrics:
        of_step = [s for s in samples if s["step"] == record["step"]]
        lengths = np.array([len(s["rows"][0]["ids"]) for s in of_step])
        rewards = np.array([s["rewards"]["rewards.length"] for s in of_step])
        assert len(of_step) == 8
        assert rewards == pytest.approx(lengths / 10)
        assert record["reward"] == record["rewards/length/mean"] == pytest.approx(rewards.mean())
        assert record["reward_std"] == pytest.approx(rewards.std(ddof=1), rel=1e-5)
        assert record["completions/mean_length"] == pytest.approx(lengths.mean())
        assert record["completions/max_length"] == lengths.max()
        assert record["completions/clipped_ratio"] == record["frac_reward_none"] == 0
        groups = rewards.reshape(2, 4)
        expected = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
        assert [s["advantage"] for s in of_step] == pytest.approx(expected.flatten(), abs=1e-4)
        gap = record["sampling/sampling_logp_difference/mean"]
        assert 0 < gap < record["sampling/sampling_logp_difference/max"]
        assert {tuple(map(tuple, s["rows"][0]["versions"])) for s in of_step} == {
            ((record["step"], n),) for n in lengths
        }
        parts = [record[f"perf/{name}_s"] for name in ("rollout_wait", "fwd_bwd", "weight_sync_wait")]
        assert all(part > 0 for part in parts)
        assert sum(parts) <= record["perf/step_s"]
        assert record["perf/weight_sync_pause_s"] <= record["perf/weight_sync_s"]
    assert [s["completion"] for s in samples] == [
        bytes(i for i in s["rows"][0]["ids"] if i < 256).decode() for s in samples
    ]
    assert [(e["step"], e["weight_version"], e["num_prompts"]) for e in evals] == [(0, 1, 3), (2, 3, 3)]
    for record in evals:
        values = [s["rewards"]["rewards.length"] for s in record["samples"]]
        assert record["reward"] == record["rewards"]["length"] == pytest.approx(np.mean(values))
        assert record["mean_length"] == pytest.approx(10 * np.mean(values))

    printed = capsys.readouterr().out
    for record in metrics:
        first = next(s for s in samples if s["step"] == record["step"])
        assert (
            f"{first['prompt']!r} → {first['completion']!r}   rewards.length {first['rewards']['rewards.length']:.3g}"
            in printed
        )
        assert (
            f"step {record['step']}/2  reward {record['reward']:.3f}  len {record['completions/mean_length']:.1f}"
            in printed
        )
    assert f"length {evals[0]['reward']:.3f}" in printed
    with Image.open(out / "learning_curve.png") as image:
        image.verify()
        assert image.format == "PNG"


def test_none_rewards_touch_neither_the_baseline_nor_the_json(tmp_path: Path) -> None:
    """The first completion of each group has no `hard` reward, and the first group logs a metric that others do not."""

    def score(request: GroupRequest, episodes: list[Episode]) -> Rewards:
        easy = [float(i) for i in range(len(episodes))]
        return {"a.easy": easy, "a.hard": [math.nan, *easy[1:]]}, {"tries": 2.0} if place(request.key) == "1" else {}

    path = write_run(tmp_path, max_steps=1, trl={"reward_funcs": ["a.easy", "a.hard"], "reward_weights": [1, 0.5]})
    with serve(score) as served:
        train(config_for(path, served), 1)
    [record] = lines(tmp_path / "out" / "metrics.jsonl")
    rewards = np.array([0, 1.5, 3, 4.5])
    assert record["reward"] == pytest.approx(rewards.mean())
    assert (record["rewards/easy/mean"], record["rewards/hard/mean"]) == (1.5, 2.0)
    assert (record["tries"], record["frac_reward_none"]) == (2.0, 0.0)
    samples = lines(tmp_path / "out" / "samples.jsonl")
    assert [s["rewards"]["a.hard"] for s in samples] == [None, 1, 2, 3] * 2
    expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
    assert [s["advantage"] for s in samples] == pytest.approx([*expected, *expected], rel=1e-4)
    first, last = lines(tmp_path / "out" / "evals.jsonl")
    assert first["rewards"] == last["rewards"] == {"easy": 0.0, "hard": None}
    assert first["reward"] == 0.0


def test_a_completion_without_any_reward_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    def score(request: GroupRequest, episodes: list[Episode]) -> Rewards:
        return {"a.r": [math.nan, *map(float, range(len(episodes) - 1))]}, {}

    path = write_run(tmp_path, max_steps=1, test_datasets=None)
    with serve(score) as served:
        train(config_for(path, served), 1)
    samples = lines(tmp_path / "out" / "samples.jsonl")
    scale = 1 / (1 + 1e-4)
    assert [s["advantage"] for s in samples] == pytest.approx([0, -scale, 0, scale] * 2, abs=1e-5)
    [record] = lines(tmp_path / "out" / "metrics.jsonl")
    assert (record["frac_reward_none"], record["reward"]) == (0.25, 1.0)


def test_a_step_without_any_reward_trains_nothing_and_says_so(tmp_path: Path, capsys) -> None:
    def score(request: GroupRequest, episodes: list[Episode]) -> Rewards:
        if request.step == 0 or place(request.key).startswith("eval"):
            return {"rewards.length": [math.nan] * len(episodes)}, {}
        return length_reward(request, episodes)

    path = write_run(tmp_path, max_steps=2, logging_steps=1)
    with serve(score) as served, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        train(config_for(path, served), 1)
        published = served.worker.manifests
    assert published[1].fingerprint == published[2].fingerprint != published[3].fingerprint
    first, second = lines(tmp_path / "out" / "metrics.jsonl")
    assert (first["reward"], first["reward_std"], first["frac_reward_none"]) == (None, None, 1.0)
    assert (first["loss"], first["grad_norm"]) == (0, 0)
    assert second["reward"] > 0
    assert second["grad_norm"] > 0
    assert [(e["reward"], e["rewards"]) for e in lines(tmp_path / "out" / "evals.jsonl")] == [
        (None, {"length": None})
    ] * 2
    assert "step 1/2  reward none, nothing to learn from  len" in capsys.readouterr().out


def test_a_log_over_several_steps_is_the_mean_of_those_that_had_rewards(tmp_path: Path) -> None:
    def score(request: GroupRequest, episodes: list[Episode]) -> Rewards:
        return {"a.r": [math.nan if request.step == 0 else float(request.step)] * len(episodes)}, {}

    path = write_run(tmp_path, max_steps=3, logging_steps=3, test_datasets=None)
    with serve(score) as served:
        train(config_for(path, served), 1)
    [record] = lines(tmp_path / "out" / "metrics.jsonl")
    assert (record["step"], record["reward"], record["frac_reward_none"]) == (3, 1.5, pytest.approx(1 / 3))


@pytest.mark.parametrize("masked", [True, False])
def test_a_step_of_truncated_completions_trains_only_when_they_are_not_masked(tmp_path: Path, masked: bool) -> None:
    path = write_run(tmp_path, max_steps=1, test_datasets=None, trl={"mask_truncated_completions": masked})
    with serve(finish_reason="length") as served:
        train(config_for(path, served), 1)
        published = served.worker.manifests
    assert (published[1].fingerprint == published[2].fingerprint) is masked
    [record] = lines(tmp_path / "out" / "metrics.jsonl")
    assert record["completions/clipped_ratio"] == 1
    assert (record["loss"] == record["grad_norm"] == 0) is masked
    assert ("entropy" in record) is not masked


def test_epochs_are_counted_in_steps_with_fractions(tmp_path: Path) -> None:
    """10 prompts, 2 a step: 5 steps an epoch; 1.5 epochs are 8 steps."""
    path = write_run(tmp_path, max_steps=None, num_epochs=1.5, saves_per_epoch=2, test_datasets=None)
    with serve() as served:
        train(config_for(path, served), 1)
        asked = [ids for _, ids in served.generated()]
    metrics = lines(tmp_path / "out" / "metrics.jsonl")
    assert [r["epoch"] for r in metrics] == pytest.approx([0.2 * n for n in range(1, 9)])
    assert len(asked) == 16
    assert len(set(asked)) == 10
    assert sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 4, 6, 8)]


@pytest.mark.parametrize(
    ("keys", "save_strategy", "save_steps"),
    [
        ({}, "steps", 10),
        ({"save_strategy": "epoch"}, "steps", 10),
        ({"saves_per_epoch": 4}, "steps", 2),
        ({"saves_per_epoch": 40}, "steps", 1),
        ({"save_steps": 7}, "steps", 7),
        ({"save_strategy": "no"}, "no", None),
    ],
)
def test_checkpoints_are_counted_in_steps(keys: dict, save_strategy: str, save_steps: int | None) -> None:
    arguments = arguments_for(keys, total_steps=30, steps_per_epoch=10)
    assert arguments.save_strategy.value == save_strategy
    assert save_steps is None or arguments.save_steps == save_steps


def test_warm_up_is_a_number_of_steps_or_a_share_of_all() -> None:
    assert arguments_for({"warmup_ratio": 0.1}, 30, 10).warmup_steps == 3
    assert arguments_for({"warmup_steps": 5}, 30, 10).warmup_steps == 5
    assert arguments_for({}, 30, 10).warmup_steps == 0
    with pytest.raises(ValueError, match="warmup_steps and warmup_ratio are both given; keep one"):
        arguments_for({"warmup_ratio": 0.1, "warmup_steps": 5}, 30, 10)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"optimizer": "muon"}, r"optimizer: muon cannot be used: muon is not a valid OptimizerNames, please select"),
        ({"optimizer": "galore_adamw"}, r"optimizer: galore_adamw cannot be used: You need to install `galore_torch`"),
        ({"lr_scheduler": "cosin"}, r"lr_scheduler: cosin cannot be used: .*'cosine'"),
        ({"lr_scheduler": "cosine_with_min_lr"}, r"lr_scheduler: cosine_with_min_lr cannot be used: One of min_lr"),
        ({"lr_scheduler_kwargs": {"floor": 1}}, r"lr_scheduler: cosine cannot be used: .*argument 'floor'"),
    ],
)
def test_an_optimizer_or_schedule_that_cannot_be_made_is_told_before_anything_is_loaded(
    keys: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_optimizer(config_with(keys))


def test_the_usual_optimizers_and_schedules_can_be_made() -> None:
    for keys in (
        {},
        {"optimizer": "adafactor", "lr_scheduler": "constant_with_warmup"},
        {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-7}},
    ):
        check_optimizer(config_with(keys))


def config_with(keys: dict) -> Config:
    trl = {"reward_funcs": ["r"], "num_generations": 4}
    data = {"base_model": "m", "rl": "grpo", "datasets": [{"path": "d"}], "micro_batch_size": 2, "trl": trl, **keys}
    return Config.model_validate(data)


def arguments_for(keys: dict, total_steps: int, steps_per_epoch: int) -> TrainingArguments:
    return training_arguments(config_with(keys), total_steps, steps_per_epoch, 60)
