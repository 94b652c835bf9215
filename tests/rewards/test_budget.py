"""`rlx.rewards.budget`: when failures stop the run, and what is said then."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlx.errors import UserCodeError
from rlx.rewards.budget import ALL_FAILED, FailureBudget


def stops(budget: FailureBudget) -> bool:
    try:
        budget.check("f")
    except UserCodeError:
        return True
    return False


def test_more_failures_than_the_share_of_the_window_stop_the_run():
    budget = FailureBudget(0.1, 200)
    budget.record(180, 20, "cause")
    assert not stops(budget)
    budget.record(0, 1, "cause")
    assert stops(budget)


def test_the_share_is_of_the_whole_window_also_when_it_is_not_full():
    budget = FailureBudget(0.1, 200)
    budget.record(1, 20, "cause")
    assert not stops(budget)
    budget.record(1, 1, "cause")
    assert stops(budget)


def test_old_failures_are_forgotten():
    budget = FailureBudget(0.1, 200)
    budget.record(1, 20, "cause")
    budget.record(200, 0)
    budget.record(0, 20, "cause")
    assert not stops(budget)


def test_sixteen_failures_without_a_success_stop_the_run():
    budget = FailureBudget(0.1, 200)
    budget.record(0, ALL_FAILED - 1, "cause")
    assert not stops(budget)
    budget.record(0, 1, "cause")
    with pytest.raises(UserCodeError, match=r"16 of the last 16 samples \(16 failed\); not one has succeeded\."):
        budget.check("f")


def test_a_share_of_nothing_stops_at_the_first_failure_and_a_share_of_all_never():
    none, all_of_them = FailureBudget(0), FailureBudget(1)
    none.record(100, 0)
    assert not stops(none)
    none.record(3, 1, "cause")
    all_of_them.record(0, 1000, "cause")
    assert stops(none)
    assert not stops(all_of_them)


def test_the_message_has_the_counts_by_kind_the_key_and_the_first_cause():
    budget = FailureBudget(0.1, 20, key="rewards.reward_failure_budget", items="completions")
    budget.record(4, 0)
    budget.record(0, 1, "first traceback", "exception")
    budget.record(1, 2, "second traceback", "timeout")
    assert budget.counts == {"timeout": 2, "exception": 1}
    with pytest.raises(UserCodeError) as caught:
        budget.check("trl.reward_funcs[0] (f)")
    assert str(caught.value) == (
        "trl.reward_funcs[0] (f) failed for 3 of the last 8 completions (2 timeout, 1 exception); "
        "rewards.reward_failure_budget = 0.1 allows 2 of 20. The first failure:\n"
        "first traceback"
    )


def test_the_run_after_one_that_was_stopped_counts_anew():
    budget = FailureBudget(0.1, 20)
    budget.record(1, 3, "first")
    assert stops(budget)
    budget.record(1, 2, "second")
    assert not stops(budget)
    assert (budget.first_cause, budget.counts.total()) == ("second", 2)


@given(groups=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=60), percent=st.integers(0, 99))
def test_it_stops_exactly_when_the_last_window_says_so(groups, percent):
    budget, seen = FailureBudget(percent / 100, 20), []
    for ok, failed in groups:
        budget.record(ok, failed, "cause")
        seen += [True] * ok + [False] * failed
        too_many = seen[-20:].count(False) * 100 > percent * 20
        stopped = stops(budget)
        assert stopped == (too_many or (len(seen) >= ALL_FAILED and not any(seen)))
        seen = [] if stopped else seen
