"""The feed's errands to the service that take long, one after the other in a thread of their own.

    publish(step, packed) ─► send ─► evaluation of that version, when due: asked for, served, waited for ─► idle
    recover(cause)        ─► wait for the service ─► session ─► its weights again, if it is a new process ─► back

The next weights are sent after the evaluation of those before them, so an evaluation is of one version. Each errand is
bounded by the client's deadlines; a service that is lost is waited for. Not here: groups (`feed.py`).
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from torch import nn

from rlx.errors import ServiceError, ServiceUnavailable
from rlx.learner.incoming.evaluation import Evaluation
from rlx.learner.weights.publish import Packed, PublishTimes
from rlx.wire import GroupRequest

_PAUSE_S = 0.3
"""Between losing the service and looking for it."""
_ATTEMPTS = 5
"""Times that weights are sent, or an evaluation is begun, when the service is lost in between."""
_JOIN_S = 5.0
_NEWS_S = 0.2
"""Seconds from one look at a worker's load to another that is told apart from the time that an answer takes."""


class Client(Protocol):
    """What the feed needs of `rlx.rollout.client.RolloutClient`."""

    def submit(self, request: GroupRequest) -> Any: ...
    def cancel(self, keys: list[str]) -> None: ...
    def begin_session(self, session: str) -> Mapping[str, Any]: ...
    def wait_until_ready(self, timeout_s: float, on_wait: Callable[[str], None]) -> Mapping[str, Any]: ...
    def instance(self) -> str: ...
    def workers(self) -> Mapping[str, Any]: ...


class Publisher(Protocol):
    """What the feed needs of `rlx.learner.weights.publish.Publisher`."""

    @property
    def version(self) -> int | None: ...
    def snapshot(self, model: nn.Module) -> Packed: ...
    def send(self, packed: Packed, on_version: Callable[[int], None]) -> PublishTimes: ...
    def forget(self) -> None: ...


class Evaluator(Protocol):
    """What the feed needs of `rlx.learner.incoming.evaluation.Evaluator`."""

    def start(self, step: int, version: int) -> None: ...
    def result(self, timeout_s: float) -> Evaluation: ...
    def cancel(self) -> None: ...


@dataclass(frozen=True)
class Served:
    """The workers sample from the policy of `step`, by its `version`."""

    step: int
    version: int
    times: PublishTimes
    workers: int
    worker_busy: float
    """Share of the time since they were last asked in which the workers had a sequence, mean; NaN without news."""
    running: int = 0
    """Sequences that they worked on ..."""
    waiting: int = 0
    """... and those that waited, for them or in them"""


@dataclass(frozen=True)
class Waits:
    """Seconds: `service_s` for a service that is gone, `evaluation_s` for the groups of an evaluation."""

    service_s: float
    evaluation_s: float


