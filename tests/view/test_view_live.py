"""The run in memory, as a gateway keeps it."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from rlx.view.app import view_app
from rlx.view.live import LiveRun
from rlx.view.state import Seen


def metrics(first, last):
    return [
        {"step": step, "time": 1000.0 + step, "reward": step / 10, "bottleneck": "balanced"}
        for step in range(first, last + 1)
    ]


def test_only_what_is_new_comes_after_the_first_answer():
    run = LiveRun()
    run.add({"run": {"name": "a", "output_dir": "/o", "total_steps": 9}, "metrics": metrics(1, 3)})
    first = run.since(Seen())
    assert first["reset"]
    assert first["metrics"]["columns"]["step"] == [1, 2, 3]
    run.add({"metrics": metrics(4, 5), "events": [{"time": 1, "kind": "publish", "text": "x"}]})
    second = run.since(Seen(first["generation"], 3, 0, 0))
    assert not second["reset"]
    assert second["metrics"] == {
        "count": 5,
        "columns": {"time": [1004.0, 1005.0], "reward": [0.4, 0.5], "step": [4, 5]},
    }
    assert [event["text"] for event in second["events"]["records"]] == ["x"]
    assert second["texts"] == {"bottleneck": "balanced"}


def test_a_resumed_run_drops_what_lay_behind_its_checkpoint():
    run = LiveRun()
    run.add({"metrics": metrics(1, 5), "samples": [{"step": 2, "prompt": "p"}, {"step": 5, "prompt": "p"}]})
    seen = Seen(run.since(Seen())["generation"], 5)
    run.add({"metrics": metrics(4, 4)})
    answer = run.since(seen)
    assert answer["reset"]
    assert answer["metrics"]["columns"]["step"] == [1, 2, 3, 4]
    assert run.table(1).steps.tolist() == [2]


def test_another_output_dir_is_another_run():
    run = LiveRun()
    run.add({"run": {"name": "a", "output_dir": "/a"}, "metrics": metrics(1, 5)})
    run.add({"run": {"name": "b", "output_dir": "/b"}, "metrics": metrics(1, 2)})
    answer = run.since(Seen())
    assert (run.name, answer["metrics"]["count"]) == ("b", 2)


def test_memory_is_bounded():
    run = LiveRun(max_metrics=100, max_samples=10, max_events=10)
    for step in range(1, 1001):
        run.add({"metrics": metrics(step, step), "samples": [{"step": step}], "events": [{"kind": "publish"}]})
    answer = run.since(Seen())
    assert 100 <= len(answer["metrics"]["columns"]["step"]) <= 200
    assert answer["metrics"]["columns"]["step"][-1] == 1000
    assert run.table(1).steps.tolist() == list(range(991, 1001))
    assert run.record(int(run.table(1).places[0])) == {"step": 991}
    assert run.record(3) is None
    assert answer["events"]["count"] == 1000


def test_what_is_no_record_is_left_out():
    run = LiveRun()
    run.add({"metrics": [3, {"reward": 1}, {"step": 1, "reward": float("nan")}], "samples": "x", "events": [None]})
    assert run.since(Seen())["metrics"]["columns"] == {"step": [1]}


@pytest.fixture
def client():
    run = LiveRun()
    run.add({"run": {"name": "a"}, "metrics": metrics(1, 3)})
    return TestClient(view_app([run]), base_url="http://127.0.0.1")


def test_the_page_lets_nothing_in_from_outside(client):
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert client.get("/view/page/nothing.js").status_code == 404


def test_another_host_name_reads_nothing(client):
    assert client.get("/view/state", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/view/state").json()["run"]["name"] == "a"
    assert client.get("/view/state?run=1").status_code == 404
