"""Spans to a collector: what it gets, and that one which is gone costs nothing."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from rlx.learner.rank_zero import wants_traces
from rlx.learner.watch import otel as module
from rlx.learner.watch.otel import SpanExport, otlp_exporter

NOW = 1_700_000_000.0


def span(
    step: int, name: str, start: float, end: float, process: str = "learner rank 0", **args: Any
) -> dict[str, Any]:
    return {"step": step, "name": name, "process": process, "track": "training", "start": NOW + start,
            "end": NOW + end, "args": args}  # fmt: skip


SPANS = [
    span(1, "wait for rollouts", 0.0, 2.0),
    span(1, "generate", 0.5, 1.5, "rlx-rollout-0", group="s/0.0", versions=[1, 2]),
    span(1, "episode", 0.5, 1.5, "rlx-episodes-0", group="s/0.0", turns=[[NOW + 0.5, NOW + 1.0]]),
    span(1, "forward and backward", 2.0, 4.0),
    span(2, "forward and backward", 5.0, 6.0),
]


@pytest.fixture
def _closes_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a busy machine."""
    monkeypatch.setattr(module, "_CLOSE_S", 60.0)


@pytest.mark.usefixtures("_closes_in_time")
def test_a_step_is_a_trace_with_its_spans_under_one_root() -> None:
    memory = InMemorySpanExporter()
    export = SpanExport("run", memory)
    export.record("metrics", {"step": 1})
    for record in SPANS:
        export.record("spans", record)
    export.close()
    found = {(s.name, s.attributes["rlx.step"]): s for s in memory.get_finished_spans()}
    assert len(found) == len(SPANS) + 3
    root = found["step 1", 1]
    assert root.parent is None
    assert (root.start_time, root.end_time) == (int(NOW) * 10**9, int(NOW + 4) * 10**9)
    for name in ("wait for rollouts", "generate", "forward and backward", "episode"):
        child = found[name, 1]
        assert (child.parent.span_id, child.context.trace_id) == (root.context.span_id, root.context.trace_id)
    turn, episode = found["turn 0", 1], found["episode", 1]
    assert turn.parent.span_id == episode.context.span_id
    assert found["step 2", 2].context.trace_id != root.context.trace_id
    generate = found["generate", 1]
    assert dict(generate.attributes) == {
        "rlx.step": 1, "rlx.track": "training", "rlx.group": "s/0.0", "rlx.versions": [1, 2]
    }  # fmt: skip
    assert generate.resource.attributes["service.name"] == "rlx"
    assert generate.resource.attributes["service.instance.id"] == "rlx-rollout-0"
    assert len({s.context.span_id for s in found.values()}) == len(found)


@pytest.mark.usefixtures("_closes_in_time")
def test_two_runs_have_traces_of_their_own() -> None:
    ids = []
    for run in ("a", "b"):
        memory = InMemorySpanExporter()
        export = SpanExport(run, memory)
        export.record("spans", SPANS[0])
        export.close()
        ids.append(memory.get_finished_spans()[0].context.trace_id)
    assert ids[0] != ids[1]


@pytest.mark.usefixtures("_closes_in_time")
def test_a_collector_over_http_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    said: list[str] = []
    export = SpanExport("run", otlp_exporter(said.append))
    for record in SPANS:
        export.record("spans", record)
    export.close()
    server.shutdown()
    server.server_close()
    spans = [
        span.name
        for body in bodies
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert sorted(spans) == sorted([*(s["name"] for s in SPANS), "step 1", "step 2", "turn 0"])
    assert said == []


def test_a_collector_that_is_gone_is_said_once_and_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    said, failed = [], threading.Event()

    def say(line: str) -> None:
        said.append(line)
        failed.set()

    export = SpanExport("run", otlp_exporter(say))
    began = time.thread_time()
    for step in range(1000):
        export.record("spans", span(step, "wait", 0.0, 1.0))
    assert time.thread_time() - began < 5.0
    assert failed.wait(60)
    export.record("spans", SPANS[0])
    export.close()
    assert len(said) == 1
    assert "does not take the spans" in said[0]


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, False),
        ({"OTEL_TRACES_EXPORTER": "console"}, False),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, False),
    ],
)
def test_the_environment_says_whether_traces_are_wanted(environ: dict[str, str], wanted: bool) -> None:
    assert wants_traces(environ) is wanted
