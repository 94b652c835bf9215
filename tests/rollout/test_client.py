"""The learner's client against a real service: uvicorn in a thread of its own, real sockets."""

from __future__ import annotations

import asyncio
import http.server
import os
import threading
import time
from contextlib import asynccontextmanager, contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from held_port import held_port
from service_parts import (
    QUICK,
    TOKEN,
    LocalScorer,
    LocalWorker,
    eventually,
    group,
    make_service,
    weights,
)

from rlx.errors import (
    DeadlineExceeded,
    GroupCancelled,
    RequestTooLong,
    ServiceError,
    ServiceUnavailable,
    SessionReplaced,
    UserCodeError,
    WeightSyncError,
)
from rlx.rollout import client as client_module
from rlx.rollout.app import create_app
from rlx.rollout.client import ClientTimeouts, RolloutClient
from rlx.rollout.gateway import bind, serving

TIMEOUTS = ClientTimeouts(call_s=60, publish_s=60, connect_s=30)


class Running:
    """A service on its own thread and loop. `call` runs a function there."""

    def __init__(self, workers, scorer, settings, before_start, port, make_worker):
        self.service = None
        self.workers, self.scorer = workers, scorer
        self._listener = bind("127.0.0.1", port)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._settings, self._before_start, self._make_worker = settings, before_start, make_worker
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))

    async def _main(self):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.service = make_service(self.workers, self.scorer, self._settings, make_worker=self._make_worker)
        async with serving(create_app(self.service, TOKEN, False), self._listener):
            self._up.set()
            await self._before_start()
            await self.service.start()
            await self._stop.wait()
            await self.service.drain(0)

    def call(self, function):
        async def body():
            return function()

        return asyncio.run_coroutine_threadsafe(body(), self._loop).result(60)

    def __enter__(self):
        self._thread.start()
        assert self._up.wait(60)
        return self

    def __exit__(self, *_):
        self.call(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive()


async def nothing():
    pass


def run_service(workers=None, scorer=None, settings=QUICK, before_start=nothing, port=0, make_worker=None):
    return Running(workers or [LocalWorker()], scorer or LocalScorer(), settings, before_start, port, make_worker)


@contextmanager
def served(**kinds):
    with run_service(**kinds) as running, RolloutClient(running.url, TOKEN, TIMEOUTS) as client:
        client.wait_until_ready(60)
        yield SimpleNamespace(client=client, running=running, workers=running.workers, scorer=running.scorer)


@contextmanager
def cutting(port, cuts):
    """A relay to `port` that drops each of the first `cuts` connections once the request was passed on."""
    accepted = []

    async def pipe(reader, writer):
        while data := await reader.read(2**16):
            writer.write(data)

    async def relay(reader, writer):
        accepted.append(1)
        upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", port)
        forth = asyncio.create_task(pipe(reader, upstream))
        if len(accepted) <= cuts:
            await asyncio.sleep(0.1)
        else:
            await pipe(upstream_reader, writer)
        forth.cancel()
        upstream.close()
        writer.close()

    @asynccontextmanager
    async def listening():
        async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
            yield server.sockets[0].getsockname()[1]

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    context = listening()
    relay_port = asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(60)
    try:
        yield relay_port, accepted
    finally:
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()


def test_groups_come_back_in_the_order_asked_for_and_each_is_heard_of():
    heard = []
    with served() as s:
        results = s.client.rollouts([group(f"g-{i}") for i in range(20)], lambda result: heard.append(result.key))
    assert [result.key for result in results] == [f"g-{i}" for i in range(20)]
    assert sorted(heard) == sorted(result.key for result in results)
    np.testing.assert_array_equal(results[3].episodes[0].rows[0].ids, [7, 8, 9])


def test_no_more_than_the_limit_are_in_flight():
    class Counting(LocalWorker):
        now = most = 0

        async def generate(self, request_id, *rest):
            if request_id.startswith("probe-"):
                return await super().generate(request_id, *rest)
            self.now += 1
            self.most = max(self.most, self.now)
            await eventually(lambda: self.most >= 3)
            await asyncio.sleep(0.01)
            self.now -= 1
            return await super().generate(request_id, *rest)

    worker = Counting()
    with (
        run_service(workers=[worker]) as running,
        RolloutClient(running.url, TOKEN, TIMEOUTS, max_in_flight=3) as client,
    ):
        client.wait_until_ready(60)
        client.rollouts([group(f"g-{i}") for i in range(12)])
    assert worker.most == 3


def test_a_lost_connection_resubmits_the_key_and_gets_the_one_rollout():
    with served() as s, cutting(s.running.port, cuts=2) as (port, accepted):
        with RolloutClient(f"http://127.0.0.1:{port}", TOKEN, TIMEOUTS) as client:
            result = client.submit(group()).result(60)
        assert len(accepted) == 3
        assert result.key == "g-1"
        assert s.workers[0].generated.count("g-1") == 1


def test_connections_that_are_always_lost_end_with_an_error_that_says_what_to_type(monkeypatch):
    monkeypatch.setattr(client_module, "_FIRST_PAUSE_S", 0.001)
    with served() as s, cutting(s.running.port, cuts=100) as (port, accepted):
        with (
            RolloutClient(f"http://127.0.0.1:{port}", TOKEN, TIMEOUTS) as client,
            pytest.raises(ServiceUnavailable, match=r"group 'g-1'.*rlx vllm-serve"),
        ):
            client.submit(group()).result(60)
        assert len(accepted) == 6


def test_a_service_that_does_not_answer_is_named_after_the_deadline(monkeypatch):
    monkeypatch.setattr(client_module, "_MARGIN_S", 0.1)
    with (
        bind("127.0.0.1", 0) as silent,
        RolloutClient(f"http://127.0.0.1:{silent.getsockname()[1]}", TOKEN, TIMEOUTS) as client,
        pytest.raises(DeadlineExceeded, match=r"group 'g-1'.*did not answer within 0\.2 s"),
    ):
        client.submit(group(deadline_s=0.2)).result(60)


def test_the_service_errors_are_raised_here_with_their_class_and_message(monkeypatch):
    monkeypatch.setattr(client_module, "_MARGIN_S", 60)
    scorer = LocalScorer()
    with served(scorer=scorer) as s:
        scorer.error = UserCodeError("trl.reward_funcs: rewards.f raised ZeroDivisionError")
        with pytest.raises(UserCodeError, match=r"^trl\.reward_funcs: rewards\.f raised ZeroDivisionError$"):
            s.client.rollouts([group("a"), group("b")])
        scorer.error = None
        s.workers[0].silent = True
        with pytest.raises(DeadlineExceeded, match="worker worker-0 did not answer"):
            s.client.submit(group("c", deadline_s=0.2)).result(60)


def test_waiting_reports_who_is_waited_for_until_all_is_up():
    gate, told = threading.Event(), []

    async def hold():
        await asyncio.to_thread(gate.wait, 60)

    def on_wait(message):
        told.append(message)
        gate.set()

    with run_service(before_start=hold) as running, RolloutClient(running.url, TOKEN, TIMEOUTS) as client:
        assert client.wait_until_ready(60, on_wait)["status"] == "ok"
    assert "is loading, 0 of 2 up, waiting for worker-0, the reward functions" in told[0]


def test_a_service_that_comes_up_later_is_found():
    told, services = [], []

    def on_wait(message):
        told.append(message)
        if not services:
            services.append(run_service(port=port).__enter__())

    with held_port() as port, RolloutClient(f"http://127.0.0.1:{port}", TOKEN, TIMEOUTS) as client:
        try:
            assert client.wait_until_ready(60, on_wait)["status"] == "ok"
        finally:
            services[0].__exit__()
    assert told[0] == f"nobody answers at http://127.0.0.1:{port}"


def test_without_a_service_the_error_says_what_to_type():
    with held_port() as port, RolloutClient(url := f"http://127.0.0.1:{port}", TOKEN, TIMEOUTS) as client:
        said = rf"within 0\.3 s: nobody answers at {url}; .*rlx vllm-serve <cfg\.yaml>"
        with pytest.raises(ServiceUnavailable, match=said):
            client.wait_until_ready(0.3)


def test_a_service_that_answers_late_is_waited_for_to_the_end():
    with bind("127.0.0.1", 0) as silent, RolloutClient("http://unused", TOKEN, TIMEOUTS) as client:
        client.base_url, client._timeouts = f"http://127.0.0.1:{silent.getsockname()[1]}", ClientTimeouts(call_s=0.05)
        with pytest.raises(ServiceUnavailable) as caught:
            client.wait_until_ready(0.3)
        client._timeouts = TIMEOUTS
    said = f"{client.base_url}/health did not answer within 0.05 s"
    assert str(caught.value) == f"no rollout service was ready within 0.3 s: {said}"


def test_something_else_on_the_port_is_told_apart():
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        with (
            RolloutClient(f"http://127.0.0.1:{other.server_port}", TOKEN, TIMEOUTS) as client,
            pytest.raises(ServiceError, match=r"something else than a rollout service.*HTTP 501.*vllm\.port"),
        ):
            client.wait_until_ready(60)
        other.shutdown()
        thread.join(60)


def test_a_dead_worker_is_named_by_the_wait():
    with served() as s:
        s.workers[0].dead = "out of memory"
        while s.client.health()["status"] == "ok":
            time.sleep(0.01)
        with pytest.raises(ServiceUnavailable, match=r"worker-0.*out of memory"):
            s.client.wait_until_ready(0.05)


def test_a_learner_that_did_not_pass_the_gate_does_not_keep_the_next_one_waiting():
    with served() as s:
        fleet = s.running.service.fleet
        s.running.call(lambda: fleet.fail(fleet.members[0], "log p differs", "refused", kept=True))
        assert s.client.wait_until_ready(0.05)["status"] == "unverified"
        s.client.publish(weights(1, b"abcd"), b"abcd")
        assert s.client.health()["status"] == "ok"


@pytest.mark.parametrize("kind", ["bytes", "memoryview", "pieces"])
def test_published_weights_are_what_the_next_tokens_carry(kind):
    data = os.urandom(3 * 2**20 + 4)
    given = {"bytes": data, "memoryview": memoryview(np.frombuffer(data, np.uint8)), "pieces": [data[:5], data[5:]]}
    with served(workers=[LocalWorker("a"), LocalWorker("b")]) as s:
        times = s.client.publish(weights(4, data), given[kind])
        assert times.total_s == pytest.approx(times.announce_s + times.transfer_s + times.commit_s)
        assert min(times.announce_s, times.transfer_s, times.commit_s) > 0
        assert s.client.workers()["weight_version"] == 4
        assert s.client.submit(group()).result(60).episodes[0].rows[0].versions == ((4, 3),)
        assert [worker.committed for worker in s.workers] == [[data], [data]]
        ids = np.array([1, 2, 3])
        assert {name: v.tolist() for name, v in s.client.prompt_logprobs(ids).items()} == {
            "a": [-5.0, -6.0],
            "b": [-5.0, -6.0],
        }
        assert list(s.client.prompt_logprobs(ids, worker="b")) == ["b"]


def test_wrong_bytes_are_an_error_here_and_the_next_publish_works():
    with served() as s:
        with pytest.raises(WeightSyncError, match="changed on the way"):
            s.client.publish(weights(1, b"abcd"), b"abcX")
        assert s.client.workers()["weight_version"] == 0
        s.client.publish(weights(1, b"abcd"), b"abcd")
        assert s.client.workers()["weight_version"] == 1


def test_a_worker_that_does_not_take_the_weights_is_named_here():
    with served(workers=[LocalWorker("good"), LocalWorker("bad")]) as s:
        s.workers[1].takes_other_bytes = True
        s.workers[0].pause_s, s.workers[1].pause_s = 0.2, 0.5
        times = s.client.publish(weights(1, b"abcd"), b"abcd")
        assert times.pause_s == 0.2, "it is that of those that took them"
        [behind] = times.behind
        assert behind.startswith("bad: did not take weights 1")
        assert s.client.submit(group()).result(60).worker == "good"


def test_a_wrong_token_is_told_so():
    with run_service() as running, RolloutClient(running.url, "wrong", TIMEOUTS) as client:
        client.wait_until_ready(60)
        with pytest.raises(ServiceError, match="RLX_TOKEN"):
            client.publish(weights(1, b"abcd"), b"abcd")


def test_cancelled_groups_raise_and_a_replaced_session_is_told_so():
    with served() as s, RolloutClient(s.running.url, TOKEN, TIMEOUTS) as other:
        assert s.client.begin_session("first")["instance"] == s.client.instance()
        s.workers[0].silent = True
        future = s.client.submit(group("first/1"))
        while "first/1" not in s.workers[0].generated:
            time.sleep(0.01)
        s.client.cancel(["first/1", "first/2"])
        with pytest.raises(GroupCancelled, match="first/1"):
            future.result(60)
        with pytest.raises(GroupCancelled, match="first/2"):
            s.client.submit(group("first/2")).result(60)
        future = s.client.submit(group("first/3"))
        while "first/3" not in s.workers[0].generated:
            time.sleep(0.01)
        assert other.begin_session("second")["replaced"] == ["first/3"]
        with pytest.raises(SessionReplaced, match=r"first/3.*'second' now: another learner took it over"):
            future.result(60)
        with pytest.raises(SessionReplaced, match="another learner took it over"):
            s.client.publish(weights(1, b"abcd"), b"abcd")
        s.workers[0].silent = False
        s.workers[0].open.set()
        other.publish(weights(1, b"abcd"), b"abcd")
        assert other.submit(group("second/1")).result(60).key == "second/1"
        with pytest.raises(SessionReplaced, match="another learner took it over"):
            other.submit(group("first/4")).result(60)


def test_people_are_served_while_a_learner_has_the_service():
    with served() as s, RolloutClient(s.running.url, TOKEN, TIMEOUTS) as person:
        s.client.begin_session("learner")
        assert person.submit(group("by hand/1")).result(60).key == "by hand/1"
        s.client.begin_session("next learner")
        assert person.submit(group("by hand/2")).result(60).key == "by hand/2"


def test_a_cancelled_key_may_come_again_in_a_new_session():
    with served() as s:
        s.client.begin_session("s")
        s.workers[0].silent = True  # whichever of the two arrives first
        s.client.cancel(["s/1"])
        with pytest.raises(GroupCancelled):
            s.client.submit(group("s/1")).result(60)
        s.workers[0].silent = False
        s.client.begin_session("s")
        assert s.client.submit(group("s/1")).result(60).key == "s/1"


def test_a_gateway_that_comes_back_on_its_port_is_told_apart_and_serves_the_same_keys_again():
    with held_port() as port, RolloutClient(f"http://127.0.0.1:{port}", TOKEN, TIMEOUTS) as client:
        first = run_service(port=port).__enter__()
        client.wait_until_ready(60)
        instance = client.begin_session("s")["instance"]
        first.workers[0].silent = True
        future = client.submit(group("s/1"))
        while "s/1" not in first.workers[0].generated:
            time.sleep(0.01)
        first.__exit__()
        with run_service(port=port) as second:
            with pytest.raises(ServiceUnavailable, match=r"stopping|loading|started anew|lost or refused"):
                future.result(60)
            client.wait_until_ready(60)
            begun = client.begin_session("s")
            assert begun["instance"] not in (instance, "")
            assert begun["replaced"] == []
            assert client.submit(group("s/1")).result(60).key == "s/1"
            assert second.workers[0].generated.count("s/1") == 1


def test_a_gateway_that_is_gone_is_an_error_after_a_few_tries(monkeypatch):
    monkeypatch.setattr(client_module, "_FIRST_PAUSE_S", 0.01)
    with held_port() as port, RolloutClient(f"http://127.0.0.1:{port}", TOKEN, TIMEOUTS) as client:
        running = run_service(port=port).__enter__()
        client.wait_until_ready(60)
        client.begin_session("s")
        running.__exit__()
        with pytest.raises(ServiceUnavailable, match=r"group 's/1'.*rlx vllm-serve"):
            client.submit(group("s/1")).result(60)
        with pytest.raises(ServiceUnavailable, match=r"weights 1: announce.*rlx vllm-serve"):
            client.publish(weights(1, b"abcd"), b"abcd")
        client.cancel(["s/1"])


def test_a_prompt_beyond_the_context_is_asked_for_once():
    asked = []

    class Strict(LocalWorker):
        async def generate(self, request_id, *rest):
            if request_id == "g-1":
                asked.append(request_id)
                raise RequestTooLong("a prompt of 9 tokens leaves no room")
            return await super().generate(request_id, *rest)

    with served(workers=[Strict()]) as s:
        with pytest.raises(RequestTooLong, match="9 tokens"):
            s.client.submit(group()).result(60)
        assert s.client.health()["status"] == "ok"
    assert asked == ["g-1"]


def test_workers_are_added_and_removed_from_here():
    with served(workers=[LocalWorker("a")], make_worker=lambda: LocalWorker("b")) as s:
        assert s.client.add_workers(1) == ["b"]
        while [w["state"] for w in s.client.workers()["workers"]] != ["ready", "ready"]:
            time.sleep(0.01)
        s.client.remove_worker("a")
        while [w["name"] for w in s.client.workers()["workers"]] != ["b"]:
            time.sleep(0.01)
        with pytest.raises(ServiceError, match="no worker 'a'; the workers are: b"):
            s.client.remove_worker("a")


def test_closing_gives_up_what_is_in_flight_and_ends_the_thread():
    others = set(threading.enumerate())
    with served() as s:
        s.workers[0].silent = True
        future = s.client.submit(group())
        s.client.close()
        s.client.close()
        assert future.cancelled()
        assert "rollout-client" not in [thread.name for thread in set(threading.enumerate()) - others]


def test_what_was_taken_back_reaches_the_service_though_the_client_is_closed_at_once(monkeypatch):
    monkeypatch.setattr(client_module, "_TAKE_BACK_S", 60)
    with served() as s:
        s.workers[0].silent = True
        s.client.submit(group())
        while "g-1" not in s.workers[0].generated:
            time.sleep(0.001)
        s.client.cancel(["g-1"])
        s.client.close()
        groups = s.running.service.groups
        while s.running.call(lambda: groups.num_running):
            time.sleep(0.001)
        assert groups.outcomes == {"ok": 0, "failed": 0, "cancelled": 1}


def test_closing_does_not_wait_long_for_a_service_that_is_gone(monkeypatch):
    monkeypatch.setattr(client_module, "_TAKE_BACK_S", 0.01)
    with bind("127.0.0.1", 0) as silent:
        client = RolloutClient(f"http://127.0.0.1:{silent.getsockname()[1]}", TOKEN, TIMEOUTS)
        future = client.submit(group())
        client.cancel(["g-1"])
        client.close()
        assert future.cancelled()


@pytest.mark.parametrize("direct", [False, True])
def test_what_is_begun_while_it_is_closed_ends_with_it_or_is_refused(direct):
    """Other threads, as that of a live view, do not wait for ever."""
    with run_service() as running:
        client = RolloutClient(running.url, TOKEN, TIMEOUTS, direct=direct)
        client.wait_until_ready(60)
        running.workers[0].silent = True
        begun, futures, refused = threading.Event(), [], []

        def submit():
            try:
                while True:
                    futures.append(client.submit(group(f"g-{len(futures)}")))
                    if len(futures) == 20:
                        begun.set()
            except RuntimeError as error:
                refused.append(str(error))

        thread = threading.Thread(target=submit)
        thread.start()
        assert begun.wait(60)
        client.close()
        thread.join(60)
        assert refused == [f"the client of {running.url} is closed"]
        assert all(future.done() for future in futures)
        with pytest.raises(RuntimeError, match="is closed"):
            client.workers()
