"""Which of several failed learner processes is the cause."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from rlx.learner.launch import first_cause


@dataclass
class Failed:
    exitcode: int
    timestamp: int


@pytest.mark.parametrize(
    ("failures", "cause"),
    [
        ([Failed(1, 100), Failed(-9, 100)], -9),  # rank 1 was killed, rank 0 lost its connection to it
        ([Failed(1, 100), Failed(-9, 101)], -9),  # seen a second later
        ([Failed(1, 100), Failed(-15, 100)], 1),  # rank 0 failed, the agent ended rank 1
        ([Failed(-15, 100), Failed(3, 100)], -15),
        ([Failed(2, 100), Failed(-9, 130)], 2),  # rank 1 hung, and the agent killed it after its grace
    ],
)
def test_the_process_that_was_killed_is_the_cause_of_those_that_fail_with_it(failures, cause):
    assert first_cause(failures).exitcode == cause
