"""A whole run against the real gateway: what it leaves in its files, and what the gateway knows of it."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest
from fake_service import TOKEN, config_for, length_reward, lines, place, serve, write_run

from rlx.episode import Episode
from rlx.errors import UserCodeError
from rlx.learner.main import train
from rlx.trace import chrome_trace, read_spans
from rlx.wire import GroupRequest


def fails_in_the_third_step(
    request: GroupRequest, episodes: list[Episode]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    if request.step >= 2 and not place(request.key).startswith("eval"):
        raise UserCodeError("trl.reward_funcs[0] (rewards.length) raised ZeroDivisionError")
    return length_reward(request, episodes)


@pytest.mark.slow
def test_a_run_leaves_its_events_and_spans_and_the_gateway_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLX_TOKEN", TOKEN)
    for limit in ("_CLOSE_S", "_TIMEOUT"):
        monkeypatch.setattr(f"rlx.learner.watch.observer.{limit}", 60.0)
    path, out = write_run(tmp_path, max_steps=4, save_steps=1), tmp_path / "out"
    with serve(fails_in_the_third_step) as served:
        with pytest.raises(UserCodeError, match="ZeroDivisionError"):
            train(config_for(path, served), 1)
        with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/metrics", timeout=30) as answer:
            exported = answer.read().decode()
    events = [event for event in lines(out / "events.jsonl") if event["source"] == "learner"]
    told = [(event["kind"], event["step"]) for event in events]
    assert ("publish", 0) in told[: told.index(("evaluation", 0))], "the step trains beside it"
    assert ("publish", 1) in told[told.index(("evaluation", 0)) :]
    assert [event for event in told if event != ("evaluation", 0)] == [
        ("run_started", 0), ("publish", 0), ("checkpoint", 1), ("publish", 1), ("checkpoint", 2), ("publish", 2),
        ("run_failed", 3),
    ]  # fmt: skip
    assert "ZeroDivisionError" in events[-1]["text"]
    assert "traceback" not in events[-1]
    spans = read_spans(out, range(2, 3))
    assert {(s.process, s.name) for s in spans} >= {
        ("learner rank 0", "forward and backward"), ("learner rank 0", "optimizer"), ("learner rank 0", "publish"),
        ("learner rank 0", "checkpoint"), ("learner rank 0", "group in flight"), ("gateway", "queued"),
        ("worker-0", "generate"),
    }  # fmt: skip
    assert len(chrome_trace(spans)["traceEvents"]) > len(spans)
    [sample, *_] = lines(out / "samples.jsonl")
    assert set(sample["timings"]) == {"queued_s", "generation_s", "reward_s"}
    assert sample["group_times"]["received"] <= sample["group_times"]["generated"] <= sample["group_times"]["scored"]
    [reward] = [line for line in exported.splitlines() if line.startswith("rlx_learner_reward ")]
    assert float(reward.split()[1]) == lines(out / "metrics.jsonl")[-1]["reward"]
