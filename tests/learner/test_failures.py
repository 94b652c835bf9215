"""A run that cannot go on ends soon, with one message and no process left, also with two processes."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from fake_service import ScriptedWorker, Served, serve, write_run
from held_port import held_port
from learner_process import LIMIT_S, gone, run, start

from rlx.processes import descendants

pytestmark = pytest.mark.slow


def test_a_model_that_no_process_can_load_is_told_once(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    with serve() as served:
        status, _, err = run(path, served, 2)
    assert status == 1
    assert err.startswith(f"error: {path}: base_model: the model in {tmp_path / 'model'} cannot be loaded: ")
    assert len(err.splitlines()) == 1


def test_a_service_that_is_not_there_is_told_with_what_to_type(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    with held_port() as port:
        status, out, err = run(path, Served(ScriptedWorker(), port), 2, "--trl.vllm_server_timeout", "5")
    assert status == 1
    assert f"waiting for the rollout service: nobody answers at http://127.0.0.1:{port}" in out
    assert err == (
        f"error: no rollout service was ready within 5 s: nobody answers at http://127.0.0.1:{port}; start it in "
        "another terminal: rlx vllm-serve <cfg.yaml>\n"
    )
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {"logs"}


def test_a_service_that_goes_away_in_the_run_ends_it_with_its_checkpoints_kept(tmp_path: Path) -> None:
    path = write_run(tmp_path, max_steps=100000, save_steps=1, save_total_limit=2, test_datasets=None)
    with serve() as served:

        def stop_in_step_3() -> None:
            end = time.monotonic() + LIMIT_S
            while len(served.generated()) < 8 and time.monotonic() < end:
                time.sleep(0.01)
            served.stop()

        stopper = threading.Thread(target=stop_in_step_3)
        stopper.start()
        status, _, err = run(path, served, 2, "--trl.vllm_server_timeout", "2")
        stopper.join()
    assert status == 1
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err
    complete = [p for p in (tmp_path / "out").glob("checkpoint-*/rlx_state.json") if json.loads(p.read_text())]
    assert complete


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_process_and_no_traceback(tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM goes to the command, Ctrl-C in a terminal to all its processes."""
    path = write_run(tmp_path, max_steps=100000, test_datasets=None)
    with serve() as served:
        learner = start(path, served, 2)
        try:
            end = time.monotonic() + LIMIT_S
            while not served.generated() and time.monotonic() < end:
                time.sleep(0.1)
            running = descendants(learner.pid)
            assert len(running) >= 2
            if number == signal.SIGINT:
                os.killpg(learner.pid, number)
            else:
                learner.send_signal(number)
            _, err = learner.communicate(timeout=LIMIT_S)
        finally:
            learner.kill()
        assert learner.returncode == 128 + number
        assert gone(running)
        assert "Traceback" not in err
