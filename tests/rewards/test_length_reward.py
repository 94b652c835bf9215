"""`rlx.rewards.length`: rewards of the number of tokens alone."""

from pathlib import Path

import pytest

from rlx.rewards.length import brevity, overlong_penalty, soft_overlong
from rlx.rewards.scoring import ScoreRequest, load_reward, score_group


@pytest.mark.parametrize(
    ("num_tokens", "penalty"),
    [(0, 0), (16383, 0), (16384, 0), (17408, -0.25), (18432, -0.5), (20480, -1), (20481, -1), (40000, -1)],
)
def test_the_overlong_penalty_is_that_of_the_dapo_paper(num_tokens, penalty):
    assert overlong_penalty(num_tokens, max_tokens=20480, cache_tokens=4096) == penalty
    assert soft_overlong([[1] * num_tokens], max_completion_length=20480) == [penalty]


def test_brevity_falls_linearly_with_the_length():
    assert brevity([[], [1], [1] * 2, [1] * 4, [1] * 5], max_completion_length=4) == [1, 0.75, 0.5, 0, 0]


def test_the_limit_reaches_the_functions_through_the_contract():
    request = ScoreRequest("p", ["a", "b"], [[1] * 10, [1] * 9], max_completion_length=10)
    reward = load_reward("rlx.rewards.length", Path("."), "trl.reward_funcs[0]")
    assert score_group(reward, request).tolist() == [-1, -0.5]
