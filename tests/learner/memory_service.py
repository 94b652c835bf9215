"""A rollout service in memory: groups that finish when the test says so or after random delays, versions on each token,
sessions, cancellations, and a process that is replaced by another. And the publisher that goes with it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from rlx.episode import Episode, Row
from rlx.errors import GroupCancelled, RlxError, ServiceUnavailable, SessionReplaced
from rlx.learner.weights.publish import Packed, PublishTimes
from rlx.wire import GroupRequest, GroupResult, RewardOutcome, Sampling


class Policy(nn.Module):
    """A model that is the number of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Parameter(torch.zeros(()))

    @torch.no_grad()
    def train_step(self) -> None:
        self.steps += 1


@dataclass
class Running:
    request: GroupRequest
    future: concurrent.futures.Future[GroupResult]
    began: int
    """The version that its first token was sampled with"""


def group(key: str, versions: list[int], flat: bool = False) -> GroupResult:
    """Two completions of one token of each version."""
    runs = tuple((v, 1) for v in versions)
    row = Row(np.zeros(len(versions), np.int32), np.zeros(len(versions), np.float32), runs)
    rewards = np.array([0.0, 0.0 if flat else 1.0], np.float32)
    outcome = RewardOutcome("r", rewards, 0.01)
    return GroupResult(key, (Episode((row,), "a"), Episode((row,), "b")), (outcome,), "worker-0", 0.1, 0.01)


@dataclass
class Service:
    """`policy_of` tells the policy of each version that was ever committed; `log` what happened, in order."""

    flat: Callable[[str], bool] = lambda key: False
    version: int = 0
    policy: float = -1.0
    running: dict[str, Running] = field(default_factory=dict)
    finished: dict[str, GroupResult] = field(default_factory=dict)
    policy_of: dict[int, float] = field(default_factory=dict)
    log: list[tuple[Any, ...]] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    session: str | None = None
    is_up: bool = True
    lock: threading.RLock = field(default_factory=threading.RLock)
    arrived: threading.Condition = field(init=False)

    def __post_init__(self) -> None:
        self._instances = itertools.count(1)
        self._instance = f"process-{next(self._instances)}"
        self.arrived = threading.Condition(self.lock)

    # --- what the test does with it -------------------------------------------------------------------------------

    def wait_for(self, ready: Callable[[], bool]) -> None:
        with self.arrived:
            assert self.arrived.wait_for(ready, 60), f"never happened; running: {sorted(self.running)}"

    def tell(self, event: tuple[Any, ...]) -> None:
        with self.arrived:
            self.log.append(event)
            self.arrived.notify_all()

    def tickets(self) -> list[str]:
        """Keys of what is running, without the session."""
        with self.lock:
            return sorted((key.partition("/")[2] for key in self.running), key=lambda t: [int(n) for n in t.split(".")])

    def finish(self, *tickets: str, versions: list[int] | None = None) -> None:
        for ticket in tickets:
            self.wait_for(lambda ticket=ticket: ticket in self.tickets())
            self.finish_running(ticket, versions)

    def finish_running(self, ticket: str, versions: list[int] | None = None) -> None:
        """StopIteration where it does not run (any more)."""
        with self.lock:
            key = next(k for k in self.running if k.partition("/")[2] == ticket)
            job = self.running.pop(key)
            span = versions or sorted({job.began, self.version})
            result = self.finished[key] = group(key, span, self.flat(key))
        job.future.set_result(result)

    def fail(self, ticket: str, error: RlxError) -> None:
        with self.lock:
            key = next(k for k in self.running if k.partition("/")[2] == ticket)
            job = self.running.pop(key)
        job.future.set_exception(error)

    def stop(self) -> None:
        """The process ends; what it ran is lost, and so are its weights and results."""
        with self.lock:
            self.is_up = False
            lost, self.running = list(self.running.values()), {}
            self.finished, self.version, self.policy, self.session = {}, 0, -1.0, None
            self._instance = f"process-{next(self._instances)}"
            self.log.append(("stop",))
        for job in lost:
            job.future.set_exception(ServiceUnavailable("the connection was lost"))

    def start(self) -> None:
        with self.arrived:
            self.is_up = True
            self.arrived.notify_all()

    # --- the client's calls ---------------------------------------------------------------------------------------

    def client(self) -> Client:
        return Client(self)


