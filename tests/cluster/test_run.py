from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes import write_config

from rlx.cluster import run as run_module
from rlx.cluster.run import run_main
from rlx.config import load_config
from rlx.processes import start_of

pytestmark = pytest.mark.slow
END_S = 300
"""By then it has hung"""

PROGRAM = f"(sys.executable, '-u', {str(Path(__file__).with_name('fake_rlx.py'))!r})"
CODE = (
    "import sys\nfrom rlx.cluster.run import run_main\nfrom rlx.config import load_config\n"
    f"sys.exit(run_main(load_config(sys.argv[1]), ['--trl.beta', '0.1'], 2, program={PROGRAM}))"
)


def start(folder: Path, service: str, learner: str) -> subprocess.Popen[str]:
    """`rlx run` over `fake_rlx.py`, whose parts behave as told."""
    config = write_config(folder)
    return subprocess.Popen(
        [sys.executable, "-c", CODE, str(config.path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "SERVICE": service, "LEARNER": learner, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + END_S
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.02)


def runs(folder: Path, part: str) -> bool:
    return start_of(int((folder / f"{part}.pid").read_text())) is not None


def test_a_run_that_trains_stops_its_service_and_gives_0(tmp_path):
    run = start(tmp_path, "serves", "trains")
    output, _ = run.communicate(timeout=END_S)
    assert run.returncode == 0
    assert output.splitlines() == [
        "service: loading",
        "service: ready: http://127.0.0.1:1, 1 worker",
        "starting the learner: 2 processes",
        "trained",
    ]
    assert not runs(tmp_path, "service")
    assert "service stopped by 15" in (tmp_path / "out" / "service.log").read_text()
    assert (tmp_path / "service.arguments").read_text() == "--trl.beta 0.1"
    assert (tmp_path / "learner.arguments").read_text() == "--num-processes 2 --trl.beta 0.1"


@pytest.mark.parametrize(
    ("service", "learner", "code", "last"),
    [
        ("fails", "trains", 3, "service: error: service failed"),
        ("serves", "fails", 3, "error: learner failed"),
        ("dies later", "trains for ever", 4, "error: the rollout service ended with status 4"),
        ("dies later", "dies of the service's end", 4, "error: the rollout service ended with status 4"),
    ],
)
def test_the_first_failure_stops_the_other_and_is_the_last_thing_shown(tmp_path, service, learner, code, last):
    run = start(tmp_path, service, learner)
    output, _ = run.communicate(timeout=END_S)
    assert run.returncode == code
    assert output.splitlines()[-1].startswith(last)
    if service == "dies later":
        assert output.splitlines()[-2] == "service: error: service died"
    for part in ("service", "learner"):
        assert not (tmp_path / f"{part}.pid").exists() or not runs(tmp_path, part)


def test_ctrl_c_reaches_the_learner_first_and_then_stops_the_service(tmp_path):
    run = start(tmp_path, "serves", "trains for ever")
    wait_for(tmp_path / "learner.arguments")
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=END_S)
    assert run.returncode == 130
    assert output.splitlines()[-1] == "learner stopped by 2"
    assert "service stopped by 15" in (tmp_path / "out" / "service.log").read_text()


def test_ctrl_c_while_the_learner_is_being_started_reaches_it_all_the_same_and_once(tmp_path, monkeypatch):
    config, sent = write_config(tmp_path), []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    class Started:
        def __init__(self, line, **options):
            self.is_service = "vllm-serve" in line
            self.stdout = [b"ready: somewhere\n"]
            self.ended = None
            if not self.is_service:
                signal.raise_signal(signal.SIGINT)

        def send_signal(self, number):
            sent.append((self.is_service, number))
            self.ended = 0 if self.is_service else 130

        def poll(self):
            return self.ended

        def wait(self, timeout=None):
            return self.ended

    monkeypatch.setattr(run_module.subprocess, "Popen", Started)
    try:
        assert run_module.with_service(config, [], ["train"]) == 130
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert sent == [(False, signal.SIGINT), (True, signal.SIGTERM)]


def test_ctrl_c_while_the_service_loads_stops_it(tmp_path):
    run = start(tmp_path, "loads for ever", "trains")
    wait_for(tmp_path / "service.arguments")
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=END_S)
    assert run.returncode == 130
    assert not runs(tmp_path, "service")
    assert not (tmp_path / "learner.pid").exists()


def test_killing_the_run_takes_both_parts_along(tmp_path):
    run = start(tmp_path, "serves", "trains for ever")
    wait_for(tmp_path / "learner.arguments")
    run.kill()
    run.communicate()
    deadline = time.monotonic() + END_S
    while (runs(tmp_path, "service") or runs(tmp_path, "learner")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(tmp_path, "service")
    assert not runs(tmp_path, "learner")


def test_a_replayed_run_starts_no_service(tmp_path, monkeypatch, capsys):
    config = load_config(write_config(tmp_path).path, {("replay",): ("--replay", "recorded")})
    started = []
    monkeypatch.setattr("rlx.cluster.run.train_main", lambda *arguments: started.append(arguments) or 0)
    assert run_main(config, ["--replay", "recorded"], 2, program=("false",)) == 0
    assert started == [(config, ["--replay", "recorded"], 2)]
    assert capsys.readouterr().out == "replay: the learner alone, no service is started\n"
