from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import PATIENCE_S, patiently, seen_by_watchdog, write_config
from serve_parts import update

from rlx.cluster.panels import DASHBOARDS
from rlx.cluster.serve import serve
from rlx.config import Config, load_config
from rlx.errors import ConfigError
from rlx.processes import alive, descendants, free_port
from rlx.rollout.auth import service_token
from rlx.rollout.gateway import bind
from rlx.series import CATALOGUE

START_TIMEOUT_S, END_S = 600, 300
GROUP = {"key": "a", "prompt": "x", "prompt_ids": [1, 2], "n": 2, "sampling": {"max_tokens": 4}, "columns": {}}


class Service:
    """A running `serve_fake.py`."""

    def __init__(self, config: Config, engine: str, environment: dict[str, str]):
        self.config, self.url = config, config.base_url
        self.output = config.path.parent / "output.txt"
        script = str(Path(__file__).with_name("serve_fake.py"))
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-u", script, str(config.path), engine],
                stdout=output, stderr=output, env={**os.environ, **environment}, start_new_session=True,
            )  # fmt: skip

    def statuses_until_ready(self) -> list[tuple[int, str]]:
        """Every distinct answer of /health until it is 200."""
        seen: list[tuple[int, str]] = []
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                answer = httpx.get(f"{self.url}/health", timeout=30)
            except httpx.TransportError:
                time.sleep(0.1)
                continue
            if (now := (answer.status_code, answer.json()["status"])) not in seen:
                seen.append(now)
            if answer.status_code == 200:
                return seen
            time.sleep(0.1)
        raise AssertionError(f"never ready: {seen}\n{self.output.read_text()}")


