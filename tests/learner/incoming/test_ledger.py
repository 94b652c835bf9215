"""The ledger against random services: any order, delay, failure and restart; each prompt ends exactly once."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlx.learner.incoming.ledger import Ledger, Rules, Taken

RULES = st.builds(
    Rules,
    groups_per_step=st.integers(1, 4),
    total_steps=st.integers(1, 8),
    max_staleness=st.integers(0, 3),
    max_inflight_groups=st.none() | st.integers(1, 6),
    max_requeues=st.integers(0, 2),
    oversample=st.sampled_from([1.0, 1.5, 2.0]),
    dynamic_sampling=st.booleans(),
    max_sampling_attempts=st.integers(1, 3),
)


@dataclass
class Simulation:
    """A service that finishes what it was sent in any order, a learner that publishes some time after each step, and a
    checkpoint of each step that a restart goes back to."""

    rules: Rules
    rng: random.Random
    stragglers: float
    failures: float
    restarts: int
    flat: float
    impatience: float
    ledger: Ledger = field(init=False)
    running: dict[tuple[int, int], tuple[int, bool]] = field(default_factory=dict)
    """(number, attempt) → policy when it began, and whether it is slow."""
    ended: Counter[tuple[str, int]] = field(default_factory=Counter)
    versions: dict[int, int] = field(default_factory=dict)
    put_back: Counter[int] = field(default_factory=Counter)
    failed: Counter[int] = field(default_factory=Counter)
    saved: tuple[int, dict, Counter] = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.rules)
        self.saved = (0, self.ledger.state(), Counter())
        self.lag = 0

    def run(self) -> None:
        idle = 0
        while self.ledger.step < self.rules.total_steps:
            before = (self.ledger.step, self.ledger.served, self.ledger.state(), len(self.running))
            self.turn()
            after = (self.ledger.step, self.ledger.served, self.ledger.state(), len(self.running))
            idle = idle + 1 if before == after else 0
            assert idle < 300, f"nothing moves any more: {vars(self.ledger)}"

    def turn(self) -> None:
        self.send()
        choice = self.rng.random()
        if self.restarts and choice < 0.02:
            self.restart()
        elif choice < 0.25 or self.ledger.served is None:
            self.publish()
        elif choice < 0.75 and self.running:
            self.finish()
        else:
            self.take()

    def send(self) -> None:
        for ticket in self.ledger.dispatch():
            assert self.ledger.served is not None
            key = (ticket.number, ticket.attempt)
            assert key not in self.running
            self.running[key] = (self.ledger.served, self.rng.random() < self.stragglers)
        limit = self.rules.max_inflight_groups
        assert limit is None or self.ledger.count("in_flight") <= limit
        assert self.ledger.count("in_flight") == len(self.running)

    def publish(self) -> None:
        served = self.ledger.served
        self.ledger.fit(self.rng.randint(0, 2), self.rng.randint(0, 4), self.rng.randint(0, 40))
        self.ledger.serve(
            self.ledger.step if served is None or self.rng.random() < 0.5 else min(served + 1, self.ledger.step)
        )

    def finish(self) -> None:
        quick = [key for key, (_, slow) in self.running.items() if not slow]
        key = self.rng.choice(quick if quick and self.rng.random() < 0.95 else list(self.running))
        began, _ = self.running.pop(key)
        served = self.ledger.served
        assert served is not None
        if self.rng.random() < self.failures:
            assert self.ledger.failed(*key)
            self.failed[key[0]] += 1
            return
        oldest = self.rng.randint(began, served)
        assert self.ledger.arrived(*key, oldest, self.rng.random() >= self.flat) == "kept"
        self.versions[key[0]] = oldest
        assert self.ledger.arrived(*key, oldest) == "unknown", "the same group twice counts once"

    def take(self) -> None:
        for ticket in self.ledger.held_up_by():
            assert (ticket.number, ticket.attempt) in self.running
            assert ticket.attempt < self.rules.max_requeues
            if self.rng.random() < self.impatience:
                self.ledger.give_up(ticket.number)
        taken = self.ledger.take()
        if taken is None:
            return
        self.check(taken)
        for number in taken.consumed:
            self.ended["consumed", number] += 1
        for number in taken.filtered:
            self.ended["filtered", number] += 1
        for key in taken.cancelled:
            del self.running[key]
            assert self.ledger.arrived(*key, self.ledger.step) == "unknown", "a cancelled group that still comes"
        for number in [*(n for n, _ in taken.cancelled), *taken.dropped]:
            self.put_back[number] += 1
            assert self.put_back[number] <= self.rules.max_requeues or self.ledger.step == self.rules.total_steps
        self.saved = (self.ledger.step, self.ledger.state(), self.ended.copy())

    def check(self, taken: Taken) -> None:
        assert len(taken.consumed) == self.rules.groups_per_step
        assert list(taken.consumed) == sorted(set(taken.consumed))
        assert all(0 <= taken.step - self.versions[n] <= self.rules.max_staleness for n in taken.consumed)
        assert self.rules.dynamic_sampling or not taken.filtered

    def restart(self) -> None:
        self.restarts -= 1
        step, state, self.ended = self.saved[0], self.saved[1], self.saved[2].copy()
        self.ledger = Ledger(self.rules, step)
        self.ledger.restore(state)
        self.running, self.put_back = {}, Counter()


@settings(max_examples=300, deadline=None)
@given(
    RULES,
    st.integers(),
    st.sampled_from([0, 0.3]),
    st.sampled_from([0, 0.1]),
    st.integers(0, 2),
    st.sampled_from([0, 0.4, 1]),
    st.sampled_from([0, 0.3, 1]),
)
def test_every_ticket_ends_exactly_once_whatever_the_service_does(
    rules, seed, stragglers, failures, restarts, flat, impatience
):
    run = Simulation(rules, random.Random(seed), stragglers, failures, restarts, flat, impatience)
    run.run()
    assert set(run.ended.values()) == {1}
    numbers = {number for _, number in run.ended}
    total = rules.groups_per_step * rules.total_steps
    assert sum(1 for what, _ in run.ended if what == "consumed") == total
    assert set(range(total)) <= numbers, "every prompt of the asked epochs has ended"
    assert numbers == set(range(len(numbers))), "none was skipped"


def ledger(**rules: object) -> Ledger:
    made = Ledger(Rules(**{"groups_per_step": 2, "total_steps": 10} | rules))
    made.serve(0)
    return made


def send(books: Ledger) -> list[int]:
    return [ticket.number for ticket in books.dispatch()]


def bring(books: Ledger, *numbers: int, oldest: int = 0, useful: bool = True) -> None:
    for number in numbers:
        assert books.arrived(number, books.attempt(number), oldest, useful) == "kept"


def consumed(books: Ledger) -> tuple[int, ...] | None:
    taken = books.take()
    return taken.consumed if taken else None


def test_without_staleness_a_step_sends_its_own_groups_and_waits_for_its_weights():
    books = ledger()
    assert send(books) == [0, 1]
    bring(books, 1)
    assert consumed(books) is None
    bring(books, 0)
    assert consumed(books) == (0, 1)
    assert send(books) == []
    books.serve(1)
    assert send(books) == [2, 3]


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_as_much_is_sent_as_will_be_young_enough_when_its_step_comes(staleness: int):
    books = ledger(max_staleness=staleness)
    assert len(send(books)) == 2 * (staleness + 1)
    bring(books, 0, 1)
    assert consumed(books) == (0, 1)
    assert send(books) == [], "the weights of step 1 are not served yet"
    books.serve(1)
    assert len(send(books)) == 2


def test_no_more_are_in_flight_than_allowed():
    books = ledger(max_staleness=1, max_inflight_groups=3)
    assert send(books) == [0, 1, 2]
    bring(books, 2)
    assert send(books) == [3]


def test_fewer_are_in_flight_while_more_sequences_wait_than_run_and_more_again_afterwards():
    books = ledger(groups_per_step=16, max_staleness=2)
    assert len(send(books)) == 48
    books.fit(workers=4, running=32, waiting=224)
    bring(books, *range(16))
    assert send(books) == [], "32 are in flight, and (48 + 48 * 64 / 256) / 2 = 30 fit"
    bring(books, 16, 17, 18)
    assert consumed(books) is not None
    books.serve(1)
    assert len(send(books)) == 1
    books.fit(workers=4, running=32, waiting=32)
    assert len(send(books)) == 8, "a quarter more, and one"
    books.fit(workers=4, running=1, waiting=400)
    bring(books, *range(19, 40))
    assert books.count("in_flight") == 17, "half way down from 38 to none"
    books.fit(workers=4, running=1, waiting=400)
    bring(books, *range(40, 47))
    assert len(send(books)) == 2, "three for each worker, whatever waits"


@pytest.mark.parametrize(("rules", "sent"), [({"max_staleness": 0}, 16), ({"max_inflight_groups": 40}, 40)])
def test_how_crowded_the_workers_are_changes_nothing_in_a_synchronous_run_or_against_a_given_number(rules, sent):
    books = ledger(**{"groups_per_step": 16, "max_staleness": 2} | rules)
    books.fit(workers=1, running=1, waiting=1000)
    assert len(send(books)) == sent


def held_up_by(books: Ledger) -> list[int]:
    return [ticket.number for ticket in books.held_up_by()]


def test_a_step_waits_for_what_would_be_too_old_for_the_next():
    books = ledger(max_staleness=1)
    assert send(books) == [0, 1, 2, 3]
    bring(books, 1, 2)
    assert held_up_by(books) == []
    assert consumed(books) == (1, 2), "the step after can still train 0 and 3"
    books.serve(1)
    assert send(books) == [4, 5]
    bring(books, 4)
    assert held_up_by(books) == [], "there is no second group that the step could take instead"
    bring(books, 5, oldest=1)
    assert consumed(books) is None
    assert held_up_by(books) == [0, 3]
    bring(books, 0)
    assert held_up_by(books) == [3]
    bring(books, 3)
    assert consumed(books) == (0, 3)


def test_what_arrives_after_it_was_given_up_is_trained_if_the_step_was_not_taken_yet():
    books = ledger(max_staleness=1)
    send(books)
    bring(books, 1, 2)
    books.take()
    books.serve(1)
    send(books)
    bring(books, 4, 5, oldest=1)
    books.give_up(0)
    bring(books, 0)
    assert consumed(books) is None
    books.give_up(3)
    assert consumed(books) == (0, 4)


def test_a_straggler_is_cancelled_comes_again_under_another_attempt_and_is_then_waited_for():
    books = ledger(max_staleness=1, max_requeues=1)
    assert send(books) == [0, 1, 2, 3]
    bring(books, 1, 2)
    assert consumed(books) == (1, 2)
    books.serve(1)
    assert send(books) == [4, 5]
    bring(books, 4, 5, oldest=1)
    for number in held_up_by(books):
        books.give_up(number)
    taken = books.take()
    assert taken is not None
    assert (taken.consumed, taken.cancelled) == ((4, 5), ((0, 0), (3, 0)))
    books.serve(2)
    assert [(t.number, t.attempt) for t in books.dispatch()] == [(0, 1), (3, 1), (6, 0), (7, 0)]
    assert books.arrived(0, 0, 0) == "unknown"
    bring(books, 6, 7, oldest=2)
    assert consumed(books) == (6, 7), "0 and 3 can still be trained by the step after"
    books.serve(3)
    assert send(books) == [8, 9]
    bring(books, 8, 9, oldest=3)
    assert consumed(books) is None
    bring(books, 3, oldest=2)
    assert consumed(books) is None
    bring(books, 0, oldest=2)
    assert consumed(books) == (0, 3)


def test_a_group_that_arrives_too_old_comes_again():
    books = ledger(max_staleness=0)
    assert send(books) == [0, 1]
    assert books.arrived(0, 0, -1) == "too_old"
    assert [(t.number, t.attempt) for t in books.dispatch()] == [(0, 1)]


def test_what_was_sampled_too_much_at_staleness_0_comes_again():
    books = ledger(oversample=1.5)
    assert send(books) == [0, 1, 2]
    bring(books, 0, 2)
    taken = books.take()
    assert taken is not None
    assert (taken.consumed, taken.cancelled) == ((0, 2), ((1, 0),))
    books.serve(1)
    assert send(books) == [1, 3, 4]


def test_groups_without_spread_are_replaced_until_the_attempts_are_used_up():
    books = ledger(dynamic_sampling=True, max_sampling_attempts=2)
    assert send(books) == [0, 1]
    bring(books, 0, useful=False)
    assert send(books) == [2]
    bring(books, 1, 2)
    taken = books.take()
    assert taken is not None
    assert (taken.consumed, taken.filtered) == ((1, 2), (0,))
    books.serve(1)
    assert send(books) == [3, 4]
    bring(books, 3, 4, oldest=1, useful=False)
    assert send(books) == [5, 6]
    bring(books, 5, 6, oldest=1, useful=False)
    assert send(books) == []
    taken = books.take()
    assert taken is not None
    assert (taken.consumed, taken.filtered) == ((3, 4), (5, 6))


def test_a_restart_brings_what_had_not_ended():
    books = ledger(max_staleness=1)
    send(books)
    bring(books, 1, 2, 3)
    assert consumed(books) == (1, 2)
    again = Ledger(books.rules, books.step)
    again.restore(books.state())
    again.serve(1)
    assert send(again) == [0, 3, 4, 5]


def test_the_last_step_leaves_no_earlier_prompt_behind():
    books = ledger(max_staleness=1, total_steps=2)
    assert send(books) == [0, 1, 2, 3]
    bring(books, 2, 3)
    assert consumed(books) == (2, 3)
    books.serve(1)
    assert send(books) == [], "no more is sampled than the run takes"
    bring(books, 1)
    assert consumed(books) is None
    bring(books, 0)
    assert consumed(books) == (0, 1)


def test_after_the_last_step_nothing_is_sent_that_was_put_back():
    books = ledger(max_staleness=1, total_steps=2, oversample=1.5)
    assert send(books) == [0, 1, 2, 3]
    bring(books, 1, 2)
    assert consumed(books) == (1, 2)
    assert books.failed(3, 0)
    books.serve(1)
    assert send(books) == [3]
    bring(books, 0, 3)
    assert consumed(books) == (0, 3)
    again = Ledger(books.rules, 2)
    again.restore({"next": 5, "open": [4]})
    again.serve(2)
    assert send(again) == []


def test_the_policies_that_are_served_follow_each_other():
    books = ledger()
    with pytest.raises(ValueError, match="cannot follow"):
        books.serve(1)
