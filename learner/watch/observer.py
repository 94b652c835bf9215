"""What the gateway shows of a run: the records of its files, sent by a thread of their own; and the service's events.

    RecordFiles ─► take ─► waiting, bounded ─► thread, once a second: POST /v1/observations ─► `on_events`

Consumes: lines as they were written. Waits for: the gateway, in the thread, seconds. Nothing waits for this: what the
gateway does not take in time is left out, counted in `lost` and said once; the files have all of it.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from rlx.rollout.http_errors import SESSION_HEADER

PATH = "/v1/observations"
PERIOD_S = 1.0
MAX_PAUSE_S = 15.0
"""Between two attempts to reach a gateway that does not answer; doubled until then."""
MAX_BODY = 2**20
"""Bytes of one request; the gateway decodes it between two groups."""
MAX_WAITING = 8 * 2**20
"""Bytes of records that wait for the gateway."""
_MAX_LINE = 2**19
_LONGEST_TEXT = 20_000
_TIMEOUT = httpx.Timeout(5.0, connect=2.0)
_CLOSE_S = 3.0
_FIELDS = {"metrics": "metrics", "samples": "samples", "evals": "evaluations", "events": "events"}
_OF_SERVICE = b'"source": "service"'  # within a text its quotes would be escaped
_WAIT_FOR_IT = (429, 500, 502, 503, 504)

Event = dict[str, Any]


class Observer:
    """`run` names it to the gateway; `session` is the learner's. `on_events` gets events of the service, each once, those
    after unix time `since`; `say` hears, once, that something is left out."""

    def __init__(
        self,
        base_url: str,
        token: str | None,
        session: str,
        run: Mapping[str, Any],
        on_events: Callable[[list[Event]], None],
        say: Callable[[str], None],
        since: float = 0.0,
    ):
        headers = {SESSION_HEADER: session, "Content-Type": "application/json"}
        self._headers = headers | ({"Authorization": f"Bearer {token}"} if token else {})
        self._base_url, self._run, self._on_events, self._say = base_url, dict(run), on_events, say
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._size, self._lock, self._closing = 0, threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="observer", daemon=True)
        self._after, self._since = 0, since
        self._heard_before: set[tuple[int, float]] = set()
        self.lost = 0

    def start(self) -> None:
        self._thread.start()

    def take(self, name: str, lines: list[bytes]) -> None:
        """Lines of a file of records; any thread, returns at once."""
        if name not in _FIELDS:
            return
        fitting = [line if len(line) <= _MAX_LINE else shortened(line) for line in lines if _OF_SERVICE not in line]
        with self._lock:
            if self._closing.is_set():
                return
            self._waiting.extend((_FIELDS[name], line) for line in fitting)
            self._size += sum(map(len, fitting))
            dropped = self._make_room()
        self._lose(dropped, f"the gateway at {self._base_url} is slow or gone")

    def close(self) -> None:
        """Send what still waits, for a few seconds at most."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_S)

    # --- the thread -------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        certificates = httpx.create_ssl_context(trust_env=False)
        with httpx.Client(
            base_url=self._base_url, headers=self._headers, timeout=_TIMEOUT, verify=certificates, trust_env=False
        ) as client:
            pause_s = PERIOD_S
            while not self._closing.wait(pause_s):
                pause_s = PERIOD_S if self._send(client) else min(2 * pause_s, MAX_PAUSE_S)
            end = time.monotonic() + _CLOSE_S
            while self._waiting and time.monotonic() < end and self._send(client):
                pass

    def _send(self, client: httpx.Client) -> bool:
        """Whether the gateway answered."""
        batch, body = self._batch()
        try:
            answer = client.post(PATH, content=body)
            if answer.status_code in _WAIT_FOR_IT:
                raise httpx.HTTPError(f"HTTP {answer.status_code}")
            self._sent(batch)
            if answer.is_success:
                self._heard(answer.json())
            else:
                self._refused(answer, len(batch))
        except (httpx.HTTPError, ValueError, KeyError, TypeError):  # gone, slow, or something else answers there
            self._after = 0  # the next that answers may be another process, which counts anew
            return False
        return True

    def _batch(self) -> tuple[list[tuple[str, bytes]], bytes]:
        """What to send next, and the request's body; the lines are JSON already."""
        with self._lock:
            batch: list[tuple[str, bytes]] = []
            size = 0
            for item in self._waiting:
                size += len(item[1])
                if batch and size > MAX_BODY:
                    break
                batch.append(item)
        parts = [f'"run": {json.dumps(self._run)}, "after": {self._after}'.encode()]
        for field in _FIELDS.values():
            lines = [line for name, line in batch if name == field]
            parts += [b'"%s": [%s]' % (field.encode(), b", ".join(lines))] if lines else []
        return batch, b"{" + b", ".join(parts) + b"}"

    def _sent(self, batch: list[tuple[str, bytes]]) -> None:
        with self._lock:
            for item in batch:
                if self._waiting and self._waiting[0] is item:  # else it was dropped meanwhile
                    self._waiting.popleft()
                    self._size -= len(item[1])

    def _heard(self, answer: Mapping[str, Any]) -> None:
        """Only the first answer has events of a time before this learner; later ones count whatever the clock says."""
        known, self._after = self._heard_before, int(answer["next"])
        found = {(event["n"], event["time"]): event for event in answer["events"]}
        new = [event for number, event in found.items() if number not in known and event["time"] > self._since]
        known.update(found)
        self._since = -math.inf
        if new:
            self._on_events(new)

    def _refused(self, answer: httpx.Response, count: int) -> None:
        """Nothing that is sent again would be taken. Another learner's service, or an older one: it is asked no more."""
        self._lose(max(1, count), f"the gateway at {self._base_url} answers HTTP {answer.status_code} to {PATH}")
        if answer.status_code != httpx.codes.REQUEST_ENTITY_TOO_LARGE:
            self._closing.set()
            with self._lock:
                self._waiting.clear()
                self._size = 0

    def _make_room(self) -> int:
        """Under the lock: how many were dropped; samples first, the oldest first."""
        dropped = 0
        for only in ("samples", ""):
            kept: deque[tuple[str, bytes]] = deque()
            while self._size > MAX_WAITING and self._waiting:
                item = self._waiting.popleft()
                if item[0] == only or not only:
                    self._size -= len(item[1])
                    dropped += 1
                else:
                    kept.append(item)
            self._waiting.extendleft(reversed(kept))
        return dropped

    def _lose(self, count: int, cause: str) -> None:
        if count:
            with self._lock:
                self.lost, first = self.lost + count, self.lost == 0
            if first:
                self._say(f"note: {cause}: its page of this run is incomplete; the files of the run have everything")


def shortened(line: bytes) -> bytes:
    """A record that is too long for the page, without token ids and with the beginnings of its texts."""
    record = json.loads(line)
    for key in ("rows", "messages", "columns", "extra", "step_rewards", "samples"):
        record.pop(key, None)
    return json.dumps({key: _beginning(value) for key, value in record.items()} | {"shortened": True}).encode()


def _beginning(value: Any) -> Any:
    if isinstance(value, str):
        return value[:_LONGEST_TEXT]
    return value if len(json.dumps(value)) <= _LONGEST_TEXT else None
