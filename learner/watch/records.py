"""Files of records, one JSON object a line, written by a thread of their own: bounded, and whole after a crash.

    put(name, make) ─► queue ─► thread: make() ─► name.jsonl ─► name.1.jsonl … name.3.jsonl, the oldest goes
                                             └──► on_lines: who else wants them

`put` never waits. What the thread or the disk cannot take is counted in `lost` and said once; it ends no run. Not here:
what the records say (`report.py`).
"""

from __future__ import annotations

import contextlib
import json
import math
import queue
import re
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rlx.errors import RlxError
from rlx.samples import parts

PARTS = 4
"""Files that a name is spread over at most, each a quarter of the bytes that are allowed."""
DEFAULT_MAX_BYTES = 2**30
_WAITING = 512
_STEP = re.compile(rb'\{"step": ?(-?\d+)[,}]')

Record = dict[str, Any]
Make = Callable[[], Iterable[Record]]


class RecordFiles:
    """Appends to the files `folder`/NAME.jsonl. `max_bytes` bounds each name with its older parts; `say` hears of the
    first record that was lost; each of `listeners`, and `on_lines(name, lines)`, gets what is written, or was to be, in
    the thread."""

    def __init__(self, folder: Path, max_bytes: int = DEFAULT_MAX_BYTES, say: Callable[[str], None] = lambda _: None):
        self._folder, self._part_bytes, self._say = folder, max(1, max_bytes // PARTS), say
        self._queue: queue.Queue[tuple[str, Make] | threading.Event | None] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self.lost = 0
        self.listeners: list[Callable[[str, Record], None]] = []
        self.on_lines: Callable[[str, list[bytes]], None] = lambda name, lines: None

    def path(self, name: str) -> Path:
        return self._folder / f"{name}.jsonl"

    def put(self, name: str, make: Make) -> None:
        """Have the thread call `make` and append its records; any thread, returns at once."""
        self._start()
        try:
            self._queue.put_nowait((name, make))
        except queue.Full:
            self._lose(1, f"the disk is so slow that {_WAITING} of them wait to be written")

    def flush(self, timeout_s: float) -> bool:
        """Whether all that was put is written after at most `timeout_s`."""
        if self._thread is None:
            return True
        done = threading.Event()
        try:
            self._queue.put(done, timeout=timeout_s)
        except queue.Full:
            return False
        return done.wait(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Write what was put, and end the thread; nothing may be put after it."""
        if self.flush(timeout_s) and self._thread is not None:
            with contextlib.suppress(queue.Full):  # the thread ends with the process
                self._queue.put(None, timeout=timeout_s)
            self._thread.join(timeout_s)

    def keep_to(self, name: str, last_step: int | None) -> None:
        """Drop the records after `last_step` (None: of no step), and a last line that a crash cut off, in all parts."""
        for path in parts(self._folder, name):
            _keep(path, last_step)
            if not path.stat().st_size:
                path.unlink()
        self.path(name).touch()

    def read(self, name: str) -> Iterator[Record]:
        """The records that are there, the oldest first; what is no JSON is left out."""
        for path in parts(self._folder, name):
            for line in path.read_bytes().splitlines():  # of bytes: text has more kinds of line ends
                with contextlib.suppress(ValueError):
                    yield json.loads(line)

    def _start(self) -> None:
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="record-files", daemon=True)
                    self._thread.start()

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, threading.Event):
                item.set()
                continue
            try:
                self._take(*item)
            except Exception as error:  # this thread must outlive a record that is no JSON, and a disk that is full
                self._lose(1, f"{type(error).__name__}: {error}")

    def _take(self, name: str, make: Make) -> None:
        records = list(make())
        lines = [encode(record) for record in records]
        try:
            if lines:
                self._append(name, b"".join(line + b"\n" for line in lines))
        finally:
            self.on_lines(name, lines)
            for tell in self.listeners:
                for record in records:
                    tell(name, record)

    def _append(self, name: str, data: bytes) -> None:
        path = self.path(name)
        size = path.stat().st_size if path.exists() else 0
        if size and size + len(data) > self._part_bytes:
            self._rotate(name)
        append(path, data)

    def _rotate(self, name: str) -> None:
        for number in range(PARTS - 1, 0, -1):
            younger = self._folder / f"{name}.{number - 1}.jsonl" if number > 1 else self.path(name)
            if younger.exists():
                younger.replace(self._folder / f"{name}.{number}.jsonl")

    def _lose(self, count: int, cause: str) -> None:
        with self._lock:
            self.lost, first = self.lost + count, self.lost == 0
        if first:
            self._say(f"records of this run are not written to {self._folder}: {cause}. Training goes on; said once")


def append(path: Path, data: bytes) -> None:
    """All of `data` at the end of `path`, or nothing: what a full disk took of it is taken back. Raises OSError."""
    with path.open("ab", buffering=0) as stream:
        start, view = stream.tell(), memoryview(data)
        try:
            while view:
                view = view[stream.write(view) :]
        except OSError:
            with contextlib.suppress(OSError):
                stream.truncate(start)
            raise


def append_event(folder: Path, record: Record) -> None:
    """One event, by a process that keeps no files of its own; nothing where there is no such folder, or no space."""
    if folder.is_dir():
        with contextlib.suppress(OSError):
            append(folder / "events.jsonl", encode(record) + b"\n")


def event_record(kind: str, text: str, step: int | None = None, **details: Any) -> Record:
    """A line of events.jsonl, of the learner's; `text` is one readable sentence."""
    return {"time": time.time(), "source": "learner", "kind": kind, "step": step, "text": text, **details}


def failure_record(error: BaseException, process: str = "learner rank 0") -> Record:
    """The event that a run ended with `error` in `process`; with a traceback where it is no error of a user, and
    `stopped` where somebody pressed Ctrl-C."""
    if isinstance(error, KeyboardInterrupt):
        return event_record("run_failed", "the run was interrupted", process=process, stopped=True)
    kind = type(error).__name__
    record = event_record("run_failed", f"{process} ended with {kind}: {error}", process=process, error=kind)
    if not isinstance(error, RlxError):
        record["traceback"] = "".join(traceback.format_exception(error))
    return record


def encode(record: Record) -> bytes:
    """`record` as one line of strict JSON, null for what is not a finite number. Raises TypeError or ValueError."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_without_nan(record), ensure_ascii=False, allow_nan=False)
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, as a tool may return it
        return json.dumps(json.loads(text)).encode()


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keep(path: Path, last_step: int | None) -> None:
    """In one pass over `path`: cut off its end where only that is to go, else write anew what stays."""
    end, kept, is_suffix = 0, [], True  # type: int, list[tuple[int, int]], bool
    with path.open("rb") as stream:
        begin = 0
        for line in stream:
            if _stays(line, last_step):
                is_suffix &= begin == end
                kept.append((begin, len(line)))
                end = begin + len(line)
            begin += len(line)
    if is_suffix:
        with path.open("r+b") as stream:
            stream.truncate(end)
        return
    temporary = path.with_name(f".{path.name}")
    with path.open("rb") as old, temporary.open("wb") as new:
        for begin, size in kept:
            old.seek(begin)
            new.write(old.read(size))
    shutil.copymode(path, temporary)
    temporary.replace(path)


def _stays(line: bytes, last_step: int | None) -> bool:
    if not line.endswith(b"\n"):
        return False
    if last_step is None:
        return True
    if match := _STEP.match(line):
        return int(match[1]) <= last_step
    try:
        return int(json.loads(line)["step"]) <= last_step
    except (ValueError, KeyError, TypeError):
        return False