class Client:
    """What a learner holds of the service."""

    def __init__(self, service: Service):
        self._service, self._session = service, ""

    def submit(self, request: GroupRequest) -> concurrent.futures.Future[GroupResult]:
        service, future = self._service, concurrent.futures.Future[GroupResult]()
        with service.arrived:
            if not service.is_up:
                future.set_exception(ServiceUnavailable("nobody answers"))
            elif service.session not in (None, request.key.partition("/")[0]):
                future.set_exception(SessionReplaced(f"the service belongs to {service.session} now"))
            elif request.key in service.finished:
                future.set_result(service.finished[request.key])
            else:
                service.running[request.key] = Running(request, future, service.version)
                service.log.append(("submit", request.key.partition("/")[2], service.policy))
            service.arrived.notify_all()
        return future

    def cancel(self, keys: list[str]) -> None:
        service = self._service
        with service.arrived:
            jobs = [service.running.pop(key) for key in keys if key in service.running]
            service.cancelled += [key.partition("/")[2] for key in keys]
            service.arrived.notify_all()
        for job in jobs:
            job.future.set_exception(GroupCancelled(f"{job.request.key} was taken back"))

    def begin_session(self, session: str) -> dict[str, Any]:
        service = self._service
        with service.lock:
            self._check_up()
            others = [key for key in service.running if key.partition("/")[0] != session]
            jobs = [service.running.pop(key) for key in others]
            service.session = self._session = session
            instance = service._instance
        for job in jobs:
            job.future.set_exception(SessionReplaced(f"the service belongs to {session} now"))
        return {"instance": instance, "weight_version": service.version, "replaced": others}

    def wait_until_ready(self, timeout_s: float, on_wait: Callable[[str], None]) -> dict[str, Any]:
        service = self._service
        on_wait("the service")
        with service.arrived:
            if not service.arrived.wait_for(lambda: service.is_up, timeout_s):
                raise ServiceUnavailable(f"no rollout service was ready within {timeout_s:g} s")
            return {"instance": service._instance}

    def instance(self) -> str:
        self._check_up()
        return self._service._instance

    def workers(self) -> dict[str, Any]:
        self._check_up()
        load = {"busy_s": time.monotonic(), "running": 0, "waiting": 0}
        return {"workers": [{"name": "worker-0", "state": "ready", "load": load, "load_age_s": 0.0}]}

    def commit(self, version: int, policy: float, full: bool) -> None:
        service = self._service
        with service.arrived:
            self._check_up()
            if service.session not in (None, self._session):
                raise SessionReplaced(f"the service belongs to {service.session} now")
            assert version > service.version
            service.version, service.policy = version, policy
            service.policy_of[version] = policy
            service.log.append(("commit", version, policy, "full" if full else "difference"))
            service.arrived.notify_all()

    def _check_up(self) -> None:
        if not self._service.is_up:
            raise ServiceUnavailable("nobody answers")


class Publisher:
    """`may_send` is waited for before each commit, `may_answer` after it; `at` hears how far each is, and may raise."""

    def __init__(self, client: Client):
        self._client, self._full = client, True
        self.version: int | None = None
        self.may_send = threading.Event()
        self.may_answer = threading.Event()
        self.may_send.set()
        self.may_answer.set()
        self.at: Callable[[str], None] = lambda place: None

    def snapshot(self, model: nn.Module) -> Packed:
        assert isinstance(model, Policy)
        return Packed(memoryview(str(model.steps.item()).encode()), (), 1)

    def send(self, packed: Packed, on_version: Callable[[int], None]) -> PublishTimes:
        assert self.may_send.wait(60)
        self.at("asking for the version")
        version = max(self.version or 0, self._client._service.version) + 1
        on_version(version)
        self.at("before the commit")
        self._client.commit(version, float(bytes(packed.payload)), self._full)
        self.at("after the commit")
        assert self.may_answer.wait(60)
        self.version, self._full = version, False
        return PublishTimes(0.02, 0.01, 0.005, 8, 0.5)

    def forget(self) -> None:
        self._full = True


class RandomTraffic:
    """Finishes what runs in random order, now and then gives a group back unasked, and restarts the process."""

    def __init__(self, service: Service, seed: int, give_back: float = 0.0, restarts: int = 0):
        self._service, self._rng = service, random.Random(seed)
        self._give_back, self._restarts = give_back, restarts
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(60)

    def _run(self) -> None:
        while not self._over.wait(self._rng.random() * 0.003):
            tickets = self._service.tickets()
            if not tickets:
                continue
            ticket = self._rng.choice(tickets[-max(1, len(tickets) // 2) :] if self._rng.random() < 0.7 else tickets)
            if self._restarts and self._rng.random() < 0.05:
                self._restarts -= 1
                self._service.stop()
                self._over.wait(self._rng.random() * 0.05)
                self._service.start()
            elif self._rng.random() < self._give_back:
                self._try(lambda t=ticket: self._service.fail(t, GroupCancelled("given back")))
            else:
                self._try(lambda t=ticket: self._service.finish_running(t))

    @staticmethod
    def _try(action: Callable[[], None]) -> None:
        with contextlib.suppress(StopIteration):  # cancelled in between
            action()


def request(session: str, number: int, attempt: int) -> GroupRequest:
    return GroupRequest(f"{session}/{number}.{attempt}", f"p{number}", np.array([1], np.int32), 2, Sampling(4))
