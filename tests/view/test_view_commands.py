"""`rlx view` and `rlx report` as processes."""

from __future__ import annotations

import json
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request

import pytest

_DEADLINE_S = 300


def rlx(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlx.cli", *arguments], capture_output=True, text=True, timeout=_DEADLINE_S, check=False
    )


def hang_up_on(address: str, path: str) -> None:
    """A browser that asks and is gone before the answer."""
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=_DEADLINE_S) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
        connection.sendall(f"GET /{path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "time": time.time(), "reward": 0.5}) + "\n")
    return tmp_path


def test_view_prints_its_address_answers_there_and_ends_quietly(folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "rlx.cli", "view", str(folder), "--no-browser"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        address = line.split()[1]
        assert line == f"{folder.name}: {address}  (Ctrl-C ends it)\n"
        assert address.startswith("http://127.0.0.1:")
        for path in ("", "view/state", "view/samples"):
            hang_up_on(address, path)
        with urllib.request.urlopen(f"{address}view/state", timeout=_DEADLINE_S) as answer:
            assert json.load(answer)["run"]["step"] == 1
        with urllib.request.urlopen(address, timeout=_DEADLINE_S) as answer:
            assert b"view/page/page.js" in answer.read()
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=_DEADLINE_S)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, rest) == (0, ("", ""))


def test_a_port_in_use_and_a_missing_folder_are_one_line(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = rlx("view", str(folder), "--port", str(port), "--no-browser")
    expected = f"error: --port {port} is in use. Write another one, or leave --port away for a free one.\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", expected)
    result = rlx("view", str(folder / "nothing"))
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_report_writes_its_file_and_says_where(folder):
    result = rlx("report", str(folder), "--out", str(folder / "r.html"))
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{folder / 'r.html'}\n", "")
    assert (folder / "r.html").read_text().startswith("<!doctype html>")
