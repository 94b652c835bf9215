"""What is said of a process of vLLM that failed."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing

import pytest

from rlx.rollout.vllm_start import ENDED, HOST_PID, ProcessHook, _Beginning, first_cause, reason

AT_IMPORT = gc.get_threshold()


class EngineDeadError(Exception):
    """As vLLM's, which points to a stack trace that nobody sees."""


def test_a_dead_engine_is_told_with_its_first_exception_or_with_what_may_have_ended_it(tmp_path):
    error = EngineDeadError("EngineCore encountered an issue. See stack trace (above) for the root cause.")
    causes = tmp_path / "causes"
    causes.touch()
    assert first_cause(causes, error) == ENDED
    causes.write_text(json.dumps(["MemoryError", "no room"]) + "\n")
    assert first_cause(causes, error) == "MemoryError: no room"
    assert reason(causes, error) == "its engine process died: MemoryError: no room"
    assert reason(causes, ValueError("of another kind")) == "of another kind"
    assert first_cause(None, ValueError("seen here")) == "ValueError: seen here"


def test_that_the_host_misses_its_engine_is_no_cause_of_the_engines_end(tmp_path, monkeypatch: pytest.MonkeyPatch):
    causes = tmp_path / "causes"
    causes.touch()
    monkeypatch.delenv(HOST_PID, raising=False)
    monkeypatch.setenv("RLX_ENGINE_CAUSE_FILE", str(causes))
    missed = EngineDeadError("EngineCore encountered an issue. See stack trace (above) for the root cause.")
    for error, found in ((missed, ENDED), (MemoryError("no room"), "MemoryError: no room")):
        seen = (type(error), error, None)
        ProcessHook().emit(logging.LogRecord("vllm", logging.ERROR, __file__, 1, "failed", None, seen))
        assert first_cause(causes, missed) == found


def send_threshold(sender) -> None:
    sender.send((AT_IMPORT, "rlx" in multiprocessing.current_process()._config))


def test_a_process_of_vllm_looks_seldom_for_cycles_before_it_imports_anything_and_so_do_its_own(monkeypatch):
    monkeypatch.setitem(multiprocessing.current_process()._config, "rlx", _Beginning())
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_threshold, args=(sender,))
    process.start()
    assert receiver.poll(60)
    (first, *_), inherited = receiver.recv()
    process.join(60)
    assert first > 10 * gc.get_threshold()[0]
    assert inherited
