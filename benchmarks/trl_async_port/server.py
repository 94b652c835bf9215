"""The endpoints of a vLLM server that TRL's AsyncGRPOTrainer calls, around the engines of `trace_engine.py`.

    python server.py LISTENING_SOCKET_FD SETTINGS_JSON

Completions go to the engine with the least in flight, as a data-parallel vLLM server does it. Request k for a prompt
replays completion k of the trace; per-request seeds are ignored. A weight update pauses every engine, moves no bytes
and answers at once, which is less than a real server does. `GET /counts` tells what was generated.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections import defaultdict
from functools import cache

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from trace_engine import FIRST_TICKET, TOKEN, Decode, Trace, TraceEngine


class Server:
    def __init__(self, trace: Trace, decode: Decode, slots: int, speeds: list[float], swap_s: float):
        self._lengths = trace.lengths()
        self._engines = [TraceEngine(self._lengths, decode, slots, speed=speed) for speed in speeds]
        self._next: dict[int, int] = defaultdict(int)
        self._swap_s, self._version, self._tokens = swap_s, 0, 0

    async def completions(self, request: Request) -> Response:
        body = await request.json()
        ticket = max(body["prompt"]) - FIRST_TICKET
        index = self._next[ticket] % self._lengths.shape[1]
        self._next[ticket] += 1
        engine = min(self._engines, key=lambda e: e.in_flight)
        completion = await engine.generate_one(ticket, index)
        self._tokens += completion.ids.size
        return Response(_answer(completion.ids.size), media_type="application/json")

    async def pause(self, request: Request) -> Response:
        await asyncio.gather(*(engine.pause() for engine in self._engines))
        return JSONResponse({})

    async def resume(self, request: Request) -> Response:
        await asyncio.sleep(self._swap_s)
        self._version += 1
        for engine in self._engines:
            engine.resume(self._version)
        return JSONResponse({})

    async def nothing(self, request: Request) -> Response:
        return JSONResponse({})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "trace", "max_model_len": 2**20}]})

    async def counts(self, request: Request) -> Response:
        return JSONResponse({"tokens": self._tokens, "requests": sum(self._next.values())})

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/pause", self.pause, methods=["POST"]),
                Route("/resume", self.resume, methods=["POST"]),
                Route("/health", self.nothing),
                Route("/v1/models", self.models),
                Route("/counts", self.counts),
            ]
        )


@cache
def _answer(length: int) -> bytes:
    choice = {
        "index": 0,
        "text": "",
        "finish_reason": "stop",
        "token_ids": [TOKEN] * length,
        "logprobs": {"token_logprobs": np.full(length, -1.0).tolist()},
    }
    return json.dumps({"object": "text_completion", "choices": [choice]}).encode()


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    given = json.loads(sys.argv[2])
    server = Server(
        Trace(**given["trace"]), Decode(**given["decode"]), given["slots"], given["speeds"], given["swap_s"]
    )
    config = uvicorn.Config(server.app(), log_level="warning", access_log=False, lifespan="off", backlog=4096)
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


if __name__ == "__main__":
    main()
