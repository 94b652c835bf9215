"""How far a worker's log-probabilities are from the learner's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlx.errors import ParityError
from rlx.rollout import parity
from rlx.rollout.manifest import Probe

LIKELY, UNLIKELY = math.log(0.5), math.log(0.001)


def probe(*logprobs):
    return Probe(tuple(tuple(range(len(row) + 1)) for row in logprobs), logprobs)


def rows(*logprobs):
    return [np.array(row, np.float32) for row in logprobs]


def test_the_distance_is_the_mean_over_all_tokens_of_all_sequences():
    off = parity.distance(probe((LIKELY, LIKELY), (LIKELY,)), rows((LIKELY + 0.3, LIKELY), (LIKELY - 0.6,)))
    assert off == pytest.approx(0.3, abs=1e-6)


def test_tokens_that_the_learner_finds_unlikely_do_not_count_unless_there_are_no_others():
    assert parity.distance(probe((LIKELY, UNLIKELY)), rows((LIKELY, UNLIKELY - 5))) == pytest.approx(0, abs=1e-6)
    assert parity.distance(probe((UNLIKELY,)), rows((UNLIKELY - 5,))) == pytest.approx(5, abs=1e-5)


def test_the_learner_decides_which_tokens_are_unlikely():
    assert parity.distance(probe((LIKELY,)), rows((UNLIKELY,))) == pytest.approx(LIKELY - UNLIKELY, abs=1e-5)


@pytest.mark.parametrize(
    "found", [rows((math.nan, LIKELY)), rows((-math.inf, LIKELY)), rows((LIKELY,)), rows((LIKELY,) * 3), []]
)
def test_a_worker_that_gives_no_number_for_a_token_is_infinitely_far(found):
    off = parity.distance(probe((LIKELY, LIKELY)), found)
    assert off == math.inf
    with pytest.raises(ParityError, match="inf nats"):
        parity.check("w", 1, off, 100.0)


def test_the_message_names_the_worker_how_far_the_threshold_and_usual_causes():
    parity.check("w-3", 7, 0.1, 0.1)
    with pytest.raises(ParityError) as caught:
        parity.check("w-3", 7, 0.2345678, 0.1)
    for part in (
        "w-3",
        "weights 7",
        "0.2346 nats",
        "async.parity_threshold is 0.1",
        "base_model",
        "dtype",
        "tied",
        "missed",
    ):
        assert part in str(caught.value)
