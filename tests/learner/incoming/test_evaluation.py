"""An evaluation: its numbers, that all its tokens are of one version, and that it waits no longer than it may."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from fake_service import write_run

from rlx.config import Config, load_config
from rlx.episode import Episode, Row
from rlx.errors import DeadlineExceeded, ServiceError, ServiceUnavailable
from rlx.learner.incoming.data import Prompt
from rlx.learner.incoming.evaluation import Evaluator, pass_at_k
from rlx.wire import GroupRequest, GroupResult, RewardOutcome

NAN = math.nan
PROMPTS = [Prompt(f"p{i}", np.array([i], np.int32), {"answer": str(i)}) for i in range(3)]


class FakeClient:
    """Groups arrive when the test sends them."""

    def __init__(self) -> None:
        self.requests: list[GroupRequest] = []
        self.futures: list[Future[GroupResult]] = []
        self.cancelled: list[str] = []

    def submit(self, request: GroupRequest) -> Future[GroupResult]:
        self.requests.append(request)
        self.futures.append(Future())
        return self.futures[-1]

    def cancel(self, keys: Sequence[str]) -> None:
        self.cancelled += keys

    def send(self, index: int, rewards: dict[str, list[float]], version: int = 7) -> None:
        request = self.requests[index]
        episodes = tuple(episode(length + 1, version) for length in range(request.num_generations))
        outcomes = tuple(RewardOutcome(name, np.array(v, np.float32), 0.1) for name, v in rewards.items())
        self.futures[index].set_result(GroupResult(request.key, episodes, outcomes, "worker-1", 0.1, 0.1))


def episode(length: int, version: int) -> Episode:
    ids, logprobs = np.zeros(length + 1, np.int32), np.zeros(length + 1, np.float32)
    return Episode((Row(ids, logprobs, ((version, length), (-1, 1))),), f"text {length}")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    trl = {"num_generations_eval": 4, "reward_funcs": ["m.easy", "m.hard"], "reward_weights": [1.0, 0.5]}
    return load_config(write_run(tmp_path, eval_success_reward=1.5, trl=trl), {})


def started(config: Config, step: int = 2) -> tuple[FakeClient, Evaluator]:
    client = FakeClient()
    evaluator = Evaluator(config, client, PROMPTS, "5e55")
    evaluator.start(step, 7)
    return client, evaluator


def test_it_asks_for_every_held_out_prompt_and_sums_up_what_came(config: Config) -> None:
    client, evaluator = started(config)
    assert [r.key for r in client.requests] == ["5e55/eval2/0", "5e55/eval2/1", "5e55/eval2/2"]
    assert [(r.num_generations, r.prompt, r.step) for r in client.requests] == [(4, f"p{i}", 2) for i in range(3)]
    client.send(2, {"m.easy": [1, 1, 1, NAN], "m.hard": [0, 0, NAN, NAN]})
    client.send(0, {"m.easy": [1, 1, 0, 0], "m.hard": [1, 0, 1, 0]})
    client.send(1, {"m.easy": [0, 0, 0, 0], "m.hard": [0, 0, 0, NAN]})
    result = evaluator.result(5)
    assert (result.step, result.weight_version, result.num_prompts, result.num_generations) == (2, 7, 3, 4)
    assert result.rewards == pytest.approx({"easy": 5 / 11, "hard": 2 / 9})
    assert result.reward == pytest.approx((1.5 + 1 + 0.5 + 0 + 0 + 1 + 1 + 1) / 11)
    assert result.num_unscored == 1
    assert result.mean_length == 2.5
    # Solved from 1.5 on: 1 of 4, 0 of 4, 0 of 3; the last prompt has too few for k = 4.
    assert result.pass_at_k == pytest.approx({"1": 0.25 / 3, "2": 0.5 / 3, "4": 0.5})
    assert result.samples[1] == {
        "prompt": "p1", "completion": "text 1", "status": "ok", "rewards": {"m.easy": 0.0, "m.hard": 0.0},
    }  # fmt: skip
    assert [s["prompt"] for s in result.samples] == ["p0", "p1", "p2"]
    assert 0 <= result.seconds < 60
    assert client.cancelled == []


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 2), (8, 3, 4), (8, 8, 8), (5, 0, 4), (6, 4, 4), (8, 1, 8)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_that_hold_a_solved_one(n: int, c: int, k: int) -> None:
    rewards = np.array([[1.0] * c + [0.0] * (n - c)])
    choices = list(itertools.combinations(rewards[0], k))
    assert pass_at_k(rewards, 1.0)[str(k)] == pytest.approx(sum(map(any, choices)) / len(choices))


def test_k_doubles_up_to_the_completions_there_are() -> None:
    for n, expected in ((1, "1"), (3, "1 2"), (4, "1 2 4"), (7, "1 2 4"), (9, "1 2 4 8")):
        assert list(pass_at_k(np.zeros((2, n)), 1.0)) == expected.split()


def test_completions_without_a_reward_are_neither_solved_nor_failed() -> None:
    rewards = np.array([[1, NAN, 0, NAN], [NAN, NAN, NAN, 1], [NAN] * 4], np.float32)
    assert pass_at_k(rewards, 1.0)["1"] == pytest.approx((0.5 + 1) / 2)
    assert pass_at_k(rewards, 1.0)["2"] == 1.0
    assert math.isnan(pass_at_k(rewards, 1.0)["4"])


def test_a_sum_of_weighted_rewards_is_not_failed_by_rounding() -> None:
    almost = np.array([[np.float32(1) - np.float32(1e-7)]])
    assert pass_at_k(almost, 1.0) == {"1": 1.0}
    assert pass_at_k(almost - 1e-4, 1.0) == {"1": 0.0}


def test_tokens_of_another_version_are_an_error_that_names_the_worker(config: Config) -> None:
    client, evaluator = started(config)
    for index, version in enumerate((7, 8, 7)):
        client.send(index, {"m.easy": [0] * 4, "m.hard": [0] * 4}, version)
    with pytest.raises(
        ServiceError, match=r"worker-1 sampled 5e55/eval2/1 .* \(8,\), but the evaluation is of version 7"
    ):
        evaluator.result(5)


def test_what_does_not_come_in_time_is_named_and_taken_back(config: Config) -> None:
    client, evaluator = started(config)
    client.send(0, {"m.easy": [0] * 4, "m.hard": [0] * 4})
    with pytest.raises(DeadlineExceeded, match=r"step 2: .* 2 of 3 groups within 0.01 s, .* 5e55/eval2/1"):
        evaluator.result(0.01)
    assert client.cancelled == ["5e55/eval2/1", "5e55/eval2/2"]


def test_a_group_that_fails_ends_it_at_once_and_it_can_be_started_anew(config: Config) -> None:
    client, evaluator = started(config)
    client.futures[1].set_exception(ServiceUnavailable("the service went away"))
    began = time.monotonic()
    with pytest.raises(ServiceUnavailable, match="went away"):
        evaluator.result(60)
    assert time.monotonic() - began < 30
    assert client.cancelled == ["5e55/eval2/0", "5e55/eval2/2"]
    evaluator.start(2, 8)
    assert [r.key for r in client.requests[3:]] == ["5e55/eval2/0.1", "5e55/eval2/1.1", "5e55/eval2/2.1"]
    assert [r.seed for r in client.requests[3:]] == [r.seed for r in client.requests[:3]]
    for index in (3, 4, 5):
        client.send(index, {"m.easy": [1] * 4, "m.hard": [1] * 4}, 8)
    assert evaluator.result(5).pass_at_k == {"1": 1, "2": 1, "4": 1}
    evaluator.start(4, 9)
    assert client.requests[-1].key == "5e55/eval4/2"


def test_cancelling_takes_back_what_is_not_here(config: Config) -> None:
    client, evaluator = started(config)
    client.send(1, {"m.easy": [0] * 4, "m.hard": [0] * 4})
    evaluator.cancel()
    assert client.cancelled == ["5e55/eval2/0", "5e55/eval2/2"]


def test_without_held_out_prompts_nothing_runs(config: Config) -> None:
    client = FakeClient()
    evaluator = Evaluator(config, client, [], "5e55")
    evaluator.start(0, 1)
    assert client.requests == []