@contextmanager
def service(config: Config, engine: str = "fake", **environment: str) -> Iterator[Service]:
    running = Service(config, engine, environment)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def left_of(processes: dict[int, int]) -> list[str]:
    """The command lines of `processes` that still run after `END_S` seconds."""
    deadline = time.monotonic() + END_S
    while (left := [pid for pid, since in processes.items() if alive(pid, since)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in left]


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


def write(folder: Path, **vllm: object) -> Config:
    return write_config(folder, port=free_port("127.0.0.1", 18000), **vllm)


# --- a real Prometheus -------------------------------------------------------------------------------------------------

QUERIES = [
    query.expression.replace("$job", "rlx").replace("$__rate_interval", "20s")
    for board in DASHBOARDS
    for panel in board.panels
    for query in panel.queries
]
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "monitoring.md"
QUERIES += re.findall(r"`([^`]+)`", re.findall(r"\| question \| queries \|\n((?:\|.*\n)+)", GUIDE.read_text())[0])
MOVING = {
    "rlx_groups_total", "rlx_generation_seconds_total", "rlx_scoring_seconds_total", "rlx_weight_updates_total",
    "rlx_weight_version", "rlx_worker_weight_version", "rlx_worker_generated_tokens_total",
    "rlx_worker_busy_seconds_total", "rlx_reward_calls_total", "rlx_reward_seconds_total", "rlx_episodes_total",
    "rlx_episode_turns_total", *(series.name for series in CATALOGUE if series.origin == "learner"),
}  # fmt: skip
"""Of what a service does whose learner works on and whose workers are well"""
Ask = Callable[[str], list[dict[str, Any]]]


@contextmanager
def learner(config: Config) -> Iterator[httpx.Client]:
    bearer = {"authorization": f"Bearer {service_token()}"}
    with httpx.Client(base_url=config.base_url, headers=bearer, timeout=60) as client:
        yield client


@contextmanager
def prometheus_of(config: Config) -> Iterator[Ask]:
    """Asks the one that `rlx dashboard` starts."""
    command = [sys.executable, "-u", "-m", "rlx.cli", "dashboard", str(config.path), "--interval", "1"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
        httpx.Client(timeout=60) as client,
    ):
        try:
            assert process.stdout is not None
            lines: list[str] = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("Prometheus:"):
                    break
            said = "".join(lines)
            assert "Ray's dashboard:   http://127.0.0.1:" in said
            [url] = re.findall(r"^Prometheus: +(http://127.0.0.1:[0-9]+) ", said, re.M) or pytest.fail(said)
            yield lambda query: client.get(f"{url}/api/v1/query", params={"query": query}).json()["data"]["result"]
            below = descendants(process.pid)
            process.send_signal(signal.SIGINT)
            assert process.wait(END_S) == 130
            assert left_of(below) == []
        finally:
            process.kill()


def one_step(client: httpx.Client, step: int) -> None:
    """What a learner asks of the service in a step, and tells it."""
    manifest, data = asyncio.run(update(step))
    client.post("/v1/weights/announce", json=manifest.to_json()).raise_for_status()
    client.put(f"/v1/weights/{step}", content=data).raise_for_status()
    client.post(f"/v1/weights/{step}/commit").raise_for_status()
    client.post("/v1/rollouts", json=GROUP | {"key": f"step-{step}"}).raise_for_status()
    record = {series.key.format(function="f", outcome="ok"): 1.0 + step for series in CATALOGUE if series.key}
    client.post("/v1/observations", json={"metrics": [record], "evaluations": [record]}).raise_for_status()


def standing(ask: Ask) -> set[str]:
    """Which of `MOVING` did not, of either source."""
    moved = {
        (name, job)
        for name in MOVING
        for sample in ask(f"max by (job) (max_over_time({name}[1m]) - min_over_time({name}[1m])) > 0")
        if (job := sample["metric"]["job"])
    }
    return {f"{name} of {job}" for name in MOVING for job in ("rlx", "ray")} - {
        f"{name} of {job}" for name, job in moved
    }


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One for the next two tests, of which the second ends it."""
    with service(write(tmp_path_factory.mktemp("service")), RAY_metrics_report_interval_ms="1000") as running:
        assert running.statuses_until_ready() == [(503, "loading"), (200, "ok")]
        yield running


@pytest.mark.slow
def test_a_prometheus_on_the_runs_configuration_has_every_series_of_the_panels_from_the_gateway_and_from_ray(running):
    with learner(running.config) as client, prometheus_of(running.config) as ask:
        step, missing, end = 0, {"all"}, time.monotonic() + START_TIMEOUT_S
        while missing:
            assert time.monotonic() < end, (missing, running.output.read_text())
            step += 1
            one_step(client, step)
            time.sleep(0.5)
            missing = {query for query in QUERIES if not ask(query)} | standing(ask)
        both = 'count by (__name__) (last_over_time({__name__=~"rlx_.+", job="%s"}[1m]))'
        ours, rays = ({sample["metric"]["__name__"] for sample in ask(both % job)} for job in ("rlx", "ray"))
        assert ours == {series.name for series in CATALOGUE}
        assert {series.name for series in CATALOGUE if series.kind == "gauge"} <= rays <= ours
        assert rays >= MOVING


@pytest.mark.slow
def test_sigterm_drains_and_leaves_no_process_no_port_and_no_ray(running):
    answer = httpx.post(f"{running.url}/v1/rollouts", json=GROUP, timeout=60).json()
    assert answer["worker"] == "rlx-rollout-0"
    assert [c["rewards"]["reward_functions.length"] for c in answer["episodes"]] == [
        len(c["text"]) for c in answer["episodes"]
    ]
    below = descendants(running.process.pid)
    assert len(below) > 5
    [worker] = httpx.get(f"{running.url}/v1/workers", timeout=60).json()["workers"]
    assert os.getpriority(os.PRIO_PROCESS, worker["pid"]) == os.getpriority(os.PRIO_PROCESS, 0), "engines do not starve"
    open_files = [Path(os.readlink(fd)) for fd in Path(f"/proc/{running.process.pid}/fd").iterdir()]
    [temp_dir] = {path for path in open_files if path.name.startswith("rlx-ray-")}
    assert (temp_dir / "session_latest").exists()
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(END_S) == 0
    assert left_of(below) == []
    assert port_is_free(running.config.vllm.port)
    assert not temp_dir.exists()
    text = running.output.read_text()
    assert f"ready: {running.config.base_url}, 1 worker, version 0" in text
    assert "dashboard: http://127.0.0.1:" in text
    assert text.rstrip().endswith("stopped")
    assert "Traceback" not in text


@pytest.mark.slow
def test_after_sigkill_nothing_stays_either(tmp_path):
    config = write(tmp_path)
    with service(config) as running:
        running.statuses_until_ready()
        seen_by_watchdog(running.process.pid)
        below = descendants(running.process.pid)
        running.process.kill()
        running.process.wait()
        assert left_of(below) == []
    assert port_is_free(config.vllm.port)


@pytest.mark.slow
def test_an_engine_that_does_not_load_ends_the_service_with_its_error(tmp_path):
    config = write_config(tmp_path, "cluster: {dashboard: false}", port=free_port("127.0.0.1", 18000))
    with service(config, engine="broken") as running:
        below: dict[int, int] = {}
        while running.process.poll() is None:
            below |= descendants(running.process.pid)
            time.sleep(0.2)
        assert running.process.returncode == 1
        assert left_of(below) == []
    text = running.output.read_text()
    last = text.rstrip().splitlines()[-1]
    assert re.fullmatch(r"error: no model here; its log.*: .*/rlx-rollout-0\.log", last)
    assert "Traceback" not in text


@pytest.mark.slow
def test_two_gpus_asked_of_a_joined_cluster_with_one_is_an_error_with_the_keys(cluster, tmp_path):
    node = patiently(lambda: cluster.add_node(num_gpus=1, num_cpus=0, object_store_memory=100 * 2**20))
    cluster.wait_for_nodes(PATIENCE_S)
    try:
        config = write(tmp_path, data_parallel_size=2)
        with service(config, RAY_ADDRESS=cluster.address) as running:
            assert running.process.wait(START_TIMEOUT_S) == 2
    finally:
        cluster.remove_node(node)
    last = running.output.read_text().rstrip().splitlines()[-1]
    assert "vllm.data_parallel_size asks for 1 × 2 = 2 GPUs, and the Ray cluster at" in last
    assert "has 1. Write `vllm.data_parallel_size: 1`." in last


def test_a_port_in_use_is_an_error_before_anything_starts(tmp_path, monkeypatch):
    config, started = write(tmp_path), []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: started.append(command))
    with (
        bind("127.0.0.1", config.vllm.port),
        pytest.raises(ConfigError, match=f"vllm.port: {config.vllm.port} is in use"),
    ):
        asyncio.run(serve(config))
    assert started == []


def test_a_model_folder_that_is_not_there_is_an_error_before_anything_starts(tmp_path):
    path = write(tmp_path).path
    path.write_text(path.read_text().replace("base_model: fake", "base_model: ./no/model"))
    with pytest.raises(ConfigError, match=r"config.yaml: base_model: there is no folder './no/model'"):
        asyncio.run(serve(load_config(path)))
