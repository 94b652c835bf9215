"""The run's spans to an OpenTelemetry collector, where the environment names one: `OTEL_EXPORTER_OTLP_ENDPOINT`,
`OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` or `OTEL_TRACES_EXPORTER=otlp`. The SDK's other variables hold.

    RecordFiles ─► record("spans", span) ─► BatchSpanProcessor, its own thread and bounded queue ─► collector

A step is a trace; its root is the span `step N`, which goes last. A collector that is slow or gone costs spans, not time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext, TraceFlags

QUEUE = 2**14
"""Spans that wait for the collector, unless OTEL_BSP_MAX_QUEUE_SIZE says so."""
_CLOSE_S = 5.0
_NEVER = 2**62


class SpanExport:
    """Add `record` to the listeners of RunFiles; one thread calls it. `run` makes the trace ids: those of two runs
    differ."""

    def __init__(self, run: str, exporter: SpanExporter):
        self._run = run
        size = None if "OTEL_BSP_MAX_QUEUE_SIZE" in os.environ else QUEUE
        self._processor = BatchSpanProcessor(exporter, max_queue_size=size)
        self._resources: dict[str, Resource] = {}
        self._steps: dict[int, tuple[float, float]] = {}

    def record(self, name: str, record: Mapping[str, Any]) -> None:
        """A record of the file `name`; those of other files than the spans are nothing to it."""
        if name != "spans":
            return
        step, process, start, end = int(record["step"]), record["process"], record["start"], record["end"]
        if process == "learner rank 0" and record["track"] == "training":
            self._end_steps_before(step)
            first, last = self._steps.get(step, (start, end))
            self._steps[step] = min(first, start), max(last, end)
        args = dict(record["args"])
        turns, root = args.pop("turns", ()), self._root(step)
        own = self._context(root)
        self._emit(process, record["name"], start, end, own, root, {"step": step, "track": record["track"], **args})
        for number, (began, ended) in enumerate(turns):
            self._emit(process, f"turn {number}", began, ended, self._context(root), own, {"step": step})

    def close(self) -> None:
        """Send what is left, for seconds at most."""
        self._end_steps_before(_NEVER)
        closing = threading.Thread(target=self._processor.shutdown, name="otel-close", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)

    def _end_steps_before(self, step: int) -> None:
        for number in sorted(number for number in self._steps if number < step):
            start, end = self._steps.pop(number)
            self._emit("learner rank 0", f"step {number}", start, end, self._root(number), None, {"step": number})

    def _root(self, step: int) -> SpanContext:
        digest = hashlib.blake2b(f"{self._run}/{step}".encode(), digest_size=24).digest()
        return _context(digest[:16], digest[16:])

    def _context(self, root: SpanContext) -> SpanContext:
        return _context(root.trace_id.to_bytes(16, "big"), os.urandom(8))

    def _emit(
        self, process: str, name: str, start: float, end: float, own: SpanContext, parent: SpanContext | None,
        args: Mapping[str, Any],
    ) -> None:  # fmt: skip
        resource = self._resources.get(process)
        if resource is None:
            service = os.environ.get("OTEL_SERVICE_NAME") or "rlx"
            named = {"service.name": service, "service.instance.id": process, "rlx.run": self._run}
            resource = self._resources[process] = Resource.create(named)
        attributes = {f"rlx.{key}": value for key, value in args.items()}
        self._processor.on_end(
            ReadableSpan(
                name, own, parent, resource, attributes, start_time=round(start * 1e9), end_time=round(end * 1e9)
            )
        )


def _context(trace: bytes, span: bytes) -> SpanContext:
    sampled = TraceFlags(TraceFlags.SAMPLED)
    return SpanContext(int.from_bytes(trace, "big"), int.from_bytes(span, "big"), is_remote=False, trace_flags=sampled)


class _Told(SpanExporter):
    """An exporter whose first failure is said."""

    def __init__(self, exporter: SpanExporter, say: Callable[[str], None]):
        self._exporter, self._say, self._failed = exporter, say, False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS and not self._failed:
            self._failed = True
            self._say("note: the OpenTelemetry collector does not take the spans; said once, training goes on")
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


def otlp_exporter(say: Callable[[str], None]) -> SpanExporter:
    """To the collector that the environment names, by its protocol: http/protobuf unless that says grpc."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next((value for name in names if (value := os.environ.get(name))), "http/protobuf")
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # it is said once, by us
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGrpc

        return _Told(OverGrpc(), say)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return _Told(OTLPSpanExporter(), say)
