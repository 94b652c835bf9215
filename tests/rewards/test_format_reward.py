"""`rlx.rewards.format`: the shapes that count."""

import pytest

from rlx.rewards.format import boxed, think


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>two and two</think>4", 1),
        ("\n<think>\ntwo\nand two\n</think>\n\n4\n", 1),
        ("4", 0),
        ("", 0),
        ("<think>two</think>", 0),
        ("<think>two</think>  \n", 0),
        ("<think></think>4", 0),
        ("<think> \n</think>4", 0),
        ("so <think>two</think>4", 0),
        ("two</think>4", 0),
        ("<think>two 4", 0),
        ("<think>a<think>b</think>4", 0),
        ("<think>a</think>b</think>4", 0),
        ("<think>a</think><think>b</think>4", 0),
    ],
)
def test_think_wants_a_thought_and_then_an_answer(completion, score):
    assert think([completion], answer=["4"]) == [score]
    assert think([[{"role": "assistant", "content": completion}]]) == [score]


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (r"\boxed{4}", 1),
        (r"It is \boxed{\frac{1}{2}}, I think.", 1),
        (r"\boxed {4}", 1),
        ("4", 0),
        (r"\boxed{}", 0),
        (r"\boxed{ }", 0),
        (r"\boxed{4", 0),
        (r"\boxed{\frac{1}{2}", 0),
        (r"\boxed{4} or \boxed{5}", 0),
        (r"\boxed{\boxed{4}}", 0),
        (r"<think>\boxed{3}?</think>\boxed{4}", 1),
        (r"<think>\boxed{4}</think>4", 0),
        (r"<think>\boxed{4}", 0),
    ],
)
def test_boxed_wants_one_closed_box_in_the_answer(completion, score):
    assert boxed([completion], answer=["4"]) == [score]
