"""Whole runs in which learner and service go on beside each other, or one of them dies: every prompt is trained once."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_service import ScriptedWorker, config_for, lines, serve, write_run
from held_port import held_port
from learner_process import LIMIT_S, run, start
from safetensors.torch import load
from torch import nn

from rlx.learner.incoming import rollouts
from rlx.learner.incoming.stream import Fetched
from rlx.learner.main import train
from rlx.wire import Completion

pytestmark = pytest.mark.slow

EPOCHS = {"max_steps": None, "num_epochs": 2, "samples_per_step": 100}
"""Ten prompts, two a step: ten steps."""


def check_every_prompt_once(out: Path) -> None:
    assert Counter(s["prompt"] for s in lines(out / "samples.jsonl")) == {f"data {i} =": 2 * 4 for i in range(10)}
    assert [r["step"] for r in lines(out / "metrics.jsonl")] == list(range(1, 11))


def wait_until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


class SynchronousLoop:
    """Publish, sample, wait, one after the other, in as few lines as possible: what max_staleness 0 must equal."""

    def __init__(
        self, client: Any, publisher: Any, evaluator: Any, ledger: Any, session: str, waits: Any, *,
        request_of: Any, evaluates: Any, on_evaluation: Any, **_: Any,
    ):  # fmt: skip
        self._client, self._publisher, self._evaluator, self._session = client, publisher, evaluator, session
        self._request_of, self._evaluates, self._on_evaluation = request_of, evaluates, on_evaluation

    def start(self) -> None:
        self._client.begin_session(self._session)

    def batch(self, step: int, model: nn.Module) -> Fetched:
        self._bring(step, model)
        tickets = (2 * step, 2 * step + 1)
        return Fetched(tickets, self._client.rollouts([self._request_of(number, 0) for number in tickets]))

    def finish(self, model: nn.Module) -> None:
        self._bring(4, model)

    def _bring(self, step: int, model: nn.Module) -> None:
        packed = self._publisher.snapshot(model)
        self._publisher.send(packed)
        if self._evaluates(step):
            self._evaluator.start(step, self._publisher.version)
            self._on_evaluation(self._evaluator.result(30.0), packed)

    def state(self) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...


def test_without_staleness_a_run_is_the_synchronous_loop_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_run(tmp_path, eval_steps=2, samples_per_step=100, trl={"beta": 0.1})
    for name in ("feed", "loop"):
        with serve(worker=ScriptedWorker(slow=0.05)) as served:
            train(config_for(path, served, output_dir=str(tmp_path / name)), 1)
        monkeypatch.setattr(rollouts, "Feed", SynchronousLoop)
    feed, loop = (load((tmp_path / name / "model.safetensors").read_bytes()) for name in ("feed", "loop"))
    assert feed.keys() == loop.keys()
    assert all(torch.equal(feed[name], loop[name]) for name in feed)
    for file in ("samples", "evals"):
        first, second = (lines(tmp_path / name / f"{file}.jsonl") for name in ("feed", "loop"))
        own = {"key": "", "seconds": 0.0, "timings": {}, "group_times": {}}
        assert [r | own for r in first] == [r | own for r in second]
    first, second = (lines(tmp_path / name / "metrics.jsonl") for name in ("feed", "loop"))
    for name in ("loss", "reward", "kl", "grad_norm"):
        assert [r[name] for r in first] == [r[name] for r in second]


@pytest.mark.parametrize("staleness", [1, 2])
def test_every_prompt_is_trained_once_and_none_that_is_too_old(tmp_path: Path, staleness: int) -> None:
    path = write_run(tmp_path, async_={"max_staleness": staleness}, eval_steps=3, **EPOCHS)
    with serve(worker=ScriptedWorker(slow=0.3)) as served:
        train(config_for(path, served), 1)
    check_every_prompt_once(tmp_path / "out")
    metrics = lines(tmp_path / "out" / "metrics.jsonl")
    assert 0 < max(r["sample/staleness_max"] for r in metrics) <= staleness
    evals = lines(tmp_path / "out" / "evals.jsonl")
    assert [e["step"] for e in evals] == [0, 3, 6, 9, 10]
    assert len({e["weight_version"] for e in evals}) == 5


def test_groups_without_spread_are_left_out_and_replaced(tmp_path: Path) -> None:
    def score(request: Any, episodes: Any) -> Any:
        flat = request.columns["answer"] in "01234"
        return {"rewards.length": [1.0 if flat else e.num_sampled / 10 for e in episodes]}, {}

    path = write_run(
        tmp_path, max_steps=4, samples_per_step=100, test_datasets=None,
        async_={"max_staleness": 1, "dynamic_sampling": True, "max_sampling_attempts": 20},
    )  # fmt: skip
    with serve(score) as served:
        train(config_for(path, served), 1)
    samples = lines(tmp_path / "out" / "samples.jsonl")
    assert {s["columns"]["answer"] for s in samples} <= set("56789")
    metrics = lines(tmp_path / "out" / "metrics.jsonl")
    assert sum(r["rollout/filtered_groups"] for r in metrics) > 0
    assert all(r["frac_reward_zero_std"] == 0 for r in metrics)


class Stuck(ScriptedWorker):
    """Does not get beyond its ninth group, so that a run needs another worker."""

    async def generate(self, *asked: Any) -> list[Completion]:
        completions = await super().generate(*asked)
        if sum(event[0] == "generate" for event in self.events) > 9:
            await asyncio.Event().wait()
        return completions


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_service_that_is_started_anew_on_the_same_port_loses_and_doubles_nothing(
    tmp_path: Path, staleness: int
) -> None:
    path = write_run(tmp_path, async_={"max_staleness": staleness}, test_datasets=None, **EPOCHS)
    with ThreadPoolExecutor() as pool, held_port() as port:
        with serve(worker=Stuck(slow=0.3), port=port) as first:
            training = pool.submit(train, config_for(path, first), 1)
            wait_until(lambda: len(first.generated()) >= 7)
        with serve(worker=ScriptedWorker(slow=0.3), port=port) as second:
            training.result(LIMIT_S)
    check_every_prompt_once(tmp_path / "out")
    versions = [e[1] for served in (first, second) for e in served.worker.events if e[0] == "publish"]
    assert len(second.generated()) > 0
    again = versions[len([e for e in first.worker.events if e[0] == "publish"])]
    manifest = second.worker.manifests[again]
    assert manifest.gate, "its workers are verified before they serve"
    assert manifest.base_fingerprint is None, "it gets everything"


def test_a_learner_that_is_killed_goes_on_and_the_service_needs_no_help(tmp_path: Path) -> None:
    keys = {"async_": {"max_staleness": 1}, "save_steps": 2, "test_datasets": None, **EPOCHS}
    path = write_run(tmp_path, **keys)
    with serve(worker=ScriptedWorker(slow=0.5)) as served:
        killed = start(path, served, 2)
        wait_until(lambda: (tmp_path / "out" / "checkpoint-4" / "rlx_state.json").exists())
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=90)
        status, _, err = run(path, served, 2, "--auto_resume_from_checkpoints", "true")
    assert (status, err) == (0, "")
    check_every_prompt_once(tmp_path / "out")


def test_a_second_learner_takes_the_service_over_and_the_first_says_so(tmp_path: Path) -> None:
    path = write_run(tmp_path, max_steps=100000, test_datasets=None)
    with serve(worker=ScriptedWorker(slow=0.05)) as served:
        first = start(path, served, 1)
        wait_until(lambda: len(served.generated()) >= 4)
        train(config_for(path, served, max_steps=2, output_dir=str(tmp_path / "second")), 1)
        _, err = first.communicate(timeout=LIMIT_S)
    assert first.returncode != 0
    assert "another learner" in err
