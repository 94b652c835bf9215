"""The observer against a gateway of the tests: in order, whole, bounded, and in nobody's way."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlx.learner.watch import observer as module
from rlx.learner.watch.observer import MAX_WAITING, Observer, shortened

WAIT_S = 60.0


class Gateway:
    """`answer(body)` gives status and body of each answer; what came is in `bodies`."""

    def __init__(self, answer: Callable[[dict[str, Any]], tuple[int, Any]] | None = None):
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answer = answer or (lambda body: (200, {"events": [], "next": 0}))
        self.came = threading.Condition()
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with gateway.came:
                    gateway.bodies.append(body)
                    gateway.headers.append({name.lower(): value for name, value in self.headers.items()})
                    gateway.came.notify_all()
                status, said = gateway.answer(body)
                data = json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def records(self, field: str) -> list[dict[str, Any]]:
        return [record for body in self.bodies for record in body.get(field, [])]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.came:
            assert self.came.wait_for(condition, WAIT_S)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PERIOD_S", 0.01)
    monkeypatch.setattr(module, "MAX_PAUSE_S", 0.02)
    monkeypatch.setattr(
        module, "_TIMEOUT", WAIT_S
    )  # an answer that comes late on a busy machine is no gateway that is gone
    monkeypatch.setattr(module, "_CLOSE_S", WAIT_S)


@contextmanager
def observing(gateway: Gateway, **more: Any) -> Iterator[tuple[Observer, list[Any], list[str]]]:
    events: list[Any] = []
    said: list[str] = []
    run = {"name": "cfg", "output_dir": "out", "total_steps": 9}
    observer = Observer(gateway.url, "secret", "session", run, events.extend, said.append, **more)
    observer.start()
    try:
        yield observer, events, said
    finally:
        observer.close()
        gateway.server.shutdown()
        gateway.server.server_close()


def line(**record: Any) -> bytes:
    return json.dumps(record).encode()


def test_records_arrive_in_order_by_kind_with_run_session_and_token() -> None:
    gateway = Gateway()
    with observing(gateway) as (observer, _, said):
        observer.take("metrics", [line(step=1), line(step=2)])
        observer.take("samples", [line(step=1, completion="“a”")])
        observer.take("evals", [line(step=0, reward=0.5)])
        observer.take("spans", [line(step=1)])
        observer.take("events", [line(source="service", kind="worker_down"), line(source="learner", kind="publish")])
        gateway.wait_for(lambda: bool(gateway.records("events")))
    assert gateway.records("metrics") == [{"step": 1}, {"step": 2}]
    assert gateway.records("samples") == [{"step": 1, "completion": "“a”"}]
    assert gateway.records("evaluations") == [{"step": 0, "reward": 0.5}]
    assert gateway.records("events") == [{"source": "learner", "kind": "publish"}]
    assert not any("spans" in body for body in gateway.bodies)
    assert gateway.bodies[0]["run"] == {"name": "cfg", "output_dir": "out", "total_steps": 9}
    assert gateway.headers[0]["authorization"] == "Bearer secret"
    assert gateway.headers[0]["rlx-session"] == "session"
    assert (observer.lost, said) == (0, [])


def test_the_services_events_come_once_each_also_over_its_restart_and_not_those_known_before() -> None:
    ring = [{"n": 1, "time": 10.0}, {"n": 2, "time": 20.0}]
    fails, change = threading.Event(), threading.Lock()

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        with change:
            if fails.is_set():
                fails.clear()
                return 503, {}
            return 200, {"events": [event for event in ring if event["n"] > body["after"]], "next": ring[-1]["n"]}

    gateway = Gateway(answer)
    with observing(gateway, since=10.0) as (_, events, _):
        gateway.wait_for(lambda: any(body["after"] == 2 for body in gateway.bodies))
        fails.set()  # what was before this learner stays so when the answers count anew
        gateway.wait_for(lambda: not fails.is_set() and gateway.bodies[-1]["after"] == 2)
        with change:
            ring[:] = [{"n": n, "time": 30.0 + n} for n in range(1, 4)]  # another process
            fails.set()
        gateway.wait_for(lambda: any(body["after"] == 3 for body in gateway.bodies))
        ring.append({"n": 4, "time": 5.0})  # its clock was set back
        gateway.wait_for(lambda: any(body["after"] == 4 for body in gateway.bodies))
        fails.set()
        gateway.wait_for(lambda: not fails.is_set() and gateway.bodies[-1]["after"] == 4)
    assert [event["time"] for event in events] == [20.0, 31.0, 32.0, 33.0, 5.0]


def test_what_a_gateway_that_fails_did_not_take_comes_again_in_order() -> None:
    taken: list[int] = []
    failing = threading.Event()
    failing.set()

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        if failing.is_set():
            return 502, {}
        taken.extend(record["step"] for record in body.get("metrics", []))
        return 200, {"events": [], "next": 7}

    gateway = Gateway(answer)
    with observing(gateway) as (observer, _, said):
        observer.take("metrics", [line(step=1)])
        gateway.wait_for(lambda: len(gateway.bodies) > 2)
        observer.take("metrics", [line(step=2)])
        failing.clear()
        gateway.wait_for(lambda: gateway.bodies[-1]["after"] == 7)
    assert taken == [1, 2]
    assert (observer.lost, said) == (0, [])


def test_a_gateway_that_hangs_costs_the_callers_nothing_and_samples_go_before_the_rest() -> None:
    hangs = threading.Event()
    gateway = Gateway(lambda body: (hangs.wait(WAIT_S), (200, {"events": [], "next": 0}))[1])
    with observing(gateway) as (observer, _, said):
        gateway.wait_for(lambda: len(gateway.bodies) > 0)
        sample = line(step=1, completion="x" * 100_000)
        began = time.thread_time()
        for step in range(300):
            observer.take("metrics", [line(step=step)])
            observer.take("samples", [sample])
        cpu_s = time.thread_time() - began
        with observer._lock:
            kept = list(observer._waiting)
        hangs.set()
    assert cpu_s < 2.0
    assert sum(len(data) for _, data in kept) <= MAX_WAITING
    assert [json.loads(data)["step"] for name, data in kept if name == "metrics"] == list(range(300))
    assert observer.lost == 300 - sum(name == "samples" for name, _ in kept) > 200
    assert len(said) == 1
    assert "slow or gone" in said[0]


@pytest.mark.parametrize("status", [401, 404, 409])
def test_a_gateway_that_refuses_is_asked_no_more_and_that_is_said_once(status: int) -> None:
    gateway = Gateway(lambda body: (status, {}))
    with observing(gateway) as (observer, _, said):
        observer.take("metrics", [line(step=1)])
        observer._thread.join(WAIT_S)
        assert not observer._thread.is_alive()
        observer.take("metrics", [line(step=2)])
    assert len(gateway.records("metrics")) <= 1
    assert len(said) == 1
    assert f"HTTP {status}" in said[0]
    assert not observer._waiting


def test_no_gateway_at_all_ends_nothing_and_closing_takes_seconds_at_most() -> None:
    gateway = Gateway()
    gateway.url = "http://127.0.0.1:1"
    with observing(gateway) as (observer, _, said):
        observer.take("metrics", [line(step=1)])
        began = time.monotonic()
        observer.close()
        assert time.monotonic() - began < 30
    assert said == []


def test_what_waits_is_sent_when_the_run_ends() -> None:
    gateway = Gateway()
    with observing(gateway) as (observer, _, _):
        gateway.wait_for(lambda: len(gateway.bodies) > 0)
        observer.take("events", [line(kind="run_finished")])
        observer.close()
        assert gateway.records("events") == [{"kind": "run_finished"}]


def test_a_long_sample_goes_without_its_tokens_and_with_the_beginning_of_its_texts() -> None:
    rows = [{"ids": [1] * 300_000}]
    gateway = Gateway()
    with observing(gateway) as (observer, _, _):
        observer.take("samples", [line(step=1, completion="y" * 50_000, rows=rows, rewards={"r": 1.0})])
        gateway.wait_for(lambda: bool(gateway.records("samples")))
    [sample] = gateway.records("samples")
    assert sample == {"step": 1, "completion": "y" * 20_000, "rewards": {"r": 1.0}, "shortened": True}


def test_a_long_prompt_of_messages_is_left_out() -> None:
    record = json.loads(shortened(line(step=1, prompt=[{"role": "user", "content": "z" * 600_000}])))
    assert record == {"step": 1, "prompt": None, "shortened": True}
