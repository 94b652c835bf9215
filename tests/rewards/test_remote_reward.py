"""A scorer at an URL, against a real local server that behaves in every bad way."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from held_port import held_port

from rlx.errors import UserCodeError
from rlx.rewards import remote
from rlx.rewards.scoring import RewardWorker, ScoreRequest, score_group
from rlx.rewards.sources import load_source


class _Scorer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.answers: list[tuple[int, bytes] | None] = []
        """What the next requests get, None: the connection is closed; then the lengths of the completions."""
        self.meeting: threading.Barrier | None = None
        self.url = f"http://127.0.0.1:{self.server_port}/score"


class _Handler(BaseHTTPRequestHandler):
    server: _Scorer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        self.server.tokens.append(self.headers["Authorization"])
        try:
            if self.server.meeting is not None:
                self.server.meeting.wait(60)
        except threading.BrokenBarrierError:
            return
        lengths = json.dumps({"rewards": [len(text) for text in body["completions"]]}).encode()
        answer = self.server.answers.pop(0) if self.server.answers else (200, lengths)
        if answer is None:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(answer[0])
        self.send_header("Content-Length", str(len(answer[1])))
        self.end_headers()
        self.wfile.write(answer[1])

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[_Scorer]:
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(remote, "_CONNECT_TIMEOUT_S", 60.0)
    monkeypatch.delenv(remote.TOKEN_VARIABLE, raising=False)
    with _Scorer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join(5)


REQUEST = ScoreRequest("p", ["a", "bcd"], [[1], [2, 3]], {"answer": "4"}, max_completion_length=8, step=7)


def scored(url: str, tmp_path) -> list[float]:
    return score_group(load_source(url, tmp_path, "trl.reward_funcs[0]"), REQUEST).tolist()


def test_the_body_is_the_keyword_arguments_of_a_reward_function(server, tmp_path):
    assert scored(server.url, tmp_path) == [1.0, 3.0]
    assert server.seen == [
        {
            "prompts": ["p", "p"],
            "completions": ["a", "bcd"],
            "completion_ids": [[1], [2, 3]],
            "max_completion_length": 8,
            "trainer_state": {"global_step": 7},
            "answer": ["4", "4"],
        }
    ]
    assert server.tokens == [None]


def test_the_token_of_the_environment_is_sent_and_never_shown(server, tmp_path, monkeypatch):
    monkeypatch.setenv("RLX_REWARD_TOKEN", "s3cret")
    assert scored(server.url, tmp_path) == [1.0, 3.0]
    assert server.tokens == ["Bearer s3cret"]
    server.answers = [(401, b"who are you")]
    with pytest.raises(UserCodeError, match="is refused: 401 'who are you'; check RLX_REWARD_TOKEN") as caught:
        scored(server.url, tmp_path)
    assert "s3cret" not in str(caught.value)


def test_a_bare_list_and_null_are_rewards(server, tmp_path):
    server.answers = [(200, b"[null, 2]")]
    values = scored(server.url, tmp_path)
    assert values[0] != values[0]
    assert values[1] == 2.0


@pytest.mark.parametrize("trouble", [None, (500, b"oh"), (503, b"busy"), (429, b"slow down")])
def test_what_may_pass_is_tried_again(server, tmp_path, trouble):
    server.answers = [trouble, trouble]
    assert scored(server.url, tmp_path) == [1.0, 3.0]
    assert len(server.seen) == 3


def test_after_three_attempts_it_is_given_up_with_the_last_cause(server, tmp_path):
    server.answers = [(503, b"busy")] * 3
    with pytest.raises(UserCodeError, match=r"failed 3 times; the last time: 503 'busy'"):
        scored(server.url, tmp_path)
    assert len(server.seen) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_will_not_pass_is_not_tried_again(server, tmp_path, status):
    server.answers = [(status, b"no")]
    with pytest.raises(UserCodeError, match=f"{status} 'no'"):
        scored(server.url, tmp_path)
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>", "something that is not JSON: 200 '<html>'"),
        (b'{"scores": [1, 2]}', r"returned {'scores': \[1, 2\]} \(a value of type dict\)"),
        (b'{"rewards": [1]}', "returned 1 values for 2 completions"),
        (b'{"rewards": ["a", 1]}', r"returned 'a' \(a value of type str\) for completion 0"),
        (b'{"rewards": [NaN, 1]}', "returned nan for completion 0"),
        (b'{"rewards": 1}', r"returned 1 \(a value of type int\)"),
    ],
)
def test_an_answer_of_a_wrong_shape_is_told(server, tmp_path, body, message):
    server.answers = [(200, body)]
    with pytest.raises(UserCodeError, match=message):
        scored(server.url, tmp_path)


def test_nobody_at_the_address_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(remote, "_CONNECT_TIMEOUT_S", 60.0)
    told = "127.0.0.1:{}/score failed 3 times; the last time: ConnectError"
    with held_port() as port, pytest.raises(UserCodeError, match=told.format(port)):
        scored(f"http://127.0.0.1:{port}/score", tmp_path)


async def test_groups_are_scored_side_by_side(server, tmp_path):
    server.meeting = threading.Barrier(3)
    reward = load_source(server.url, tmp_path, "key")
    assert reward.is_async
    calls = [
        reward.function(prompts=["p"], completions=["ab"], trainer_state=SimpleNamespace(global_step=0))
        for _ in range(3)
    ]
    assert await asyncio.gather(*calls) == [[2], [2], [2]]


async def test_the_deadline_of_the_reward_ends_the_request(server, tmp_path):
    server.meeting = threading.Barrier(2)
    worker = RewardWorker(server.url, 0, tmp_path)
    start = time.monotonic()
    outcome, _ = await worker.score_beside(REQUEST, 0.2)
    assert (outcome.outcome, outcome.failed) == ("timeout", 2)
    assert time.monotonic() - start < 40
    server.meeting.abort()
    worker.close()
