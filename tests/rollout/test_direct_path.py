"""The direct token path without Ray: leases of the gateway, endpoints of workers, the learner's side of both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest
from service_parts import (
    QUICK,
    TOKEN,
    LocalScorer,
    LocalWorker,
    eventually,
    group,
    make_service,
    started,
)

from rlx.envs.single_turn import SingleTurn
from rlx.errors import (
    DeadlineExceeded,
    GroupCancelled,
    ServiceUnavailable,
    SessionReplaced,
    UserCodeError,
)
from rlx.rollout import direct
from rlx.rollout.app import create_app
from rlx.rollout.client import RolloutClient
from rlx.rollout.direct import Leases, WorkerGroups
from rlx.rollout.direct_app import add_routes, worker_app
from rlx.rollout.direct_client import DirectRollouts
from rlx.rollout.gateway import bind, serving
from rlx.rollout.group_runner import GroupRunner
from rlx.rollout.service import RolloutService
from rlx.wire import GroupResult

LONG_S = 60.0


@dataclass
class Stage:
    service: RolloutService
    leases: Leases
    workers: list[LocalWorker]
    scorers: list[LocalScorer]
    urls: dict[str, str]
    client: RolloutClient

    async def rollout(self, *keys: str, deadline_s: float = LONG_S) -> list[GroupResult]:
        requests = [group(key, deadline_s=deadline_s) for key in keys]
        return await asyncio.to_thread(self.client.rollouts, requests)

    @property
    def charged(self) -> int:
        """Completions that the router counts, on all workers."""
        return sum(member.in_flight for member in self.service.fleet.members)

    def member(self, name: str):
        [member] = [m for m in self.service.fleet.members if m.name == name]
        return member


@asynccontextmanager
async def stage(settings=QUICK, stop: Callable[[str, str], None] = lambda name, key: None) -> AsyncIterator[Stage]:
    """Two workers with endpoints of their own, a gateway that needs the token, and a direct client."""
    workers, scorers = [LocalWorker("worker-0"), LocalWorker("worker-1")], [LocalScorer(), LocalScorer()]
    service = make_service(workers, settings=settings)
    async with AsyncExitStack() as opened:
        groups, urls = {}, {}
        for worker, scorer in zip(workers, scorers, strict=True):
            groups[worker.name] = WorkerGroups(worker, GroupRunner(SingleTurn(), scorer, settings.group_timeout))
            app = worker_app(groups[worker.name], TOKEN, require_token=True)
            urls[worker.name] = await opened.enter_async_context(serving(app, bind("127.0.0.1", 0)))

        async def stop_there(worker, key: str) -> None:
            stop(worker.name, key)
            groups[worker.name].cancel([key])

        leases = Leases(service, lambda worker: urls[worker.name], stop_there)
        app = create_app(service, TOKEN, require_token_for_data=True)
        add_routes(app, leases, TOKEN, require_token=True)
        url = await opened.enter_async_context(serving(app, bind("127.0.0.1", 0)))
        await opened.enter_async_context(started(service))
        client = RolloutClient(url, TOKEN, direct=True)
        opened.push_async_callback(asyncio.to_thread, client.close)
        yield Stage(service, leases, workers, scorers, urls, client)


def patient(**changes: float):
    return QUICK.model_copy(update={"group_timeout": LONG_S, "probe_interval": LONG_S, **changes})


async def test_groups_are_spread_scored_by_the_workers_and_their_leases_end_with_them():
    async with stage(patient()) as s:
        results = await s.rollout(*(f"g{i}" for i in range(20)))
        assert [r.key for r in results] == [f"g{i}" for i in range(20)]
        assert {r.worker for r in results} == {"worker-0", "worker-1"}
        assert {r.rewards[0].name for r in results} == {"rewards.position"}
        assert sorted(s.workers[0].generated + s.workers[1].generated) == sorted(f"g{i}" for i in range(20))
        await eventually(lambda: s.charged == 0 and len(s.leases) == 0)
        assert s.service.groups.outcomes == {"ok": 20, "failed": 0, "cancelled": 0}


async def test_a_key_keeps_its_worker_until_that_is_down():
    async with stage(patient()) as s:
        request = group("g", deadline_s=LONG_S)
        for worker in s.workers:
            worker.open.clear()
        first = (await s.leases.route([request], []))["routes"][0]["worker"]
        assert (await s.leases.route([request], []))["routes"] == [{"key": "g", "url": s.urls[first], "worker": first}]
        s.service.fleet.mark_down(s.member(first), "killed")
        second = (await s.leases.route([request], []))["routes"][0]["worker"]
        assert second != first
        assert (len(s.leases), s.charged) == (1, 2)
        await s.leases.route([], ["g", "unknown"])
        await eventually(lambda: s.charged == 0)
        for worker in s.workers:
            worker.open.set()


async def test_a_lost_worker_is_replaced_and_the_answer_is_the_other_ones():
    async with stage(patient()) as s:
        for worker in s.workers:
            worker.open.clear()
        running = asyncio.create_task(s.rollout("a", "b"))
        await eventually(lambda: len(s.workers[0].generated) == len(s.workers[1].generated) == 1)
        s.workers[0].dead = "killed"
        for worker in s.workers:
            worker.open.set()
        results = await running
        assert [(r.key, r.worker) for r in results] == [("a", "worker-1"), ("b", "worker-1")]


async def test_errors_of_the_group_arrive_as_themselves_and_end_the_lease():
    async with stage(patient()) as s:
        for scorer in s.scorers:
            scorer.error = UserCodeError("rewards.position raised")
        with pytest.raises(UserCodeError, match=r"^rewards\.position raised$"):
            await s.rollout("g")
        await eventually(lambda: s.charged == 0)


async def test_a_group_without_a_free_worker_in_time_is_told_so_by_the_gateway():
    async with stage(patient()) as s:
        for member in s.service.fleet.members:
            member.worker.open.clear()  # its restart waits
            s.service.fleet.mark_down(member, "killed")
        with pytest.raises(DeadlineExceeded, match=r"group 'g' .* 0\.3 s"):
            await s.rollout("g", deadline_s=0.3)
        await eventually(lambda: len(s.leases) == 0)


async def test_a_cancelled_group_stops_at_its_worker_and_its_key_stays_refused():
    stopped: list[tuple[str, str]] = []
    async with stage(patient(), stop=lambda name, key: stopped.append((name, key))) as s:
        for worker in s.workers:
            worker.open.clear()
        await asyncio.to_thread(s.client.begin_session, "a")
        running = s.client.submit(group("a/0.0", deadline_s=LONG_S))
        await eventually(lambda: s.workers[0].generated or s.workers[1].generated)
        s.client.cancel(["a/0.0"])
        with pytest.raises(GroupCancelled):
            await asyncio.wrap_future(running)
        assert [key for _, key in stopped] == ["a/0.0"]
        with pytest.raises(GroupCancelled):
            await s.rollout("a/0.0")
        await eventually(lambda: s.charged == 0)


async def test_groups_of_a_replaced_session_say_so():
    async with stage(patient()) as s:
        for worker in s.workers:
            worker.open.clear()
        await asyncio.to_thread(s.client.begin_session, "a")
        running = s.client.submit(group("a/0.0", deadline_s=LONG_S))
        await eventually(lambda: s.workers[0].generated or s.workers[1].generated)
        assert s.service.begin_session("b")["replaced"] == ["a/0.0"]
        with pytest.raises(SessionReplaced):
            await asyncio.wrap_future(running)
        await eventually(lambda: s.charged == 0)


async def test_a_service_that_is_gone_is_unavailable_to_all_who_ask():
    async with stage(patient()) as s:
        s.service._state = "stopping"
        for key in ("a", "b"):
            with pytest.raises(ServiceUnavailable, match="stopping"):
                await s.rollout(key)
        s.service._state = "serving"


async def test_a_service_that_stops_hears_which_groups_are_done_and_does_not_wait_for_them():
    async with stage(patient()) as s, httpx.AsyncClient(timeout=LONG_S) as http:
        s.service.begin_session("a")
        await s.leases.route([group("a/0.0")], [])
        stopping = asyncio.create_task(s.service.drain(LONG_S))
        await asyncio.sleep(0)
        asked = {"key": "a/1.0", "n": 1, "prompt_tokens": 1, "max_tokens": 1, "deadline_s": LONG_S}
        answer = await http.post(
            f"{s.client.base_url}/v1/routes",
            json={"groups": [asked], "done": ["a/0.0"]},
            headers={"Authorization": f"Bearer {TOKEN}", "rlx-session": "a"},
        )
        assert answer.json()["errors"][0]["error"] == {
            "type": "ServiceUnavailable",
            "message": "the service is stopping",
        }
        await asyncio.wait_for(stopping, LONG_S / 2)


async def test_both_endpoints_need_the_token_and_refuse_what_they_cannot_read():
    async with stage() as s, httpx.AsyncClient() as http:
        endpoints = [f"{s.urls['worker-0']}/v1/rollouts", f"{s.client.base_url}/v1/routes"]
        for url in endpoints:
            assert (await http.post(url, json={})).status_code == 401
        head = {"Authorization": f"Bearer {TOKEN}"}
        for url, body in zip(endpoints, ({"key": 1}, {"groups": [{"key": "g"}]}), strict=True):
            answer = await http.post(url, json=body, headers=head)
            assert (answer.status_code, answer.json()["error"]["type"]) == (400, "WireError")
        answer = await http.post(endpoints[1], json={"groups": 3}, headers=head)
        assert answer.status_code == 400


async def test_a_learner_that_goes_away_gives_its_places_back_at_the_deadline():
    async with stage(patient()) as s:
        request = group("g", deadline_s=0.3)
        assert (await s.leases.route([request], []))["routes"]
        assert s.charged == 2
        await eventually(lambda: s.charged == 0 and len(s.leases) == 0)


async def test_a_key_that_is_done_and_asked_for_again_at_once_has_a_place_of_its_own():
    async with stage(patient()) as s:
        request = group("g", deadline_s=LONG_S)
        await s.leases.route([request], [])
        first = s.leases._leases["g"]
        assert (await s.leases.route([request], ["g"]))["routes"]
        await asyncio.wait([first.task], timeout=LONG_S)
        assert (len(s.leases), s.charged) == (1, 2)


async def test_a_key_that_is_done_while_it_waits_and_asked_for_again_keeps_its_place_in_the_queue(monkeypatch):
    monkeypatch.setattr(direct, "_POLL_S", 0.0)
    async with stage(patient()) as s:
        request = group("g", deadline_s=LONG_S)
        s.service.fleet.mark_down(s.member("worker-0"), "killed")
        s.workers[0].open.clear()  # its restart waits
        limit = s.service.router.limit(s.member("worker-1"))
        limit.sequences, limit.learn = 1, lambda load, in_flight: None
        other = await s.service.router.place(1, 1)
        assert (await s.leases.route([request], []))["routes"] == []
        waiting = s.leases._leases["g"]
        assert (await s.leases.route([request], ["g"]))["routes"] == []
        other.close()
        await asyncio.wait([waiting.placed], timeout=LONG_S)
        assert [route["worker"] for route in (await s.leases.route([request], []))["routes"]] == ["worker-1"]
        assert (s.leases._leases, s.charged) == ({"g": waiting}, 2)


async def unused(url, body):
    raise AssertionError("nobody is asked for a group")


async def test_a_group_that_was_given_up_before_the_gateway_was_asked_gets_no_place():
    asked = []

    async def ask(body):
        asked.append(body)
        return {"routes": [], "errors": []}

    running = asyncio.create_task(DirectRollouts(ask, unused, LONG_S).rollout(group("g")))
    await asyncio.sleep(0)
    running.cancel()
    await eventually(lambda: asked, LONG_S)
    assert asked == [{"groups": [], "done": ["g"]}]


async def test_what_is_done_is_told_again_when_the_gateway_did_not_hear_of_it():
    asked = []

    async def ask(body):
        asked.append(body)
        if body["groups"]:
            return {"routes": [{"key": each["key"], "url": "u"} for each in body["groups"]], "errors": []}
        raise ServiceUnavailable("the connection was lost")

    async def post(url, body):
        return 200, b"answer"

    rollouts = DirectRollouts(ask, post, LONG_S)
    await rollouts.rollout(group("g"))
    await eventually(lambda: len(asked) == 2, LONG_S)
    await rollouts.rollout(group("h"))
    assert [body["done"] for body in asked] == [[], ["g"], ["g"]]