class Courier:
    """Calls `on_served`, `on_back`, `on_evaluation` and, once, `on_error` from its thread; `on_idle` after each errand;
    `on_version(step, version)` before the service hears of a version; `on_lost(cause)` when it looks for a lost service,
    `on_found(seconds, is_new)` when one answers.

    `evaluates_first`: the groups of an evaluation are asked for before anybody hears that their version is served, so that
    they are not behind those of training in the service's queue. `generation` counts the processes of the service that
    this learner has brought its weights to.
    """

    def __init__(
        self,
        client: Client,
        publisher: Publisher,
        evaluator: Evaluator | None,
        session: str,
        waits: Waits,
        *,
        on_version: Callable[[int, int], None],
        on_served: Callable[[Served], None],
        on_back: Callable[[], None],
        on_idle: Callable[[], None],
        on_error: Callable[[BaseException], None],
        on_evaluation: Callable[[Evaluation, Packed], None],
        on_wait: Callable[[str], None],
        evaluates_first: bool = False,
        on_lost: Callable[[ServiceError], None] = lambda cause: None,
        on_found: Callable[[float, bool], None] = lambda seconds, is_new: None,
    ):
        self._client, self._publisher, self._evaluator, self._session = client, publisher, evaluator, session
        self._evaluates_first = evaluates_first
        self._on_version = on_version
        self._waits, self._on_served, self._on_back, self._on_idle = waits, on_served, on_back, on_idle
        self._on_error, self._on_evaluation, self._on_wait = on_error, on_evaluation, on_wait
        self._on_lost, self._on_found = on_lost, on_found
        self._errands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="feed-courier", daemon=True)
        self._closed = threading.Event()
        self._instance, self._served = "", None  # type: tuple[str, tuple[int, Packed] | None]
        self._idle_since: float | None = None
        """When a service first was back of which nothing came yet"""
        self._load: dict[str, tuple[float, float]] = {}
        """Of each worker, when it was asked last, and the seconds that it had been busy by then"""
        self._is_new = True
        self.generation = 0
        self.publishing = False
        """From `publish` until the weights and their evaluation are through"""
        self.doing: Literal["nothing", "publishing", "evaluating", "reconnecting"] = "nothing"

    def start(self) -> None:
        """Take the service over, and begin to run errands."""
        self._instance = str(self._client.begin_session(self._session)["instance"])
        self._thread.start()

    def publish(self, step: int, packed: Packed, evaluate: bool) -> None:
        """Have the workers sample from `packed`, the policy of `step`; returns at once. Not while `publishing`."""
        self.publishing = True
        self._errands.put(lambda: self._publish(step, packed, evaluate))

    def recover(self, cause: ServiceError) -> None:
        """Find the service again and, if it is another process, bring it the weights; returns at once."""
        self._errands.put(lambda: self._recover(cause))

    def progressed(self) -> None:
        """Something came of the service."""
        self._idle_since = None

    def close(self) -> None:
        """End the thread; its evaluation is taken back, and a publish under way has some seconds to end by itself."""
        self._closed.set()
        if self._evaluator is not None:
            self._evaluator.cancel()
        self._errands.put(None)
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        try:
            while (errand := self._errands.get()) is not None and not self._closed.is_set():
                errand()
                self.doing = "nothing"
                self._on_idle()
        except BaseException as error:  # goes to who waits for the feed
            self._on_error(error)

    # --- errands --------------------------------------------------------------------------------------------------

    def _publish(self, step: int, packed: Packed, evaluate: bool) -> None:
        evaluator = self._evaluator if evaluate else None
        self._send(step, packed, evaluator if self._evaluates_first else None)
        if evaluator is not None:
            self._evaluate(evaluator, step, packed)
        self.publishing = False

    def _send(self, step: int, packed: Packed, evaluator: Evaluator | None = None) -> None:
        for attempt in range(_ATTEMPTS):
            self.doing = "publishing"
            try:
                if self._client.instance() != self._instance:
                    raise ServiceUnavailable("the rollout service was started anew")
                times = self._publisher.send(packed, partial(self._on_version, step))
                break
            except ServiceUnavailable as error:
                if attempt == _ATTEMPTS - 1:
                    raise
                self._reconnect(error)
        self._served = (step, packed)
        self.generation, self._is_new = self.generation + self._is_new, False
        news = self._look_at_workers()
        version = self._publisher.version
        assert version is not None
        if evaluator is not None:
            self._begin(evaluator, step, version)
        self._on_served(Served(step, version, times, *news))

    def _begin(self, evaluator: Evaluator, step: int, version: int) -> None:
        evaluator.start(step, version)
        if self._closed.is_set():  # `close` came before there was anything to take back
            evaluator.cancel()

    def _evaluate(self, evaluator: Evaluator, step: int, packed: Packed) -> None:
        for attempt in range(_ATTEMPTS):
            self.doing = "evaluating"
            version = self._publisher.version
            assert version is not None
            if attempt or not self._evaluates_first:
                self._begin(evaluator, step, version)
            try:
                evaluation = evaluator.result(self._waits.evaluation_s)
                break
            except ServiceUnavailable as error:
                if attempt == _ATTEMPTS - 1:
                    raise
                self._reconnect(error)
                if self._is_new:
                    self._send(step, packed)
        self.progressed()
        self._on_evaluation(evaluation, packed)

    def _recover(self, cause: ServiceError) -> None:
        """Raises `cause` when nothing came of the services that were back for as long as one is waited for."""
        if self._idle_since is not None and time.monotonic() - self._idle_since > self._waits.service_s:
            raise cause
        self._reconnect(cause)
        if self._is_new and self._served is not None:
            self._send(*self._served)
        if self._idle_since is None:
            self._idle_since = time.monotonic()
        self._on_back()

    def _reconnect(self, cause: ServiceError) -> None:
        """Returns when a service answers; `_is_new` until it has the weights, where it is another process than before.

        That one gets the session. The same one has it, unless another learner took it over: then it stays there."""
        self.doing, began = "reconnecting", time.monotonic()
        self._on_lost(cause)
        end = began + 2 * self._waits.service_s
        while True:
            if self._closed.wait(_PAUSE_S):
                raise cause
            instance = str(self._client.wait_until_ready(self._waits.service_s, self._on_wait)["instance"])
            if instance == self._instance:
                break
            try:
                instance = str(self._client.begin_session(self._session)["instance"])
                break
            except ServiceUnavailable:
                if time.monotonic() > end:
                    raise
        self._on_found(time.monotonic() - began, instance != self._instance)
        if instance != self._instance:
            self._instance, self._is_new = instance, True
            self._publisher.forget()

    def _look_at_workers(self) -> tuple[int, float, int, int]:
        """How many are ready; the share of time that they were busy, mean over those with news since the last look; the
        sequences that they run, and those that wait.

        The service asks its workers now and then, so each says how old its count of busy seconds is."""
        with contextlib.suppress(ServiceUnavailable):  # the next errand finds out
            answer, shares, now = self._client.workers(), [], time.monotonic()
            workers, waiting = answer["workers"], int(answer.get("waiting", 0))
            for worker in workers:
                found = (now - float(worker["load_age_s"]), float(worker["load"]["busy_s"]))
                then, before = self._load.setdefault(worker["name"], found)
                if (seconds := found[0] - then) < _NEWS_S:
                    continue
                self._load[worker["name"]] = found
                if found[1] >= before and found[1]:  # else it is another process, or does not count them
                    shares.append(min(1.0, (found[1] - before) / seconds))
            ready = [worker["load"] for worker in workers if worker["state"] == "ready"]
            running = sum(int(load["running"]) for load in ready)
            waiting += sum(int(load["waiting"]) for load in ready)
            return len(ready), sum(shares) / len(shares) if shares else math.nan, running, waiting
        return 1, math.nan, 0, 0
