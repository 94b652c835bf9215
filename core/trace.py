"""`rlx trace OUT --step 12`: the spans of a step as a timeline for ui.perfetto.dev or chrome://tracing.

    spans.jsonl and its older parts ──► read_spans: those of the steps ──► chrome_trace ──► JSON

Processes are those of the run, with a lane for each span that overlaps another; arrows follow a group from the queue to
the step that trains on it. Times are of the learner's clock; the spans say what was taken off the service's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from rlx.errors import ConfigError, DatasetError
from rlx.samples import parts

_STEP = re.compile(rb'\{"step": ?(\d+),')
_ROUNDING_S = 5e-4
"""By which spans of one process may overlap because of rounded times."""
_WAY = ("queued", "generate", "group ready")
_VIEWERS = "open it in https://ui.perfetto.dev or chrome://tracing"


class Span(BaseModel):
    """A line of spans.jsonl; unix seconds."""

    step: int
    name: str
    process: str
    track: str
    start: float
    end: float
    args: dict[str, Any] = {}


def trace_main(out: Path, steps: range, file: Path | None) -> int:
    """Writes the timeline and says where; its exit status. ConfigError or DatasetError where there is none."""
    spans = read_spans(out, steps)
    shown = sorted({span.step for span in spans})
    name = f"{shown[0]}" if len(shown) == 1 else f"{shown[0]}-{shown[-1]}"
    path = file or out / f"trace-{name}.json"
    try:
        path.write_text(json.dumps(chrome_trace(spans), ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be written ({error.strerror}). Give another file.") from error
    seconds = max(span.end for span in spans) - min(span.start for span in spans)
    print(f"{path}: {len(spans)} spans of step {name}, {seconds:.2f} s; {_VIEWERS}")
    return 0


def read_spans(out: Path, steps: range) -> list[Span]:
    """Those of `steps`, by their start. A line that a crash cut off is left out."""
    spans: list[Span] = []
    there: set[int] = set()
    for step, line in _lines(_files(out)):
        there.add(step)
        if step in steps:
            try:
                spans.append(Span.model_validate_json(line))
            except ValidationError:
                continue
    if not spans:
        has = f"It has steps {min(there)} to {max(there)}." if there else "It has none yet: the run finished no step."
        raise DatasetError(f"{out / 'spans.jsonl'} has no spans of {_named(steps)}. {has}")
    return sorted(spans, key=lambda span: (span.start, -span.end))


def _files(out: Path) -> list[Path]:
    if not out.exists():
        raise ConfigError(f"{out}: there is no such folder. Give the output_dir of a run.")
    files = parts(out, "spans")
    if not files:
        raise DatasetError(
            f"{out} has no spans.jsonl. Give the output_dir of a run; one writes it from its first step on."
        )
    return files


def _lines(files: Iterable[Path]) -> Iterator[tuple[int, bytes]]:
    for path in files:
        with path.open("rb") as stream:
            for line in stream:
                if match := _STEP.match(line):
                    yield int(match[1]), line


def _named(steps: range) -> str:
    return f"step {steps.start}" if len(steps) == 1 else f"steps {steps.start} to {steps.stop - 1}"


# --- the timeline -----------------------------------------------------------------------------------------------------


def chrome_trace(spans: list[Span]) -> dict[str, Any]:
    """The Trace Event Format: complete events in microseconds from the first span on, names of processes and lanes,
    and flows. `spans` are sorted by their start."""
    begin = min(span.start for span in spans)
    spans = sorted([*spans, *_steps(spans)], key=lambda span: (span.start, -span.end))
    pids = {process: number for number, process in enumerate(sorted({s.process for s in spans}, key=_rank(spans)), 1)}
    lanes = _Lanes()
    events: list[dict[str, Any]] = []
    placed: dict[str, list[tuple[Span, dict[str, Any]]]] = {}
    for span in spans:
        span, tid = lanes.place(span)
        event = _complete(span, pids[span.process], tid, begin)
        events += [event, *_turns(span, event, begin)]
        if group := span.args.get("group"):
            placed.setdefault(str(group), []).append((span, event))
    for number, way in enumerate(placed.values(), 1):
        events += _flow(number, way)
    for process, pid in pids.items():
        events.append(_meta("process_name", pid, 0, name=process))
        events.append(_meta("process_sort_index", pid, 0, sort_index=pid))
    for (process, _, _), (tid, name) in lanes.names().items():
        events.append(_meta("thread_name", pids[process], tid, name=name))
        events.append(_meta("thread_sort_index", pids[process], tid, sort_index=tid))
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "begins_at_unix_s": begin,
            "clock": "the learner's; clock_offset_s of a span was taken off the service's times",
        },
    }


class _Lanes:
    """Numbers the lanes of each process. Spans that belong to different groups never share one at a time; others nest."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str, int], list[float]] = {}
        self._tids: dict[tuple[str, str, int], int] = {}

    def place(self, span: Span) -> tuple[Span, int]:
        """As it is drawn, and the lane."""
        number = 0
        while True:
            lane = (span.process, span.track, number)
            ends = self._open.setdefault(lane, [])
            while ends and ends[-1] <= span.start + _ROUNDING_S and ends[-1] <= span.end:
                last = ends.pop()
                span = span.model_copy(update={"start": max(span.start, last)})
            if not ends or ("group" not in span.args and span.end <= ends[-1]):
                ends.append(span.end)
                return span, self._tids.setdefault(lane, len(self._tids) + 1)
            number += 1

    def names(self) -> dict[tuple[str, str, int], tuple[int, str]]:
        return {
            (process, track, number): (tid, f"{track} {number + 1}" if number else track)
            for (process, track, number), tid in self._tids.items()
        }


