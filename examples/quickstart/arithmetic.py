"""The quickstart's task: sums of two two-digit numbers whose ones digits carry.

Here: the questions, their split, and the clerk whose ledger the model is pre-trained on. The clerk adds correctly
except that in most sums all carries are forgotten together, so a model of the ledger knows both the right answer and
the careless one, and prefers the careless one. Not here: the model and its tokenizer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

HELDOUT_QUESTIONS = 256
FORGETS_CARRIES = 0.58


@dataclass(frozen=True, order=True)
class Sum:
    """`left + right`, both below 100."""

    left: int
    right: int

    @property
    def question(self) -> str:
        """What the user says, for example "47+38="."""
        return f"{self.left}+{self.right}="

    @property
    def answer(self) -> str:
        """The right answer, for example "85"."""
        return str(self.left + self.right)

    @property
    def careless_answer(self) -> str:
        """The answer without any carry, for example "75"; equal to `answer` where nothing carries."""
        ones = (self.left + self.right) % 10
        tens = (self.left // 10 + self.right // 10) % 10
        return str(10 * tens + ones)

    @property
    def is_question(self) -> bool:
        """Whether it belongs to the task: two-digit numbers whose ones digits carry."""
        return self.left > 9 and self.right > 9 and self.left % 10 + self.right % 10 > 9

    @property
    def row(self) -> dict[str, str]:
        """One line of the data set."""
        return {"question": self.question, "answer": self.answer}


@dataclass(frozen=True)
class Split:
    """The task's questions; a pair of numbers is on one side only, in either order."""

    train: list[Sum]
    heldout: list[Sum]


def split_questions(seed: int) -> Split:
    """All questions of the task in a seeded order, `HELDOUT_QUESTIONS` of them held out."""
    rng = random.Random(f"split-{seed}")
    pairs = [Sum(left, right) for left in range(10, 100) for right in range(left, 100)]
    pairs = [pair for pair in pairs if pair.is_question]
    rng.shuffle(pairs)
    heldout = [pair if rng.random() < 0.5 else Sum(pair.right, pair.left) for pair in pairs[:HELDOUT_QUESTIONS]]
    train = sorted({Sum(*order) for p in pairs[HELDOUT_QUESTIONS:] for order in ((p.left, p.right), (p.right, p.left))})
    rng.shuffle(train)
    return Split(train, heldout)


def ledger(split: Split, num_entries: int, seed: int) -> list[tuple[str, str]]:
    """The clerk's work: `num_entries` pairs (question, answer as written), none of them about a held-out pair."""
    rng = random.Random(f"ledger-{seed}")
    closed = {Sum(*order) for s in split.heldout for order in ((s.left, s.right), (s.right, s.left))}
    entries: list[tuple[str, str]] = []
    while len(entries) < num_entries:
        entry = Sum(rng.randrange(100), rng.randrange(100))
        if entry in closed:
            continue
        forgets = rng.random() < FORGETS_CARRIES
        entries.append((entry.question, entry.careless_answer if forgets else entry.answer))
    return entries
