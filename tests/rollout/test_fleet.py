"""The fleet's states and who may work: no workers run here."""

from __future__ import annotations

import asyncio
from typing import get_args

import pytest
from faulty_workers import FaultyWorker, virtually

from rlx.config.sections import ServiceSection
from rlx.errors import ServiceUnavailable
from rlx.rollout.fleet import TRANSITIONS, Event, Fleet, State
from rlx.rollout.worker import EngineLoad, WorkerStatus


def fleet_of(*names, ready=True):
    fleet = Fleet([FaultyWorker(name) for name in names], ServiceSection())
    for member in fleet.members if ready else []:
        serve(fleet, member)
    return fleet


def serve(fleet, member):
    for event in ("loaded", "caught_up", "verified"):
        fleet.move(member, event)


def names(members):
    return [member.name for member in members]


def test_only_what_was_verified_becomes_ready():
    assert [key for key, state in TRANSITIONS.items() if state == "ready"] == [("verifying", "verified")]
    assert {state for (state, _), after in TRANSITIONS.items() if after == "verifying"} == {
        "catching_up", "ready", "quarantined",
    }  # fmt: skip


def test_every_state_but_the_last_two_leads_to_ready_and_every_state_can_leave():
    for state in get_args(State):
        reached, edge = {state}, {state}
        while edge:
            edge = {after for (before, _), after in TRANSITIONS.items() if before in edge} - reached
            reached |= edge
        assert ("ready" in reached) == (state not in ("draining", "gone"))
        assert "draining" in reached
    assert {event for _, event in TRANSITIONS} == set(get_args(Event))


def test_what_the_table_does_not_know_cannot_happen():
    fleet = fleet_of("a")
    with pytest.raises(KeyError):
        fleet.move(fleet.members[0], "restart")
    assert fleet.members[0].state == "ready"


def test_a_late_report_about_an_earlier_process_says_nothing_about_this_one():
    fleet = fleet_of("a")
    [member] = fleet.members
    late = fleet.marking(member)
    late.__enter__()
    fleet.mark_down(member, "killed")
    fleet.move(member, "restart")
    serve(fleet, member)
    assert not late.__exit__(ServiceUnavailable, ServiceUnavailable("the process before died"), None)
    assert (member.state, member.incarnation) == ("ready", 1)
    with pytest.raises(ServiceUnavailable), fleet.marking(member):
        raise ServiceUnavailable("this one died")
    assert (member.state, member.cause) == ("down", "this one died")


def test_of_a_worker_that_does_not_work_nothing_new_is_learned_and_its_first_cause_stays():
    fleet = fleet_of("a")
    [member] = fleet.members
    fleet.mark_down(member, "out of memory")
    fleet.mark_down(member, "its other groups failed", quarantine=True)
    assert (member.state, member.cause) == ("down", "out of memory")
    fleet.move(member, "restart")
    fleet.mark_down(member, "a straggler")
    assert member.state == "restarting"
    fleet.fail(member, "no such folder")
    assert (member.state, member.cause, member.last_cause) == ("down", "out of memory", "no such folder")


def test_silence_counts_from_when_a_worker_became_ready():
    fleet = fleet_of("w", ready=False)
    [member] = fleet.members
    member.token_at -= 1000
    serve(fleet, member)
    assert fleet.silent() == []
    member.token_at -= 1000
    assert fleet.silent() == [member]


def test_of_a_cause_with_a_traceback_the_line_that_says_what_it_was_stays_and_the_event_has_all():
    fleet = fleet_of("w")
    said = []
    fleet.on_event = said.append
    fleet.mark_down(fleet.members[0], "w failed: KeyError: 'a'\n  line 7")
    assert fleet.members[0].explanation == "w failed: KeyError: 'a'"
    assert said == [f"{fleet.members[0].name}: down: w failed: KeyError: 'a'\n  line 7"]


def test_a_worker_is_charged_while_it_works_also_when_that_fails():
    fleet = fleet_of("a")
    [member] = fleet.members
    charged = []

    def work():
        with fleet.charging(member, 4, 400):
            charged.append((member.in_flight, member.tokens_in_flight))
            raise ServiceUnavailable("gone")

    with pytest.raises(ServiceUnavailable):
        work()
    assert charged == [(4, 400)]
    assert (member.in_flight, member.tokens_in_flight) == (0, 0)


def test_a_charge_ends_once_however_often_it_is_closed():
    fleet = fleet_of("a")
    [member] = fleet.members
    ended = []
    with (charge := fleet.charging(member, 4, 400, ended.append)):
        charge.close()
        assert (member.in_flight, ended) == (0, [member])
    charge.close()
    assert (member.in_flight, member.tokens_in_flight, ended) == (0, 0, [member])


def test_during_an_update_those_with_the_weights_before_serve_until_it_is_settled():
    fleet = fleet_of("a", "b", "c")
    a, b, c = fleet.members
    with fleet.moving_to(1):
        fleet.took(a, 1)
        assert names(fleet.ready()) == ["a", "b", "c"]
        assert not fleet.is_behind(b)
        fleet.settled()
        assert names(fleet.ready()) == ["a"]
        fleet.took(b, 1)
    assert names(fleet.ready()) == ["a", "b"]
    assert fleet.is_behind(c)
    assert c.changed.is_set()
    assert "c is ready with weights 0" in fleet.describe()


def test_waiting_ends_with_the_first_worker_and_at_once_when_none_comes():
    async def main():
        fleet = fleet_of("a", "b", ready=False)
        a, b = fleet.members
        waiting = asyncio.create_task(fleet.wait_ready())
        await asyncio.sleep(1000)
        assert not waiting.done()
        serve(fleet, b)
        await waiting
        for member in (a, b):
            fleet.fail(member, f"{member.name} burnt")
            fleet.move(member, "give_up")
        with pytest.raises(ServiceUnavailable, match=r"none comes back: a is gone \(a burnt\); b is gone \(b burnt\)"):
            await fleet.wait_ready()
        waiting = asyncio.create_task(fleet.wait_ready())
        fleet.add(FaultyWorker("c"))
        await asyncio.sleep(0)
        assert not waiting.done()
        fleet.drop("c")
        with pytest.raises(ServiceUnavailable, match="none comes back"):
            await waiting
        for name in "ab":
            fleet.drop(name)
        with pytest.raises(ServiceUnavailable, match="there is no worker"):
            await fleet.wait_ready()

    virtually(main())


def test_more_tokens_than_a_probe_asks_for_end_a_row_of_restarts():
    [member] = fleet_of("a").members
    member.restarts = 2
    for tokens, restarts in ((1, 2), (2, 2), (2, 2), (10, 0)):
        member.observe(WorkerStatus("a", "ready", 0, 0.0, 0, load=EngineLoad(generated_tokens=tokens)))
        assert member.restarts == restarts


def test_statuses_tell_state_cause_and_load():
    fleet = fleet_of("a")
    [member] = fleet.members
    member.observe(WorkerStatus("a", "ready", 0, 3.0, 0, "here", 7, load=EngineLoad(running=2)))
    fleet.mark_down(member, "other bytes", quarantine=True)
    status = fleet.status(fleet.members[0])
    assert (status.state, status.cause, status.node, status.pid) == ("quarantined", "other bytes", "here", 7)
    assert status.load.running == 2
    assert 0 <= status.load_age_s < 60
    member.load_at -= 100
    assert fleet.status(fleet.members[0]).load_age_s >= 100
    assert 3.0 <= status.token_age_s < 60
