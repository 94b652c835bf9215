"""`rlx.rewards.math`: which answers count as right."""

import threading

import pytest

from rlx.errors import UserCodeError
from rlx.rewards.math import accuracy


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A busy machine may take longer for a comparison than a user would wait."""
    monkeypatch.setattr("rlx.rewards.math.PARSE_TIMEOUT_S", 60)
    monkeypatch.setattr("rlx.rewards.math.VERIFY_TIMEOUT_S", 60)


@pytest.mark.parametrize(
    ("gold", "completion", "score"),
    [
        ("72", "so it is 72", 1),
        ("72", "#### 72", 1),
        ("72", "71", 0),
        ("72", "", 0),
        ("72", "I do not know", 0),
        ("72", r"First $3$, hence \boxed{72}.", 1),
        ("72", r"72 is tempting, but \boxed{71}", 0),
        ("1,042", "1042", 1),
        ("He has 2 * 36 = 72 of them.\n#### 72", "72", 1),
        ("He has 2 * 36 = 72 of them.\n#### 72", "36", 0),
        ("Half of it.\n#### \\frac{1}{2} x", r"\boxed{x/2}", 1),
        ("1/2", r"\boxed{\frac{1}{2}}", 1),
        ("0.5", r"$\frac{1}{2}$", 1),
        (r"\frac{1}{2} x", r"\boxed{x/2}", 1),
        (r"\frac{1}{2} x", r"\boxed{1/2}", 0),
        (r"$2\sqrt{3}+1$", r"\boxed{1+2\sqrt{3}}", 1),
        (r"2\sqrt{3}+1", r"\boxed{2\sqrt{3}}", 0),
        (r"Thus the area is \boxed{12}.", "12", 1),
        ("(1, 2)", r"\boxed{(1,2)}", 1),
        ("(1, 2)", r"\boxed{(2,1)}", 0),
        ("A", r"\boxed{A}", 1),
        ("A", r"\boxed{B}", 0),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", 1),
        (r"\text{Evelyn}", r"\boxed{\text{Angela}}", 0),
        (72, "72", 1),
        (0.5, "1/2", 1),
        (-3, "-3", 1),
        ("72", "<think>it is 72</think> 71", 0),
        ("72", "<think>it is 71</think> 72", 1),
        ("72", "<think>it is 72", 0),
        ("no number at all", "72", None),
        ("", "72", None),
    ],
)
def test_an_answer_is_right_when_it_equals_the_gold_one(gold, completion, score):
    assert accuracy([completion], answer=[gold]) == [score]
    assert accuracy([[{"role": "assistant", "content": completion}]], answer=[gold]) == [score]


@pytest.mark.parametrize("column", ["answer", "solution", "ground_truth"])
def test_the_gold_answer_is_taken_from_any_of_three_columns(column):
    assert accuracy(["4", "5"], **{column: ["4", "4"]}, level=[1, 1]) == [1, 0]


def test_without_a_gold_column_the_user_is_told_its_names():
    with pytest.raises(UserCodeError, match="`answer`, `solution` or `ground_truth`"):
        accuracy(["4"], result=["4"])


def test_it_works_outside_the_main_thread():
    scores: list[float | None] = []
    thread = threading.Thread(target=lambda: scores.extend(accuracy(["4", r"\boxed{5}"], answer=["4", "4"])))
    thread.start()
    thread.join(timeout=60)
    assert scores == [1, 0]


def test_a_comparison_without_end_is_given_up_in_the_main_thread(monkeypatch):
    for seconds in (2, 10, 60):  # more, where a busy machine takes as long for the second one
        monkeypatch.setattr("rlx.rewards.math.VERIFY_TIMEOUT_S", seconds)
        endless, other = accuracy([r"\boxed{9^{9^{9^{9}}}}", "5"], answer=["5", "5"])
        assert endless == 0
        if other:
            break
    assert other == 1


def test_what_was_read_as_the_answer_is_logged():
    logged = {}
    accuracy([r"\boxed{7}", "nothing"], answer=["7", "7"], log_extra=logged.__setitem__)
    assert logged == {"parsed_answer": ["7", None]}
