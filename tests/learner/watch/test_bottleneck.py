"""The verdict on a step and the split it suggests, for steps that are made up so that the right answer is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from rlx.learner.watch.bottleneck import StepTimes

AHEAD = StepTimes(step_s=10, max_staleness=1, generation_s=6, reward_s=0.5, workers=2, worker_busy=0.95)
"""Generation beside training, on devices of their own."""


def test_workers_that_cannot_keep_up_are_generation_bound_and_the_missing_ones_are_counted() -> None:
    """2 workers, busy 95 % of 10 s, make what the learner trains in 4 s: 2 × 0.95 × 10 / 4 = 4.75 would keep up."""
    times = replace(AHEAD, rollout_wait_s=6, fwd_bwd_s=4)
    assert times.verdict() == "generation-bound"
    assert times.headline() == "generation-bound: 3 more workers would balance it"
    assert replace(times, rollout_wait_s=4, fwd_bwd_s=6).headline().endswith("bound: 2 more workers would balance it")
    assert replace(times, rollout_wait_s=3, fwd_bwd_s=7).headline().endswith("bound: 1 more worker would balance it")
    assert replace(times, rollout_wait_s=5, fwd_bwd_s=3).suggestion() == "2 more workers would balance it"
    assert replace(times, rollout_wait_s=3.8, worker_busy=1).suggestion() == "2 more workers would balance it"
    assert replace(times, rollout_wait_s=3.5, worker_busy=1).suggestion() == "1 more worker would balance it"
    unknown = replace(times, worker_busy=math.nan)
    assert unknown.headline() == "generation-bound: 3 more workers would balance it"


def test_no_number_is_named_that_is_far_beyond_what_was_measured() -> None:
    far = replace(AHEAD, rollout_wait_s=9.9, fwd_bwd_s=0.1)
    assert far.headline() == "generation-bound: 8 times the workers would not be too many"
    idle = replace(AHEAD, rollout_wait_s=0, fwd_bwd_s=10, workers=1, worker_busy=0.01)
    assert idle.headline() == "learner-bound"


def test_a_slow_learner_is_told_how_many_workers_would_do_or_processes_would_help() -> None:
    times = replace(AHEAD, rollout_wait_s=0.2, fwd_bwd_s=9.6, workers=4, processes=2, worker_busy=0.45)
    assert times.verdict() == "learner-bound"
    assert times.suggestion() == "2 of the 4 workers would do, or 4 learner processes would keep them busy"
    assert replace(times, worker_busy=0.51).suggestion().startswith("2 of the 4 workers")
    assert replace(times, workers=1, worker_busy=0.5).suggestion() == "4 learner processes would keep them busy"
    assert replace(times, worker_busy=math.nan).headline() == "learner-bound"


def test_slow_rewards_leave_the_workers_idle() -> None:
    times = replace(AHEAD, rollout_wait_s=6, fwd_bwd_s=4, reward_s=8, generation_s=2, worker_busy=0.3)
    assert times.headline() == "reward-bound: more rewards.workers, or faster rewards, would balance it"
    assert replace(times, worker_busy=0.95).verdict() == "generation-bound"
    assert replace(times, worker_busy=math.nan).verdict() == "reward-bound"


def test_idle_workers_and_a_waiting_learner_are_held_back_by_the_staleness() -> None:
    times = replace(AHEAD, rollout_wait_s=4, fwd_bwd_s=6, worker_busy=0.5)
    assert times.headline() == "staleness-bound: async.max_staleness: 2 would let the workers go further ahead"


def test_waiting_for_the_publish_before_is_publish_bound_and_a_long_pause_is_told_what_helps() -> None:
    times = replace(
        AHEAD, fwd_bwd_s=5, rollout_wait_s=1, weight_sync_wait_s=4, weight_sync_s=9, weight_sync_transfer_s=8,
        weight_sync_pause_s=1,
    )  # fmt: skip
    assert times.headline() == "publish-bound"
    assert times.line().startswith(
        "publish-bound: learner waited 10% for rollouts and 40% for publishing, workers idle"
    )
    paused = replace(times, weight_sync_transfer_s=1, weight_sync_pause_s=8)
    assert paused.headline() == "publish-bound: async.publish: rolling would let the other workers go on"
    assert replace(paused, workers=1).headline() == "publish-bound"


def test_the_snapshot_is_the_learners_work_where_publishing_runs_beside_it() -> None:
    times = replace(
        AHEAD, fwd_bwd_s=8, weight_sync_wait_s=2, weight_sync_snapshot_s=1.8, weight_sync_s=2, worker_busy=0.3
    )
    assert times.line().startswith("learner-bound: learner waited 0%, workers idle 70%, publish 2.00 s")
    assert replace(times, weight_sync_snapshot_s=0.8).verdict() == "publish-bound"
    in_turn = replace(times, max_staleness=0, fwd_bwd_s=1, weight_sync_wait_s=8, weight_sync_snapshot_s=7)
    assert in_turn.verdict() == "publish-bound"


def test_it_is_balanced_where_neither_side_waits() -> None:
    times = replace(AHEAD, rollout_wait_s=0.6, fwd_bwd_s=9.3)
    assert times.headline() == "balanced"
    assert replace(times, worker_busy=0.7).verdict() == "learner-bound"
    assert replace(times, rollout_wait_s=1.5, fwd_bwd_s=8.5).verdict() == "generation-bound"


@pytest.mark.parametrize(
    ("wait", "train", "publish", "reward_s", "verdict", "gain"),
    [
        (6.0, 3.0, 1.0, 0.5, "generation-bound", "1.7"),
        (6.0, 3.0, 1.0, 9.0, "reward-bound", "1.7"),
        (2.0, 7.0, 1.0, 0.5, "learner-bound", "1.4"),
        (2.0, 2.0, 6.0, 0.5, "publish-bound", "1.7"),
        (2.0, 4.5, 3.5, 0.5, "learner-bound", "2.2"),
        (5.0, 4.5, 0.5, 0.5, "balanced", "2.0"),
        (9.6, 0.2, 0.2, 0.5, "generation-bound", ""),
    ],
)
def test_without_staleness_the_phases_add_up_and_overlap_is_suggested_where_it_gains(
    wait: float, train: float, publish: float, reward_s: float, verdict: str, gain: str
) -> None:
    times = StepTimes(
        step_s=10, rollout_wait_s=wait, fwd_bwd_s=train, weight_sync_wait_s=publish, weight_sync_s=publish,
        generation_s=5, reward_s=reward_s, worker_busy=0.55,
    )  # fmt: skip
    assert times.verdict() == verdict
    overlap = f"async.max_staleness: 1 would overlap them, at most {gain} times as fast"
    assert times.suggestion() == (overlap if gain else "")


@pytest.mark.parametrize("busy", [0.05, 0.5, 0.99, math.nan])
@pytest.mark.parametrize("wait", [0.0, 3.0, 9.9])
@pytest.mark.parametrize("staleness", [0, 1, 4])
def test_a_laptop_with_one_worker_is_never_told_to_get_more(busy: float, wait: float, staleness: int) -> None:
    times = StepTimes(
        step_s=10, rollout_wait_s=wait, fwd_bwd_s=10 - wait, generation_s=5, worker_busy=busy, shares_cpu=1,
        max_staleness=staleness,
    )  # fmt: skip
    assert times.suggestion() == "" or times.suggestion().startswith("async.max_staleness: ")


def test_a_step_of_no_length_and_waits_longer_than_it_are_no_trouble() -> None:
    assert StepTimes().suggestion() == ""
    assert StepTimes().metrics()["rollout/generated_tok_s"] == 0
    odd = replace(AHEAD, step_s=1, rollout_wait_s=2, fwd_bwd_s=0)
    assert odd.line().startswith("generation-bound: learner waited 100%")
    assert odd.suggestion() == "8 times the workers would not be too many"


def test_the_line_has_what_the_verdict_comes_from() -> None:
    times = replace(
        AHEAD, rollout_wait_s=6.2, fwd_bwd_s=3.8, weight_sync_s=0.31, weight_sync_pause_s=0.05, reward_s=0.2,
        in_flight_s=3.14, queue_s=0.42, discarded_tokens=120,
    )  # fmt: skip
    assert times.line() == (
        "generation-bound: learner waited 62%, workers idle 5%, publish 0.31 s (paused 0.05), rewards 0.20 s, "
        "age 3.1 + 0.4 s, 120 tokens discarded; 3 more workers would balance it"
    )
    assert "idle" not in replace(times, worker_busy=math.nan).line()


def test_several_steps_are_their_means_and_the_greatest_staleness() -> None:
    one = StepTimes(step_s=1, fwd_bwd_s=0.5, staleness_mean=0.5, staleness_max=1, generated_tokens=100, worker_busy=0.4)
    two = StepTimes(step_s=3, fwd_bwd_s=1.5, staleness_mean=1.5, staleness_max=3, generated_tokens=300)
    both = StepTimes.mean([one, two])
    assert (both.step_s, both.fwd_bwd_s, both.staleness_mean, both.staleness_max) == (2, 1, 1, 3)
    assert both.worker_busy == 0.4
    assert both.metrics()["rollout/generated_tok_s"] == 100
    assert math.isnan(StepTimes.mean([two, two]).worker_busy)


def test_the_metrics_have_the_names_of_the_other_tools_and_leave_out_what_is_unknown() -> None:
    times = StepTimes(step_s=2, generated_tokens=64, staleness_mean=1, weight_sync_pause_s=0.25)
    metrics = times.metrics()
    assert {"perf/eval_s", "rollout/worker_busy"}.isdisjoint(metrics)
    assert (metrics["perf/step_s"], metrics["rollout/generated_tok_s"], metrics["sample/staleness_mean"]) == (2, 32, 1)
    assert metrics["perf/weight_sync_pause_s"] == 0.25
    more = replace(times, eval_s=1, worker_busy=0.0).metrics()
    assert (more["perf/eval_s"], more["rollout/worker_busy"]) == (1, 0)
    assert all(math.isfinite(value) for value in more.values())
