"""The feed's errands: what the learner is told of the workers with every publish."""

from __future__ import annotations

import math
import queue
from types import SimpleNamespace
from typing import Any

import pytest

from rlx.errors import ServiceUnavailable
from rlx.learner.incoming import courier as courier_module
from rlx.learner.incoming.courier import Courier, Served, Waits


class Service:
    """Of one worker: how many seconds ago it was asked, and how long it had been busy by then."""

    def __init__(self) -> None:
        self.asked_s_ago, self.busy_s = 0.0, 0.0
        self.process, self.begun = "a", []  # type: tuple[str, list[str]]

    def begin_session(self, session: str) -> dict[str, str]:
        self.begun.append(self.process)
        return {"instance": self.process}

    def wait_until_ready(self, timeout_s: float, on_wait: object) -> dict[str, str]:
        return {"instance": self.process}

    def instance(self) -> str:
        return self.process

    def workers(self) -> dict[str, Any]:
        load = {"busy_s": self.busy_s, "running": 8, "waiting": 5}
        return {
            "waiting": 16,
            "workers": [{"name": "w", "state": "ready", "load": load, "load_age_s": self.asked_s_ago}],
        }


def make_courier(service: Service, publisher: Any, told: queue.SimpleQueue[Any], service_s: float = 1.0) -> Courier:
    """`told` gets what was served, "back", and the error."""
    return Courier(
        service, publisher, None, "s", Waits(service_s, 1), on_version=lambda step, version: None, on_served=told.put,
        on_back=lambda: told.put("back"), on_idle=lambda: None, on_error=told.put,
        on_evaluation=lambda evaluation, packed: None, on_wait=lambda line: None,
    )  # fmt: skip


class Clock:
    """Goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(courier_module, "time", clock)
    monkeypatch.setattr(courier_module, "_PAUSE_S", 0)
    return clock


def test_how_busy_the_workers_were_is_told_only_when_they_were_asked_anew(clock: Clock):
    service, served = Service(), queue.SimpleQueue[Served]()
    publisher = SimpleNamespace(version=1, send=lambda packed, on_version: None)
    courier = make_courier(service, publisher, served)

    def busy(asked_s_ago: float, busy_s: float) -> float:
        service.asked_s_ago, service.busy_s = asked_s_ago, busy_s
        courier.publish(0, SimpleNamespace(), evaluate=False)
        return served.get(timeout=60).worker_busy

    courier.start()
    try:
        assert math.isnan(busy(1000, 5)), "there is nothing to compare it with"
        courier.publish(0, SimpleNamespace(), evaluate=False)
        assert (told := served.get(timeout=60)).running == 8
        assert told.waiting == 5 + 16, "in the worker and before it"
        assert busy(500, 130) == pytest.approx(0.25, rel=0.1)
        assert math.isnan(busy(500, 130)), "nobody has asked since, which does not mean that it was idle"
        assert busy(0, 130) == 0, "it was idle"
        assert math.isnan(busy(-500, 3)), "another process counts from 0 again"
    finally:
        courier.close()


def test_bringing_a_new_service_the_weights_may_take_longer_than_one_is_waited_for(clock: Clock):
    service, told = Service(), queue.SimpleQueue[Any]()

    def send(packed: object, on_version: object) -> None:
        clock.now += 100

    courier = make_courier(service, SimpleNamespace(version=1, send=send, forget=lambda: None), told)
    courier.start()
    try:
        courier.publish(0, SimpleNamespace(), evaluate=False)
        assert told.get(timeout=60).step == 0
        service.process = "b"
        courier.publish(1, SimpleNamespace(), evaluate=False)
        courier.recover(ServiceUnavailable("groups were lost"))
        assert told.get(timeout=60).step == 1
        assert told.get(timeout=60) == "back"
    finally:
        courier.close()


def test_services_that_lose_every_group_are_looked_for_only_for_so_long(clock: Clock):
    service, told = Service(), queue.SimpleQueue[Any]()
    courier = make_courier(service, SimpleNamespace(version=1, forget=lambda: None), told)
    courier.start()
    try:
        for came in (True, True, False, False):
            courier.recover(ServiceUnavailable("lost"))
            assert told.get(timeout=60) == "back"
            clock.now += 0.9
            if came:
                courier.progressed()
        courier.recover(ServiceUnavailable("lost at last"))
        assert str(told.get(timeout=60)) == "lost at last"
    finally:
        courier.close()


def test_the_session_of_the_same_process_is_not_begun_again(clock: Clock):
    """Another learner may have taken it over meanwhile: that one keeps it."""
    service, told = Service(), queue.SimpleQueue[Any]()
    courier = make_courier(service, SimpleNamespace(version=1, forget=lambda: None), told)
    courier.start()
    try:
        for process in "aba":
            service.process = process
            courier.recover(ServiceUnavailable("lost"))
            courier.progressed()
            assert told.get(timeout=60) == "back"
    finally:
        courier.close()
    assert service.begun == ["a", "b", "a"]
