"""Is the mathematical answer right? Equality is decided by the math-verify library.

It bounds its own time with SIGALRM, which works in a main thread only; elsewhere it runs without a bound and the
caller's deadline is the only one.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from math_verify import parse, verify

from rlx.errors import UserCodeError
from rlx.rewards.text import Completion, answer_text, completion_text

PARSE_TIMEOUT_S = 5
VERIFY_TIMEOUT_S = 5

_DELIMITED = re.compile(r"\$|\\boxed|\\\(|\\\[")
_LATEX_WORDS = re.compile(r"\\text\{[^}]*\}|\\[A-Za-z]+")
_PROSE = re.compile(r"[A-Za-z]{3}")


def accuracy(
    completions: Sequence[Completion],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    ground_truth: Sequence[Any] | None = None,
    log_extra: Callable[[str, list[Any]], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    r"""1.0 where the answer equals the gold one, 0.0 where not, None where the gold one cannot be parsed.

    The gold answer is the column `answer`, `solution` or `ground_truth`, the first that is there: a number, LaTeX with
    or without `$`, a text with `\boxed{}`, or GSM8K's `... #### 72`. A `\boxed{}` in the completion counts before
    anything else; reasoning up to `</think>` does not count.
    """
    golds = next((column for column in (answer, solution, ground_truth) if column is not None), None)
    if golds is None:
        raise UserCodeError("needs the right answer in a column `answer`, `solution` or `ground_truth`.")
    parse_timeout_s, verify_timeout_s = _timeouts()
    parsed_golds = {str(gold): parse(_delimited(str(gold)), parsing_timeout=parse_timeout_s) for gold in golds}
    answers = [parse(answer_text(completion_text(c)), parsing_timeout=parse_timeout_s) for c in completions]
    if log_extra is not None:
        log_extra("parsed_answer", [str(parsed[-1]) if parsed else None for parsed in answers])
    pairs = [(parsed_golds[str(gold)], parsed) for gold, parsed in zip(golds, answers, strict=True)]
    return [float(verify(gold, parsed, timeout_seconds=verify_timeout_s)) if gold else None for gold, parsed in pairs]


reward = accuracy


def _delimited(gold: str) -> str:
    r"""The gold answer in the form that the parser takes whole: a bare `\frac{1}{2} x` gets its `$`."""
    gold = gold.rpartition("####")[2].strip()
    if not gold or _DELIMITED.search(gold) or _PROSE.search(_LATEX_WORDS.sub("", gold)):
        return gold
    return f"${gold}$"


def _timeouts() -> tuple[int | None, int | None]:
    if threading.current_thread() is threading.main_thread():
        return PARSE_TIMEOUT_S, VERIFY_TIMEOUT_S
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they warn that nothing bounds their time, which is known
    return None, None
