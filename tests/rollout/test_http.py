"""The service over real HTTP: uvicorn on a free port, httpx as the client."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import stat
from dataclasses import replace

import httpx
import numpy as np
import pytest
from held_port import held_port
from service_parts import (
    QUICK,
    TOKEN,
    LocalScorer,
    LocalWorker,
    chunks,
    eventually,
    group,
    make_service,
    on_http,
    started,
    weights,
)

from rlx.errors import ConfigError, DeadlineExceeded, UserCodeError
from rlx.frame import CONTENT_TYPE, decode_frame, encode_frame
from rlx.rollout import http_bodies, weights_store
from rlx.rollout.app import create_app
from rlx.rollout.auth import service_token
from rlx.rollout.engine_worker import EngineWorker
from rlx.rollout.fake_engine import FakeEngine
from rlx.rollout.gateway import bind, quiet_collector, serving
from rlx.rollout.group_app import GroupApp
from rlx.wire import GroupResult, Sampling

FRAME = {"content-type": CONTENT_TYPE}
BEARER = {"authorization": f"Bearer {TOKEN}"}
PEOPLE = {"key": "p-1", "prompt": "1+1=", "prompt_ids": [1, 2], "n": 2, "sampling": {"max_tokens": 3}}


def client(url, **settings):
    return httpx.AsyncClient(base_url=url, trust_env=False, timeout=60, **settings)


def error_of(answer):
    return answer.status_code, answer.json()["error"]["type"], answer.json()["error"]["message"]


async def test_a_frame_is_answered_with_a_frame():
    async with started(make_service([LocalWorker("w")])) as service, on_http(service) as url, client(url) as http:
        answer = await http.post("/v1/rollouts", content=group().encode(), headers=FRAME)
    assert answer.headers["content-type"] == CONTENT_TYPE
    result = GroupResult.decode(answer.content)
    assert (result.key, result.worker) == ("g-1", "w")
    np.testing.assert_array_equal(result.episodes[1].rows[0].ids, [7, 8, 9])


async def test_people_write_and_read_json_with_null_for_a_reward_that_does_not_apply():
    async with started(make_service([LocalWorker()])) as service, on_http(service) as url, client(url) as http:
        body = (await http.post("/v1/rollouts", json=PEOPLE)).json()
        assert [c["rewards"] for c in body["episodes"]] == [{"rewards.position": None}, {"rewards.position": 1.0}]
        assert body["episodes"][0]["text"] == "7 8 9"
        frame = await http.post("/v1/rollouts", json=PEOPLE, headers={"accept": CONTENT_TYPE})
        assert GroupResult.decode(frame.content).key == "p-1"
        as_json = await http.post(
            "/v1/rollouts", content=group("f").encode(), headers={**FRAME, "accept": "application/json"}
        )
        assert as_json.json()["key"] == "f"


async def test_concurrent_duplicates_and_a_lost_connection_give_one_rollout():
    worker = LocalWorker()
    async with started(make_service([worker])) as service, on_http(service) as url, client(url) as http:
        worker.open.clear()

        def post():
            return asyncio.create_task(http.post("/v1/rollouts", content=group().encode(), headers=FRAME))

        lost, kept, second = post(), post(), post()
        await eventually(lambda: "g-1" in worker.generated)
        lost.cancel()
        await asyncio.gather(lost, return_exceptions=True)
        worker.open.set()
        answers = [await kept, await second, await post()]
    assert worker.generated.count("g-1") == 1
    assert len({answer.content for answer in answers}) == 1


async def test_the_same_key_with_another_body_is_409():
    async with started(make_service([LocalWorker()])) as service, on_http(service) as url, client(url) as http:
        await http.post("/v1/rollouts", json=PEOPLE)
        status, name, message = error_of(await http.post("/v1/rollouts", json={**PEOPLE, "prompt_ids": [3]}))
    assert (status, name) == (409, "ServiceError")
    assert "'p-1'" in message


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserCodeError("trl.reward_funcs: rewards.f returned 3 values"), 422),
        (DeadlineExceeded("reward rewards.f did not answer"), 504),
        (ConfigError("trl.reward_funcs"), 400),
    ],
)
async def test_errors_keep_their_class_and_message(error, status):
    scorer = LocalScorer()
    scorer.error = error
    async with started(make_service([LocalWorker()], scorer)) as service, on_http(service) as url, client(url) as http:
        answer = await http.post("/v1/rollouts", json=PEOPLE)
    assert error_of(answer) == (status, type(error).__name__, str(error))


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        ({"content": b"RLX1 what is this", "headers": FRAME}, 400, "header"),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "not JSON"),
        ({"content": b"[" * 100_000, "headers": {"content-type": "application/json"}}, 400, "not JSON"),
        ({"json": [1]}, 400, "JSON object"),
        ({"json": {**PEOPLE, "n": "many"}}, 400, "group request"),
        ({"json": {**PEOPLE, "prompt_ids": [2**40]}}, 400, "group request"),
        ({"json": {**PEOPLE, "prompt_ids": [[1], [2]]}}, 400, "prompt_ids"),
        ({"json": {**PEOPLE, "sampling": {"max_token": 3}}}, 400, "max_token"),
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415, "text/plain"),
    ],
)
async def test_a_body_that_cannot_be_read_is_told_so(sent, status, message):
    async with started(make_service([LocalWorker()])) as service, on_http(service) as url, client(url) as http:
        answer = await http.post("/v1/rollouts", **sent)
    assert error_of(answer)[:2] == (status, "WireError")
    assert message in error_of(answer)[2]


async def test_a_body_above_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(http_bodies, "MAX_BODY_BYTES", 1000)
    async with started(make_service([LocalWorker()])) as service, on_http(service) as url, client(url) as http:
        answer = await http.post("/v1/rollouts", content=bytes(1001), headers=FRAME)
    assert answer.status_code == 413


async def test_an_unknown_route_and_a_wrong_method_are_json_too():
    async with started(make_service([LocalWorker()])) as service, on_http(service) as url, client(url) as http:
        assert error_of(await http.get("/v2/nothing"))[:2] == (404, "ServiceError")
        assert (await http.get("/v1/rollouts")).status_code == 405


CONTROL = [
    ("POST", "/v1/session"), ("POST", "/v1/rollouts/cancel"), ("POST", "/v1/workers"), ("DELETE", "/v1/workers/w"),
    ("POST", "/v1/weights/announce"), ("PUT", "/v1/weights/1"), ("POST", "/v1/weights/1/commit"), ("POST", "/v1/logprobs"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), CONTROL)
@pytest.mark.parametrize("header", [{}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}])
async def test_the_control_plane_needs_the_token(method, path, header):
    async with started(make_service([LocalWorker()])) as service, on_http(service) as url, client(url) as http:
        answer = await http.request(method, path, json={}, headers=header)
    assert answer.status_code == 401
    assert TOKEN not in answer.text


async def test_a_request_without_a_field_is_told_which():
    async with started(make_service([LocalWorker()])) as service, on_http(service) as url, client(url) as http:
        group = await http.post("/v1/rollouts", json={})
        session = await http.post("/v1/session", json={}, headers=BEARER)
    assert error_of(group) == (400, "WireError", "not a group request: the field 'sampling' is missing")
    assert error_of(session) == (400, "WireError", "the field 'session' is missing, a str")


async def test_a_service_without_a_token_has_a_closed_control_plane():
    async with (
        started(make_service([LocalWorker()])) as service,
        on_http(service, token=None) as url,
        client(url) as http,
    ):
        answer = await http.post("/v1/weights/1/commit", headers={"authorization": "Bearer None"})
    assert answer.status_code == 401


async def test_the_data_plane_needs_the_token_when_it_is_told_to_and_health_never():
    service = make_service([LocalWorker()])
    async with started(service), on_http(service, require_token_for_data=True) as url, client(url) as http:
        for path in ("/v1/workers", "/v1/models"):
            assert (await http.get(path)).status_code == 401
            assert (await http.get(path, headers=BEARER)).status_code == 200
        assert (await http.post("/v1/rollouts", json=PEOPLE)).status_code == 401
        assert (await http.get("/health")).status_code == 200


async def test_health_answers_while_the_workers_load_then_ok_then_stopping():
    worker = LocalWorker("slow")
    worker.open.clear()
    service = make_service([LocalWorker("quick"), worker])
    async with on_http(service) as url, client(url) as http:
        starting = asyncio.create_task(service.start())
        await eventually(lambda: service.load_progress().ready == 2)
        loading = await http.get("/health")
        assert (loading.status_code, loading.json()["status"]) == (503, "loading")
        assert loading.json()["progress"]["waiting_for"] == ["slow"]
        assert error_of(await http.post("/v1/rollouts", json=PEOPLE))[:2] == (503, "ServiceUnavailable")
        worker.open.set()
        await starting
        ready = await http.get("/health")
        assert (ready.status_code, ready.json()["status"]) == (200, "ok")
        await service.drain(0)
        stopping = await http.get("/health")
        assert (stopping.status_code, stopping.json()["status"]) == (503, "stopping")
        answer = error_of(await http.post("/v1/rollouts", json=PEOPLE))
        assert answer == (503, "ServiceUnavailable", "the service is stopping")


async def test_health_names_a_dead_worker():
    worker = LocalWorker("w-2")
    async with started(make_service([worker])) as service, on_http(service) as url, client(url) as http:
        worker.dead = "killed by the kernel"
        await eventually(
            lambda: "killed by the kernel" in service.health()[1]["cause"]
        )  # on a busy machine late is first
        body = (await http.get("/health")).json()
    assert body["status"] == "down"
    assert "w-2" in body["cause"]
    assert "killed by the kernel" in body["cause"]


async def test_openai_routes_pass_through_stream_and_keep_the_engines_status():
    async with started(make_service([LocalWorker()])) as service, on_http(service) as url, client(url) as http:
        plain = await http.post("/v1/chat/completions", json={"messages": []})
        assert plain.json()["object"] == "chat/completions"
        async with http.stream("POST", "/v1/completions", json={"prompt": "1", "stream": True}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert [line async for line in answer.aiter_lines() if line] == ["data: 7", "data: 8", "data: [DONE]"]
        assert (await http.post("/v1/completions", json={"model": "nobody"})).status_code == 404
        assert service.workers()[0].in_flight == 0
        assert (await http.get("/v1/models")).json()["data"][0]["id"] == "tiny-model"


async def test_a_reader_that_leaves_a_stream_frees_the_worker():
    class Endless(LocalWorker):
        async def _stream(self):
            while True:
                yield "data: 1\n\n"
                await asyncio.sleep(0.01)

    async with started(make_service([Endless()])) as service, on_http(service) as url, client(url) as http:
        async with http.stream("POST", "/v1/completions", json={"stream": True}) as answer:
            await anext(answer.aiter_lines())
            assert service.workers()[0].in_flight == 1
        await eventually(lambda: service.workers()[0].in_flight == 0)


async def test_a_reader_that_leaves_while_it_is_written_to_frees_the_worker_at_once():
    service, full = make_service([LocalWorker()]), asyncio.Event()
    messages = iter([{"type": "http.request", "body": b'{"stream": true}'}])

    async def receive():
        if (message := next(messages, None)) is None:
            await full.wait()
        return message or {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.body":
            full.set()
            await asyncio.Event().wait()

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    async with started(service):
        await create_app(service, TOKEN, require_token_for_data=False)(scope, receive, send)
        assert service.workers()[0].in_flight == 0


async def test_prompt_logprobs_come_per_worker_as_a_frame_or_as_json():
    workers = [LocalWorker("a"), LocalWorker("b")]
    async with started(make_service(workers)) as service, on_http(service) as url, client(url, headers=BEARER) as http:
        body = (await http.post("/v1/logprobs", json={"ids": [5, 6, 7]})).json()
        assert body == {"logprobs": {"a": [-1.0, -2.0], "b": [-1.0, -2.0]}}
        frame = encode_frame({"worker": "b"}, {"ids": np.array([5, 6, 7], np.int32)})
        answer = await http.post("/v1/logprobs", content=frame, headers=FRAME)
        blocks = decode_frame(answer.content)[1]
        assert {name: (values.dtype, values.tolist()) for name, values in blocks.items()} == {
            "b": (np.dtype("<f4"), [-1.0, -2.0])
        }
        for wrong in ({"ids": [5]}, {"ids": "x"}, {"ids": [1.5, 2.5]}, {}, {"ids": [1, 2**33]}, {"ids": [[1], [1, 2]]}):
            assert error_of(await http.post("/v1/logprobs", json=wrong))[:2] == (400, "WireError")
        assert (await http.post("/v1/logprobs", json={"ids": [1, 2], "worker": "c"})).status_code == 503


async def test_weights_travel_over_http_and_wrong_bytes_do_not():
    worker, data = LocalWorker(), bytes(range(256)) * 4000
    async with started(make_service([worker])) as service, on_http(service) as url, client(url, headers=BEARER) as http:
        manifest = weights(1, data).to_json()
        assert (await http.post("/v1/weights/announce", json=manifest)).status_code == 200
        wrong = await http.put("/v1/weights/1", content=data[:-1] + b"?")
        assert error_of(wrong)[:2] == (502, "WeightSyncError")
        assert (await http.get("/v1/workers")).json()["weight_version"] == 0
        await http.post("/v1/weights/announce", json=manifest)
        assert (await http.put("/v1/weights/1", content=data)).status_code == 200
        times = (await http.post("/v1/weights/1/commit")).json()
        assert times["nbytes"] == len(data)
        body = (await http.get("/v1/workers")).json()
        assert (body["weight_version"], body["workers"][0]["weight_version"]) == (1, 1)
        assert error_of(await http.post("/v1/weights/announce", json=manifest))[1] == "WeightSyncError"
        assert error_of(await http.post("/v1/weights/announce", json={"version": 9}))[1] == "WireError"
    assert worker.committed == [data]


async def test_a_learner_that_dies_in_the_middle_of_the_bytes_does_not_block_the_next():
    worker = LocalWorker()
    async with started(make_service([worker])) as service, on_http(service) as url, client(url, headers=BEARER) as http:
        host, port = url.removeprefix("http://").split(":")
        await http.post("/v1/weights/announce", json=weights(1, b"abcd").to_json())
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"PUT /v1/weights/1 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 4\r\n\r\nab"
        writer.write(head.encode())
        await writer.drain()
        await eventually(lambda: service.weights._pending.receiving)
        writer.close()
        assert (await http.post("/v1/weights/announce", json=weights(1, b"efgh").to_json())).status_code == 200
        assert (await http.put("/v1/weights/1", content=b"efgh")).status_code == 200
        assert (await http.post("/v1/weights/1/commit")).status_code == 200
    assert worker.committed == [b"efgh"]


async def test_a_defect_of_the_service_is_json_and_says_where_to_look():
    class Defective(LocalWorker):
        async def openai(self, route, body):
            raise ZeroDivisionError("one over nothing")

    async with started(make_service([Defective()])) as service, on_http(service) as url, client(url) as http:
        status, _, message = error_of(await http.post("/v1/completions", json={}))
    assert status == 500
    assert "ZeroDivisionError: one over nothing" in message


# --- sessions and cancelled groups ---


def fake_service(*engines):
    return make_service([EngineWorker(f"w-{i}", engine) for i, engine in enumerate(engines)])


def long_group(key, n=2):
    return replace(group(key, n), sampling=Sampling(max_tokens=100_000))


def post_group(http, request):
    return asyncio.create_task(http.post("/v1/rollouts", content=request.encode(), headers=FRAME))


def endless_engine():
    return FakeEngine(seconds_per_token=0.001, length_of=lambda *_: 10**6)


async def test_a_cancelled_group_leaves_the_engine_and_its_caller_hears_of_it():
    engine = endless_engine()
    service = fake_service(engine)
    async with started(service), on_http(service) as url, client(url, headers=BEARER) as http:
        waiting = [post_group(http, long_group(key)) for key in ("s/1", "s/1", "s/2")]
        await eventually(lambda: engine.load().running == 4)
        answer = await http.post("/v1/rollouts/cancel", json={"keys": ["s/1", "s/none"]})
        assert answer.json() == {"cancelled": ["s/1"]}
        for gone in await asyncio.gather(*waiting[:2]):
            assert error_of(gone) == (409, "GroupCancelled", "group 's/1' was cancelled by the learner")
        await eventually(lambda: engine.in_flight == 1)
        assert engine.load().running + engine.load().waiting == 2
        assert [s.in_flight for s in service.workers()] == [2]
        assert error_of(await post_group(http, long_group("s/none")))[1] == "GroupCancelled"
        await http.post("/v1/rollouts/cancel", json={"keys": ["s/2"]})
        await eventually(lambda: engine.in_flight == 0)
        for wrong in ({}, {"keys": "s/2"}, {"keys": [1]}):
            assert error_of(await http.post("/v1/rollouts/cancel", json=wrong))[:2] == (400, "WireError")


async def test_a_finished_group_is_not_cancelled_and_still_there():
    service = make_service([LocalWorker()])
    async with started(service), on_http(service) as url, client(url, headers=BEARER) as http:
        await http.post("/v1/rollouts", json=PEOPLE)
        assert (await http.post("/v1/rollouts/cancel", json={"keys": ["p-1"]})).json() == {"cancelled": []}
        assert (await http.post("/v1/rollouts", json=PEOPLE)).status_code == 200


async def test_a_new_session_replaces_the_old_one_and_what_it_left_behind():
    engine = endless_engine()
    service = fake_service(engine)
    async with started(service), on_http(service) as url, client(url, headers=BEARER) as http:

        def begin(session):
            return http.post("/v1/session", json={"session": session})

        assert (await http.post("/v1/rollouts", json=PEOPLE)).status_code == 200, "no session: anybody is served"
        assert (await begin("old")).json() == {"instance": service.instance, "weight_version": 0, "replaced": []}
        waiting = post_group(http, long_group("old/1"))
        await eventually(lambda: engine.load().running == 2)  # one would be a probe
        assert (await begin("old")).json()["replaced"] == []
        assert (await begin("new")).json()["replaced"] == ["old/1"]
        status, name, message = error_of(await waiting)
        assert (status, name) == (409, "SessionReplaced")
        assert "the session 'new' now: another learner took it over" in message
        await eventually(lambda: engine.in_flight == 0)
        late = await post_group(http, long_group("old/2"))
        assert error_of(late)[:2] == (409, "SessionReplaced")
        manifest = weights(1, b"abcd").to_json()
        stale = await http.post("/v1/weights/announce", json=manifest, headers={"rlx-session": "old"})
        assert error_of(stale)[:2] == (409, "SessionReplaced")
        fresh = await post_group(http, group("new/1"))
        assert fresh.status_code == 200
        for wrong in ({}, {"session": ""}, {"session": "a/b"}, {"session": 3}):
            assert error_of(await http.post("/v1/session", json=wrong))[:2] == (400, "WireError")
        assert (await http.get("/health")).json()["instance"] == service.instance
        assert (await http.get("/v1/workers")).json()["instance"] == service.instance


@pytest.mark.parametrize("all_come", [True, False])
async def test_a_session_that_begins_while_the_weights_of_another_come_is_what_that_learner_is_told(all_come):
    service = make_service([LocalWorker()])
    async with started(service), on_http(service) as url, client(url, headers=BEARER) as http:
        old = {"rlx-session": "old"}
        await http.post("/v1/session", json={"session": "old"})
        await http.post("/v1/weights/announce", json=weights(1, b"abcd").to_json(), headers=old)

        async def halves():
            yield b"ab"
            await eventually(lambda: service.weights._pending.receiving)
            await http.post("/v1/session", json={"session": "new"})
            if all_come:  # else it is told of the bytes that are missing
                yield b"cd"

        length = {"content-length": "4"} if all_come else {}
        status, name, message = error_of(await http.put("/v1/weights/1", content=halves(), headers=old | length))
        assert (status, name) == (409, "SessionReplaced")
        assert "the session 'new' now: another learner took it over" in message


async def test_a_new_session_discards_an_update_that_was_not_committed(monkeypatch, tmp_path):
    monkeypatch.setattr(weights_store, "SHARED_MEMORY", tmp_path)
    service = make_service([LocalWorker()])
    async with started(service), on_http(service) as url, client(url, headers=BEARER) as http:
        await http.post("/v1/session", json={"session": "old"})
        await http.post("/v1/weights/announce", json=weights(1, b"abcd").to_json())
        await http.put("/v1/weights/1", content=b"abcd")
        await http.post("/v1/session", json={"session": "new"})
        assert list(tmp_path.iterdir()) == []
        assert error_of(await http.post("/v1/weights/1/commit"))[1] == "WeightSyncError"


async def test_an_announcement_whose_body_comes_after_another_session_began_is_refused_and_discards_nothing():
    service, sent = make_service([LocalWorker()]), []
    app = create_app(service, TOKEN, require_token_for_data=False)

    async def body_after_another_learner():
        service.begin_session("new")
        await service.weights.announce(weights(1, b"efgh"))
        await service.weights.receive(1, chunks(b"efgh"))
        return {"type": "http.request", "body": json.dumps(weights(1, b"abcd").to_json()).encode()}

    async def send(message):
        sent.append(message)

    headers = {**BEARER, "rlx-session": "old", "content-type": "application/json"}
    scope = {
        "type": "http", "method": "POST", "path": "/v1/weights/announce", "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    async with started(service):
        service.begin_session("old")
        await app(scope, body_after_another_learner, send)
        assert (sent[0]["status"], json.loads(sent[1]["body"])["error"]["type"]) == (409, "SessionReplaced")
        assert (await service.weights.commit(1)).workers == {"worker-0": 1}


async def test_a_process_that_knows_nothing_of_the_session_says_so_instead_of_sampling_with_old_weights():
    service = make_service([LocalWorker()])
    async with started(service), on_http(service) as url, client(url, headers=BEARER) as http:
        mine = {**FRAME, "rlx-session": "s"}
        answer = error_of(await http.post("/v1/rollouts", content=group("s/1").encode(), headers=mine))
        assert answer[:2] == (503, "ServiceUnavailable")
        assert "started anew" in answer[2]
        manifest = weights(1, b"abcd").to_json()
        answer = error_of(await http.post("/v1/weights/announce", json=manifest, headers={"rlx-session": "s"}))
        assert answer[:2] == (503, "ServiceUnavailable")
        await http.post("/v1/session", json={"session": "s"})
        assert (await http.post("/v1/rollouts", content=group("s/1").encode(), headers=mine)).status_code == 200


# --- workers that are lost, join and leave ---


async def test_a_killed_worker_costs_its_groups_time_and_nothing_else():
    is_slow = True
    engines = [FakeEngine(decode_s=lambda _: 0.3 if is_slow else 0.0, length_of=lambda *_: 100) for _ in range(2)]
    service = fake_service(*engines)
    async with started(service), on_http(service) as url, client(url) as http:
        requests = [long_group(f"g{i}") for i in range(8)]
        waiting = [post_group(http, request) for request in requests]
        await eventually(lambda: service.groups.num_running == 8 and all(m.in_flight for m in service.fleet.members))
        await engines[0].close()
        is_slow = False
        answers = [GroupResult.decode(answer.content) for answer in await asyncio.gather(*waiting)]
        assert [answer.key for answer in answers] == [request.key for request in requests]
        assert {e.rows[0].ids.size for answer in answers for e in answer.episodes} == {100}
        assert "w-1" in {answer.worker for answer in answers}
        await eventually(lambda: service.health()[1]["status"] == "ok")
        states = (await http.get("/v1/workers")).json()["workers"]
        assert [w["name"] for w in states] == ["w-0", "w-1"]
        assert all(w["load"]["generated_tokens"] >= 0 and w["limit"] >= 1 for w in states)


async def test_a_service_that_lost_all_workers_for_good_answers_503_at_once():
    workers = [LocalWorker("a"), LocalWorker("b")]
    service = make_service(workers, settings=QUICK.model_copy(update={"max_restarts": 0}))
    async with started(service), on_http(service) as url, client(url) as http:
        for worker in workers:
            worker.dead = f"reason {worker.name}"
        await eventually(lambda: [w.state for w in service.workers()] == ["gone", "gone"])
        status, name, message = error_of(await post_group(http, group(deadline_s=60)))
        assert (status, name) == (503, "ServiceUnavailable")
        assert "reason a" in message
        assert "reason b" in message
        assert (await http.get("/health")).json()["status"] == "down"


async def test_workers_are_added_and_removed_over_http():
    service = make_service([LocalWorker("a")], make_worker=lambda: LocalWorker("b"))
    async with started(service), on_http(service) as url, client(url, headers=BEARER) as http:
        assert (await http.post("/v1/workers", json={"count": 1})).json() == {"names": ["b"]}
        await eventually(lambda: len(service.fleet.ready()) == 2)
        assert (await http.delete("/v1/workers/a")).json() == {"name": "a"}
        await eventually(lambda: [w.name for w in service.workers()] == ["b"])
        for answer in (await http.delete("/v1/workers/a"), await http.delete("/v1/workers/b")):
            assert error_of(answer)[:2] == (409, "RequestRefused")
        for wrong in ({}, {"count": "1"}, {"count": 0}, {"count": True}, {"count": 10**6}):
            assert error_of(await http.post("/v1/workers", json=wrong))[:2] == (400, "WireError")


async def test_a_prompt_beyond_the_context_is_422():
    service = make_service([LocalWorker()], max_model_len=2)
    async with started(service), on_http(service) as url, client(url) as http:
        assert error_of(await http.post("/v1/rollouts", json=PEOPLE))[:2] == (422, "RequestTooLong")


def test_a_port_in_use_is_a_configuration_error_that_says_what_to_write():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"vllm\.port: {port} is in use.*vllm\.port: \d+"):
            bind("127.0.0.1", port)


def test_two_services_cannot_take_one_port_even_before_they_serve():
    with bind("127.0.0.1", 0) as first, pytest.raises(ConfigError, match=r"vllm\.port"):
        bind("127.0.0.1", first.getsockname()[1])


@pytest.mark.parametrize("host", ["203.0.113.9", "no such host"])
def test_an_address_that_is_not_here_is_a_configuration_error(host):
    with pytest.raises(ConfigError, match=r"vllm\.host"):
        bind(host, 0)


async def test_the_port_is_free_after_the_gateway_ends():
    app = create_app(make_service([LocalWorker()]), TOKEN, require_token_for_data=False)
    with held_port() as port:
        async with serving(app, bind("127.0.0.1", port)):
            pass
        bind("127.0.0.1", port).close()


def test_a_quiet_collector_leaves_alone_what_was_loaded_and_a_thousand_requests_in_flight():
    before, runs = gc.get_threshold(), []

    def watch(phase, info):
        runs.append(info)

    try:
        quiet_collector()
        assert gc.get_freeze_count() > 10_000
        gc.callbacks.append(watch)
        in_flight = [[i] for i in range(60_000)]
        assert not runs
        in_flight += [[i] for i in range(60_000)]
        assert runs, "cycles are still found, in the end"
    finally:
        gc.callbacks.remove(watch)
        gc.unfreeze()
        gc.set_threshold(*before)


async def test_a_defect_is_raised_for_the_log_after_its_answer():
    sent = []

    async def send(message):
        sent.append(message)

    async def defect(group):
        raise ZeroDivisionError("oops")

    app = GroupApp("app", defect, [])
    body = json.dumps(PEOPLE).encode()
    receive = iter([{"type": "http.request", "body": body}]).__next__

    async def received():
        return receive()

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/rollouts", "headers": headers}
    with pytest.raises(ZeroDivisionError):
        await app(scope, received, send)
    assert sent[0]["status"] == 500


def test_the_token_is_made_once_private_and_shared(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RLX_TOKEN", raising=False)
    token = service_token()
    assert len(token) >= 32
    assert service_token() == token
    path = tmp_path / ".rlx" / "token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [p.name for p in path.parent.iterdir()] == ["token"]
    monkeypatch.setenv("RLX_TOKEN", "mine")
    assert service_token() == "mine"


def test_an_empty_token_file_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RLX_TOKEN", raising=False)
    (tmp_path / ".rlx").mkdir()
    (tmp_path / ".rlx" / "token").touch()
    with pytest.raises(ConfigError, match=r"token is empty"):
        service_token()


def test_json_answers_have_no_nan():
    body = json.loads(http_bodies.json_response({"a": [float("nan"), 1.0, (float("inf"),)]}).body)
    assert body == {"a": [None, 1.0, [None]]}
