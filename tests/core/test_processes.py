from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from rlx.errors import ServiceError
from rlx.processes import (
    PYTHON_MODULE,
    alive,
    descendants,
    end_processes,
    free_port,
    stop_process,
)

SLEEPER = "import time; print('up', flush=True); time.sleep(600)"
DEAF = "import signal; signal.signal(15, signal.SIG_IGN); " + SLEEPER
PARENT = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEPER!r}]).wait()"


def start(code: str, **options: object) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, **options)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return process


def ended(pid: int, start_time: int) -> bool:
    deadline = time.monotonic() + 60
    while alive(pid, start_time) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid, start_time)


def test_the_first_free_port_skips_those_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert free_port("127.0.0.1", port) > port
        with pytest.raises(ServiceError, match=f"no port of 127.0.0.1 is free from {port} to {port}"):
            free_port("127.0.0.1", port, tries=1)


def test_a_file_of_the_current_folder_shadows_no_module_of_a_process_of_ours(tmp_path):
    (tmp_path / "this.py").write_text("raise SystemExit(3)")
    done = subprocess.run([*PYTHON_MODULE, "this"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:22]) == (0, "The Zen of Python, by ")
    code = f"import sys, rlx.processes as p; sys.path[:0] = ['', {str(tmp_path)!r}]; p.import_nothing_from_here(); import this"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:22]) == (0, "The Zen of Python, by ")


def test_descendants_are_children_and_grandchildren_and_not_zombies():
    parent = start(PARENT)
    below = descendants(parent.pid)
    assert len(below) == 1
    assert below.items() <= descendants(os.getpid()).items()
    assert all(alive(pid, since) and not alive(pid, since + 1) for pid, since in below.items())
    end_processes(below, 0.0)
    parent.wait(60)
    assert parent.pid not in descendants(os.getpid())


def test_a_child_that_dies_with_its_parent_ends_when_the_parent_is_killed():
    code = PARENT.replace(".Popen([", ".Popen(preexec_fn=rlx.processes.die_with_parent, args=[")
    parent = start("import rlx.processes; " + code)
    [(pid, since)] = descendants(parent.pid).items()
    parent.kill()
    parent.wait()
    assert ended(pid, since)


def test_stopping_asks_first_and_kills_what_does_not_listen():
    assert stop_process(start(SLEEPER), signal.SIGTERM, 60.0) == -signal.SIGTERM
    begin = time.monotonic()
    assert stop_process(start(DEAF), signal.SIGTERM, 0.3) == -signal.SIGKILL
    assert time.monotonic() - begin >= 0.3


def test_stopping_by_force_takes_the_grandchildren_along():
    parent = start("import signal; signal.signal(15, signal.SIG_IGN); " + PARENT)
    [(pid, since)] = descendants(parent.pid).items()
    stop_process(parent, signal.SIGTERM, 0.1)
    assert ended(pid, since)
