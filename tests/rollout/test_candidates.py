"""Which worker comes first: the same as looking at all, paces, and workers that are left out for being slow."""

from __future__ import annotations

import random

import pytest
from service_parts import QUICK, LocalWorker

from rlx.rollout import candidates as candidates_module
from rlx.rollout.candidates import SLOW_S, Candidates
from rlx.rollout.fleet import Fleet
from rlx.rollout.worker import EngineLoad

LIMIT = 20


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(candidates_module, "time", made)
    return made


def fleet_of(count):
    fleet = Fleet([LocalWorker(f"worker-{i}") for i in range(count)], QUICK)
    for member in fleet.members:
        for event in ("loaded", "caught_up", "verified"):
            fleet.move(member, event)
    return fleet


def has_room(member, completions):
    return member.in_flight + completions <= LIMIT


def charge(candidates, member, completions, tokens):
    member.in_flight += completions
    member.tokens_in_flight += tokens
    candidates.changed(member)


def paces(candidates, **step_s):
    """One second of work of 10 sequences each."""
    for member in candidates._fleet.members:
        tokens = round(10 / step_s[member.name.replace("-", "_")])
        candidates.learn(member, EngineLoad(running=10), EngineLoad(running=10, generated_tokens=tokens, busy_s=1.0))
    candidates.compare()


@pytest.mark.parametrize("seed", range(20))
def test_the_first_is_the_one_that_looking_at_all_would_find(seed):
    draw, fleet = random.Random(seed), fleet_of(7)
    candidates, held = Candidates(fleet, has_room), []
    for _ in range(400):
        n = draw.choice((1, 4, 8))
        ready = [m for m in fleet.ready() if has_room(m, n)]
        first = candidates.first(n)
        assert (first is None) == (not ready)
        if first is not None:
            assert first in ready
            assert first.tokens_in_flight == min(m.tokens_in_flight for m in ready)
            held.append((first, n, n * draw.randint(1, 100)))
            charge(candidates, *held[-1])
        while held and (first is None or draw.random() < 0.4):
            member, n, tokens = held.pop(draw.randrange(len(held)))
            charge(candidates, member, -n, -tokens)
            if draw.random() < 0.7:
                break
        if draw.random() < 0.05:
            member = draw.choice(fleet.members)
            events = ("failed",) if member.state == "ready" else ("restart", "loaded", "caught_up", "verified")
            for event in events:
                fleet.move(member, event)


def test_work_in_flight_counts_by_the_pace_of_its_worker(clock):
    fleet = fleet_of(3)
    candidates = Candidates(fleet, has_room)
    paces(candidates, worker_0=0.02, worker_1=0.01, worker_2=0.01)
    for member, tokens in zip(fleet.members, (60, 100, 110), strict=True):
        charge(candidates, member, 1, tokens)
    assert candidates.first(1).name == "worker-1"  # 60 tokens at half the pace are as 120


def test_a_worker_that_is_much_slower_than_the_others_gets_nothing_until_it_is_tried_again(clock):
    fleet = fleet_of(3)
    candidates = Candidates(fleet, has_room)
    slow, second, third = fleet.members
    paces(candidates, worker_0=0.1, worker_1=0.01, worker_2=0.012)
    for member in (second, third):
        charge(candidates, member, LIMIT, 1000)
    assert candidates.first(1) is None
    clock.now += SLOW_S + 1
    candidates.compare()
    assert candidates.first(1) is slow


def test_a_slow_worker_that_works_is_not_tried_again_meanwhile(clock):
    fleet = fleet_of(2)
    candidates = Candidates(fleet, has_room)
    paces(candidates, worker_0=0.1, worker_1=0.01)
    fleet.members[0].in_flight = 1
    clock.now += SLOW_S + 1
    candidates.compare()
    charge(candidates, fleet.members[1], LIMIT, 1000)
    assert candidates.first(1) is None


def test_a_slow_worker_serves_when_it_is_the_only_one(clock):
    fleet = fleet_of(2)
    candidates = Candidates(fleet, has_room)
    paces(candidates, worker_0=0.1, worker_1=0.01)
    fleet.move(fleet.members[1], "failed")
    candidates.compare()
    assert candidates.first(1).name == "worker-0"


def test_a_new_process_is_not_judged_by_the_pace_of_the_old_one(clock):
    fleet = fleet_of(2)
    candidates = Candidates(fleet, has_room)
    paces(candidates, worker_0=0.1, worker_1=0.01)
    for event in ("failed", "restart", "loaded", "caught_up", "verified"):
        fleet.move(fleet.members[0], event)
    candidates.compare()
    charge(candidates, fleet.members[1], 1, 10)
    assert candidates.first(1).name == "worker-0"


def test_what_says_too_little_is_no_pace():
    fleet = fleet_of(2)
    candidates = Candidates(fleet, has_room)
    member = fleet.members[0]
    for before, after in (
        (EngineLoad(), EngineLoad(running=1, generated_tokens=1, busy_s=0.001)),
        (EngineLoad(), EngineLoad(busy_s=1.0)),
        (EngineLoad(generated_tokens=9, busy_s=9.0), EngineLoad(running=1, generated_tokens=2, busy_s=1.0)),
    ):
        candidates.learn(member, before, after)
    assert not candidates._paces
