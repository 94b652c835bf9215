"""The learner's side of the rollout service: plain calls, each with a deadline that names who did not answer.

    submit(request) ─► loop thread: at most `max_in_flight` POST /v1/rollouts ─► Future[GroupResult]
                         lost connection ─► the same key again ─► the same result

One event loop in a thread of its own serves all calls; it starts with the first one and ends with `close`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp
import numpy as np

from rlx.errors import DeadlineExceeded, ServiceError, ServiceUnavailable
from rlx.frame import CONTENT_TYPE, decode_frame, encode_frame
from rlx.rollout.deadline import deadline
from rlx.rollout.direct_client import DirectRollouts
from rlx.rollout.http_errors import SESSION_HEADER, raise_answer
from rlx.rollout.manifest import Offer, WeightManifest
from rlx.wire import GroupRequest, GroupResult

T = TypeVar("T")
MAX_IN_FLIGHT = 256
"""Groups that a client has submitted and not got back; more wait here."""
_KEEP_S = 60.0
"""An idle connection is used again; the service closes it after 75 s."""
_PIECE = 2**20
_RESUBMITS = 5
_FIRST_PAUSE_S = 0.2
_MARGIN_S = 10.0
"""How long the client waits after the service's own deadline, so that the service's message arrives."""
_ANNOUNCE, _COMMIT = 2, 8
"""How many times `service.publish_timeout` these may take. The service waits for a worker that is restarting, and asks.
Then it lets workers swap one after the other for that long; the last of them, and then the rest together, may be asked,
swap and be verified; and it waits for one when none took the weights."""
PUBLISH = _ANNOUNCE + 1 + _COMMIT
"""How many times that a whole publish may take, with the transfer"""
_TAKE_BACK_S = 2.0
"""How long `close` lets what was taken back reach the service."""
_HINT = "start it in another terminal: rlx vllm-serve <cfg.yaml>"


@dataclass(frozen=True)
class ClientTimeouts:
    """Seconds: `call_s` for small requests, `publish_s` for each phase of a weight update, `connect_s` for TCP."""

    call_s: float = 30.0
    publish_s: float = 120.0
    connect_s: float = 10.0


@dataclass(frozen=True)
class PhaseTimes:
    """Seconds of the phases of one weight update, as the learner sees them."""

    announce_s: float
    transfer_s: float
    commit_s: float
    pause_s: float = 0.0
    """Of the worker that swapped longest: so long it generated nothing."""
    behind: tuple[str, ...] = ()
    """`name: cause` of the workers that did not take these weights yet and get no work meanwhile."""
    taken_over: bool = False
    """Nothing was sent: the service is on this machine and read the learner's memory."""

    @property
    def total_s(self) -> float:
        return self.announce_s + self.transfer_s + self.commit_s


