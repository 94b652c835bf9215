"""The feed's errands: what the learner is told of the workers with every publish."""

from __future__ import annotations

import math
import queue
from types import SimpleNamespace
from typing import Any

import pytest

from rlx.learner.incoming.courier import Courier, Served, Waits


class Service:
    """Of one worker: how many seconds ago it was asked, and how long it had been busy by then."""

    def __init__(self) -> None:
        self.asked_s_ago, self.busy_s = 0.0, 0.0

    def begin_session(self, session: str) -> dict[str, str]:
        return {"instance": "a"}

    def instance(self) -> str:
        return "a"

    def workers(self) -> dict[str, Any]:
        load = {"busy_s": self.busy_s, "running": 8, "waiting": 5}
        return {
            "waiting": 16,
            "workers": [{"name": "w", "state": "ready", "load": load, "load_age_s": self.asked_s_ago}],
        }


def test_how_busy_the_workers_were_is_told_only_when_they_were_asked_anew():
    service, served = Service(), queue.SimpleQueue[Served]()
    publisher = SimpleNamespace(version=1, send=lambda packed, on_version: None)
    courier = Courier(
        service, publisher, None, "s", Waits(1, 1), on_version=lambda step, version: None, on_served=served.put,
        on_back=lambda: None, on_idle=lambda: None, on_error=lambda error: None, on_evaluation=lambda evaluation, packed: None, on_wait=lambda line: None,
    )  # fmt: skip

    def busy(asked_s_ago: float, busy_s: float) -> float:
        service.asked_s_ago, service.busy_s = asked_s_ago, busy_s
        courier.publish(0, SimpleNamespace(), evaluate=False)
        return served.get(timeout=30).worker_busy

    courier.start()
    try:
        assert math.isnan(busy(1000, 5)), "there is nothing to compare it with"
        courier.publish(0, SimpleNamespace(), evaluate=False)
        assert (told := served.get(timeout=30)).running == 8
        assert told.waiting == 5 + 16, "in the worker and before it"
        assert busy(500, 130) == pytest.approx(0.25, rel=0.1)
        assert math.isnan(busy(500, 130)), "nobody has asked since, which does not mean that it was idle"
        assert busy(0, 130) == 0, "it was idle"
        assert math.isnan(busy(-500, 3)), "another process counts from 0 again"
    finally:
        courier.close()
