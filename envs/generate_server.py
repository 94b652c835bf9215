"""TRL's generation server, as `trl vllm-serve` of 0.25 answers, on a loopback port of one episode.

`POST /generate/ {"prompts": [...], "n": 1, "max_tokens": ..., ...}` and `POST /chat/ {"messages": [[...]], ...}` answer
`{"prompt_ids", "completion_ids", "logprobs"}`; `GET /health/` answers 200.
"""

from __future__ import annotations

import json
import threading
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rlx.envs.facades import VllmClient
from rlx.envs.generation import Generator
from rlx.envs.threads import EpisodeOver
from rlx.errors import RlxError

_FIELDS = {"/generate": "prompts", "/chat": "messages"}


class GenerateServer:
    """Listens from the first time that `port` is asked for until `close`."""

    def __init__(self, generator: Generator):
        self._generator = generator

    @cached_property
    def _server(self) -> ThreadingHTTPServer:
        client = VllmClient(self._generator)

        class Handler(_Handler):
            def answer(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
                given = {name: value for name, value in body.items() if name not in _FIELDS.values()}
                answer = client.generate(body[_FIELDS[route]], **given)
                flat = [[logprob for [logprob] in sequence] for sequence in answer["logprobs"]]
                return {name: answer[name] for name in ("prompt_ids", "completion_ids")} | {"logprobs": flat}

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), name="generate server", daemon=True).start()
        return server

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def close(self) -> None:
        if "_server" in vars(self):
            self._server.shutdown()
            self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    timeout = 60  # seconds that a client may leave its connection silent

    def answer(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def do_GET(self) -> None:
        self._reply(200, {"status": "ok"})

    def do_POST(self) -> None:
        route = self.path.rstrip("/")
        try:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            if route not in _FIELDS or not isinstance(body, dict) or _FIELDS[route] not in body:
                return self._reply(404, {"error": "POST /generate/ with prompts, or /chat/ with messages"})
            self._reply(200, self.answer(route, body))
        except (RlxError, ValueError, TypeError) as error:
            self._reply(400, {"error": str(error)})
        except EpisodeOver:
            self._reply(503, {"error": "the episode is over"})

    def log_message(self, format: str, *args: Any) -> None: ...

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