class RolloutClient:
    """`direct`: groups go to the workers' own endpoints, which the service names (`service.direct`)."""

    def __init__(
        self,
        base_url: str,
        token: str | None,
        timeouts: ClientTimeouts | None = None,
        max_in_flight: int = MAX_IN_FLIGHT,
        direct: bool = False,
    ):
        self.base_url = base_url.rstrip("/")
        self._timeouts = timeouts or ClientTimeouts()
        self._start_lock, self._is_closed = threading.Lock(), False
        self._thread: threading.Thread | None = None
        self._loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(max_in_flight)
        self._authorization = {"Authorization": f"Bearer {token}"} if token else {}
        self._session = ""
        self._cancels: set[concurrent.futures.Future[dict[str, Any]]] = set()
        self._direct = DirectRollouts(self._ask_routes, self._post_group, _MARGIN_S) if direct else None

    def __enter__(self) -> RolloutClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up what is in flight and end the thread, once the service knows what was taken back; idempotent. Calls that
        come later raise RuntimeError."""
        concurrent.futures.wait(tuple(self._cancels), _TAKE_BACK_S)
        with self._start_lock:
            self._is_closed = True
        if self._loop.is_closed():
            return
        if self._thread is not None:
            asyncio.run_coroutine_threadsafe(self._shut(), self._loop)
            self._thread.join(self._timeouts.call_s)
        self._loop.close()

    # --- the service ----------------------------------------------------------------------------------------------

    def wait_until_ready(self, timeout_s: float, on_wait: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
        """Wait until it has loaded and some worker works, or would with other weights; `on_wait` hears what is waited
        for, twice a second. One that answers late is waited for as well. Returns /health."""
        end = time.monotonic() + timeout_s
        while True:
            try:
                status, body = self._try_health(self._timeouts.call_s)
                waiting_for = _waiting_for(self.base_url, status, body)
            except DeadlineExceeded as error:
                status, body, waiting_for = "late", {}, str(error)
            if status in ("ok", "degraded", "unverified"):
                return body
            if status == "failed":
                raise ServiceUnavailable(waiting_for)
            if time.monotonic() >= end:
                hint = f"; {_HINT}" if status in ("unreachable", "stopping") else ""
                raise ServiceUnavailable(f"no rollout service was ready within {timeout_s:g} s: {waiting_for}{hint}")
            on_wait(waiting_for)
            time.sleep(min(0.5, max(end - time.monotonic(), 0)))

    def health(self) -> dict[str, Any]:
        """The body of /health, whether all is well or not."""
        status, body = self._try_health(self._timeouts.call_s)
        if status == "unreachable":
            raise ServiceUnavailable(f"nobody answers at {self.base_url}; {_HINT}")
        return body

    def instance(self) -> str:
        """Id of the service's process: another one knows nothing of what was sent to this."""
        return str(self.health()["instance"])

    def begin_session(self, session: str) -> dict[str, Any]:
        """Take the service over; groups of other sessions are cancelled, and their requests refused from here on.
        `{"instance": str, "weight_version": int, "replaced": [keys of the groups that were cancelled]}`."""
        self._session = session
        return self._call(self._json("POST", "/v1/session", "the session", {"session": session}))

    def workers(self) -> dict[str, Any]:
        """`{"weight_version": int, "instance": str, "waiting": completions that no worker has yet, "workers": [WorkerStatus
        as a mapping, ...]}`."""
        return self._call(self._json("GET", "/v1/workers", "the rollout service"))

    def list_workers(self) -> list[dict[str, Any]]:
        """Name, state, weight version and load of every worker."""
        return list(self.workers()["workers"])

    def add_workers(self, count: int) -> list[str]:
        """Start `count` more; returns their names at once, `workers` says how far they are."""
        answer = self._call(self._json("POST", "/v1/workers", "new workers", {"count": count}))
        return [str(name) for name in answer["names"]]

    def remove_worker(self, name: str) -> None:
        """It gets no more groups and leaves once those that it has are done; returns at once."""
        self._call(self._json("DELETE", f"/v1/workers/{quote(name, safe='')}", f"removing {name}"))

    def prompt_logprobs(self, ids: np.ndarray, worker: str | None = None) -> dict[str, np.ndarray]:
        """log p(ids[t] | ids[:t]) on every worker, or on the named one: `ids` [T] → float32 [T-1] by worker name."""
        head = {"worker": worker} if worker else {}
        frame = encode_frame(head, {"ids": np.asarray(ids, dtype=np.int32)})
        answer = self._call(
            self._request("POST", "/v1/logprobs", "a worker's log-probs", self._timeouts.publish_s, frame, CONTENT_TYPE)
        )
        return decode_frame(answer)[1]

    # --- groups ---------------------------------------------------------------------------------------------------

    def submit(self, request: GroupRequest) -> concurrent.futures.Future[GroupResult]:
        """Send one group off. The future holds its result or the service's error; cancelling it stops waiting."""
        return self._start(self._rollout(request))

    def cancel(self, keys: Iterable[str]) -> None:
        """Take these groups back: the service stops them, who waits for one gets GroupCancelled. Returns at once; a
        service that cannot be reached has lost them anyway."""
        if listed := list(keys):
            future = self._start(self._json("POST", "/v1/rollouts/cancel", "cancelled groups", {"keys": listed}))
            self._cancels.add(future)
            future.add_done_callback(self._cancels.discard)

    def rollouts(
        self, requests: Iterable[GroupRequest], on_group: Callable[[GroupResult], None] = lambda _: None
    ) -> list[GroupResult]:
        """All groups, in the order of `requests`; `on_group` hears each as it finishes. The first error stops all."""
        futures = [self.submit(request) for request in requests]
        try:
            for future in concurrent.futures.as_completed(futures):
                on_group(future.result())
        finally:
            for future in futures:
                future.cancel()
        return [future.result() for future in futures]

    async def _rollout(self, request: GroupRequest) -> GroupResult:
        async with self._slots:
            if self._direct is not None:
                return GroupResult.decode(await self._direct.rollout(request))
            answer = await self._request(
                "POST", "/v1/rollouts", f"group {request.key!r}", request.deadline_s, request.encode(), CONTENT_TYPE
            )
        return GroupResult.decode(answer)

    async def _ask_routes(self, body: dict[str, Any]) -> dict[str, Any]:
        return await self._json("POST", "/v1/routes", "the way to the workers", body)

    async def _post_group(self, url: str, body: bytes) -> tuple[int, bytes]:
        """To a worker's own endpoint; once, a lost connection is the caller's to handle."""
        return await self._send("POST", f"{url}/v1/rollouts", body, {"Content-Type": CONTENT_TYPE})

    # --- weights --------------------------------------------------------------------------------------------------

    def publish(
        self, manifest: WeightManifest, data: bytes | memoryview | Iterable[bytes], offer: Offer | None = None
    ) -> PhaseTimes:
        """Announce, send, commit; returns when workers sample with the new weights and none with older ones. Nothing is
        sent where the service can open what is on `offer`. WeightBaseMismatch, with nothing sent, where `manifest`
        builds on other weights than the service has."""
        return self._call(self._publish(manifest, data, offer))

    async def _publish(
        self, manifest: WeightManifest, data: bytes | memoryview | Iterable[bytes], offer: Offer | None
    ) -> PhaseTimes:
        path, who, seconds = f"/v1/weights/{manifest.version}", f"weights {manifest.version}", self._timeouts.publish_s
        marks = [time.monotonic()]
        described = manifest.to_json() | ({"offer": asdict(offer)} if offer is not None else {})
        body = json.dumps(described).encode()
        answer = await self._request("POST", "/v1/weights/announce", f"{who}: announce", _ANNOUNCE * seconds, body)
        taken_over = bool(json.loads(answer).get("taken_over"))
        marks.append(time.monotonic())
        if not taken_over:
            await self._upload(path, who, data, manifest.travels)
        marks.append(time.monotonic())
        outcome = json.loads(await self._request("POST", f"{path}/commit", f"{who}: commit", _COMMIT * seconds))
        marks.append(time.monotonic())
        behind = tuple(f"{worker['name']}: {worker['cause']}" for worker in outcome["behind"])
        announce_s, transfer_s, commit_s = np.diff(marks).tolist()
        return PhaseTimes(announce_s, transfer_s, commit_s, outcome["pause_s"], behind, taken_over)

    async def _upload(self, path: str, who: str, data: bytes | memoryview | Iterable[bytes], nbytes: int) -> None:
        seconds = self._timeouts.publish_s
        async with deadline(
            seconds + _MARGIN_S, lambda: f"{who}: the bytes did not reach {self.base_url} within {seconds:g} s"
        ):
            try:
                length = {"Content-Length": str(nbytes)}
                status, told = await self._send("PUT", f"{self.base_url}{path}", _pieces(data), length)
            except aiohttp.ClientError as error:
                raise ServiceUnavailable(f"{who}: {_lost(self.base_url, error)}") from error
        _check(status, told, self.base_url)

    # --- the wire -------------------------------------------------------------------------------------------------

    async def _request(
        self, method: str, path: str, what: str, seconds: float, body: bytes = b"", kind: str = "application/json"
    ) -> bytes:
        """One idempotent call. A lost connection is tried again with growing pauses, a few times within `seconds`."""
        async with deadline(
            seconds + _MARGIN_S, lambda: f"{what}: {self.base_url}{path} did not answer within {seconds:g} s"
        ):
            for resubmit in range(_RESUBMITS + 1):
                try:
                    status, answer = await self._send(method, f"{self.base_url}{path}", body, {"Content-Type": kind})
                    break
                except aiohttp.ClientError as error:
                    if resubmit == _RESUBMITS:
                        raise ServiceUnavailable(f"{what}: {_lost(self.base_url, error)}") from error
                    await asyncio.sleep(_FIRST_PAUSE_S * 2**resubmit)
        _check(status, answer, self.base_url)
        return answer

    async def _json(self, method: str, path: str, what: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        sent = json.dumps(body).encode() if body is not None else b""
        answer: dict[str, Any] = json.loads(await self._request(method, path, what, self._timeouts.call_s, sent))
        return answer

    async def _send(
        self, method: str, url: str, body: bytes | AsyncIterator[bytes | memoryview], headers: dict[str, str]
    ) -> tuple[int, bytes]:
        """Status and body of the answer; aiohttp.ClientError without one."""
        headers |= self._authorization | ({SESSION_HEADER: self._session} if self._session else {})
        async with self._http.request(method, url, data=body, headers=headers, allow_redirects=False) as answer:
            return answer.status, await answer.read()

    @cached_property
    def _http(self) -> aiohttp.ClientSession:
        """Made in the loop, at the first request."""
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._timeouts.connect_s),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    def _try_health(self, seconds: float) -> tuple[str, dict[str, Any]]:
        """The service's status word (`unreachable` when nobody answers) and the body."""

        async def ask() -> tuple[int, bytes]:
            async with deadline(seconds, lambda: f"{self.base_url}/health did not answer within {seconds:g} s"):
                return await self._send("GET", f"{self.base_url}/health", b"", {})

        try:
            status, answer = self._call(ask())
        except aiohttp.ClientError:
            return "unreachable", {}
        try:
            body = json.loads(answer)
            return str(body["status"]), body
        except (ValueError, KeyError, TypeError):
            raise ServiceError(
                f"something else than a rollout service answers at {self.base_url} (HTTP {status}); "
                "write another vllm.port, and the same in trl.vllm_server_port if that is set"
            ) from None

    # --- the thread -----------------------------------------------------------------------------------------------

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return self._start(work).result()

    def _start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        with self._start_lock:
            if self._is_closed:
                work.close()
                raise RuntimeError(f"the client of {self.base_url} is closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-client", daemon=True)
                self._thread.start()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _shut(self) -> None:
        while others := asyncio.all_tasks() - {asyncio.current_task()}:  # one that ends may begin another
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        await self._http.close()
        self._loop.stop()


async def _pieces(data: bytes | memoryview | Iterable[bytes]) -> AsyncIterator[bytes | memoryview]:
    if isinstance(data, bytes | bytearray | memoryview):
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PIECE):
            yield view[start : start + _PIECE]
    else:
        for piece in data:
            yield piece


def _check(status: int, answer: bytes, url: str) -> None:
    if status >= 400:
        raise_answer(status, answer, url)


def _lost(url: str, error: Exception) -> str:
    return f"the connection to {url} was lost or refused ({type(error).__name__}); {_HINT}"


def _waiting_for(url: str, status: str, body: dict[str, Any]) -> str:
    if status == "unreachable":
        return f"nobody answers at {url}"
    if status == "loading":
        progress = body["progress"]
        names = ", ".join(progress["waiting_for"])
        return f"{url} is loading, {progress['ready']} of {progress['total']} up, waiting for {names}"
    return f"{url} is {status}" + (f": {cause}" if (cause := body.get("cause")) else "")