def _steps(spans: list[Span]) -> Iterator[Span]:
    """A span for each step, from the first to the last thing that the training's thread of rank 0 did for it."""
    mine = [span for span in spans if span.process == "learner rank 0" and span.track == "training"]
    for step in sorted({span.step for span in mine}):
        start = min(span.start for span in mine if span.step == step)
        end = max(span.end for span in mine if span.step == step)
        yield Span(step=step, name=f"step {step}", process="learner rank 0", track="steps", start=start, end=end)


def _rank(spans: list[Span]) -> Any:
    """The order of processes: learner, gateway, workers, the others."""
    workers = {span.process for span in spans if span.name == "generate"}

    def rank(process: str) -> tuple[int, str]:
        first = 0 if process.startswith("learner") else 1 if process == "gateway" else 2 if process in workers else 3
        return first, process

    return rank


def _complete(span: Span, pid: int, tid: int, begin: float) -> dict[str, Any]:
    args = {"step": span.step} | {name: value for name, value in span.args.items() if name != "turns"}
    start, end = _us(span.start - begin), _us(max(span.start, span.end) - begin)
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.track,
        "pid": pid,
        "tid": tid,
        "ts": start,
        "dur": end - start,
        "args": args,
    }


def _turns(span: Span, episode: dict[str, Any], begin: float) -> Iterator[dict[str, Any]]:
    """What an episode waited for: each turn from its request on; the gaps are the environment's and the user's code."""
    whole = _us(span.start - begin), _us(span.end - begin)
    for number, (start, end) in enumerate(span.args.get("turns", ())):
        first, last = max(_us(start - begin), whole[0]), min(_us(end - begin), whole[1])
        if last >= first:
            yield episode | {"name": f"turn {number}", "ts": first, "dur": last - first, "args": {}}


def _flow(number: int, way: list[tuple[Span, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Arrows along a group's way; its rewards, which have the functions' names, lie between generation and the step."""
    stations = [event for span, event in way if span.name in _WAY or span.track == "groups"]
    stations.sort(key=lambda event: event["ts"])
    for place, event in enumerate(stations if len(stations) > 1 else []):
        phase = "s" if place == 0 else "f" if place == len(stations) - 1 else "t"
        bound = {"bp": "e"} if phase == "f" else {}
        yield {"ph": phase, "id": number, "name": "group", "cat": "group", "pid": event["pid"], "tid": event["tid"],
               "ts": event["ts"], **bound}  # fmt: skip


def _meta(kind: str, pid: int, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args}


def _us(seconds: float) -> int:
    """Whole microseconds: viewers read fractions as floats, and drop what then seems to overlap."""
    return round(1e6 * seconds)
