"""Requests per second of the gateway itself: an engine that answers after 50 ms, 1 to 1,000 concurrent requests.

Beside it, in the same run: raw uvicorn (an ASGI function) and FastAPI (one route), which read a body of the same size,
sleep as long and answer with as many bytes as the gateway does. Each server is a process of its own; one client
process sends the same request to all, over its own HTTP, so that it is not the slower side. CPU: of the server. A request of the gateway
is a group: decoded, routed to one of 8 workers, generated, scored, encoded. Limit: raw uvicorn.
"""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import uvicorn
import uvloop
from fastapi import FastAPI, Request, Response
from local_parts import ConstantScorer, LoopLag, SleepEngine, arguments, child, machine, spread, write_json
from service import print_versions

from rlx.config.sections import ServiceSection
from rlx.envs.single_turn import SingleTurn
from rlx.frame import CONTENT_TYPE
from rlx.rollout.app import create_app
from rlx.rollout.engine_worker import EngineWorker
from rlx.rollout.gateway import quiet_collector, serving
from rlx.rollout.service import RolloutService
from rlx.wire import GroupRequest, Sampling

SERVICE_S, WORKERS, TOKENS, GENERATIONS = 0.05, 8, 16, 1
CONCURRENT = (1, 10, 100, 300, 1000)
_KEY = "k/0000000000"


def template() -> bytes:
    prompt = np.arange(1, 65, dtype=np.int32)
    return GroupRequest(_KEY, "a question", prompt, GENERATIONS, Sampling(max_tokens=TOKENS), {"answer": "42"}).encode()


# --- the servers ------------------------------------------------------------------------------------------------------


async def serve(kind: str, listener: socket.socket, answer_bytes: int) -> None:
    lag = LoopLag()
    if kind == "gateway":
        workers = [EngineWorker(f"worker-{i}", SleepEngine(SERVICE_S, TOKENS)) for i in range(WORKERS)]
        settings = ServiceSection()
        service = RolloutService(
            list(workers), ConstantScorer(), SingleTurn(), settings, model="none", start_timeout_s=30
        )
        app = create_app(service, None, require_token_for_data=False)
        app.add_api_route("/lag", lag.take)
        async with serving(app, listener):
            await service.start()
            quiet_collector()
            await asyncio.Event().wait()
    quiet_collector()
    body = b"x" * answer_bytes
    application = fast_api(body, lag) if kind == "fastapi" else raw(body, lag)
    config = uvicorn.Config(application, log_config=None, access_log=False, lifespan="off", backlog=4096)
    await uvicorn.Server(config).serve(sockets=[listener])


def fast_api(body: bytes, lag: LoopLag) -> FastAPI:
    app = FastAPI(openapi_url=None)

    @app.post("/v1/rollouts")
    async def rollouts(request: Request) -> Response:
        await request.body()
        await asyncio.sleep(SERVICE_S)
        return Response(body, media_type=CONTENT_TYPE)

    app.add_api_route("/lag", lag.take)
    return app


def raw(body: bytes, lag: LoopLag) -> Any:
    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["path"] == "/lag":
            answer = json.dumps(lag.take()).encode()
        else:
            while (await receive()).get("more_body"):
                pass
            await asyncio.sleep(SERVICE_S)
            answer = body
        headers = [(b"content-type", CONTENT_TYPE.encode()), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    return app


# --- the client -------------------------------------------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """Sends one request after the other until `end`; an answer is read by its Content-Length."""

    def __init__(self, load: Load, done: asyncio.Future[None]):
        self._load, self._done, self._data = load, done, b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._sent = time.perf_counter()
        if self._sent > self._load.end:
            self._transport.close()
            return
        self._transport.write(self._load.next_request())

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, rest = self._data.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(rest) < length:
            return
        self._load.answered(self._sent, head.startswith(b"HTTP/1.1 200"), length)
        self._data = b""
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        self._load.errors += error is not None
        if not self._done.done():
            self._done.set_result(None)


class Load:
    def __init__(self, url: str, seconds: float, warm_up: float):
        frame = template()
        at = frame.index(_KEY.encode())
        host = urlsplit(url).netloc
        head = f"POST /v1/rollouts HTTP/1.1\r\nHost: {host}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(frame)}\r\n\r\n"
        self._before, self._after = head.encode() + frame[: at + 2], frame[at + len(_KEY) :]
        self._count = time.time_ns() // 1_000_000 % 10**6 * 10**4
        self.begin = time.perf_counter() + warm_up
        self.end = self.begin + seconds
        self.latencies: list[float] = []
        self.errors, self.length, self.num_answered = 0, 0, 0

    def next_request(self) -> bytes:
        self._count += 1
        return self._before + b"%010d" % self._count + self._after

    def answered(self, sent: float, ok: bool, length: int) -> None:
        self.errors += not ok
        self.num_answered += 1
        self.length = length
        if self.begin <= (now := time.perf_counter()) <= self.end:
            self.latencies.append(now - sent)


def measure(url: str, concurrent: int, seconds: float) -> dict[str, float]:
    """Requests per second, latencies in ms, and errors; the answers of the first second warm up."""

    async def run() -> Load:
        loop = asyncio.get_running_loop()
        host, port = urlsplit(url).netloc.split(":")
        load = Load(url, seconds, 1.0)
        ends = [loop.create_future() for _ in range(concurrent)]
        for end in ends:
            await loop.create_connection(lambda end=end: Connection(load, end), host, int(port))
        await asyncio.gather(*ends)
        return load

    cpu_s = httpx.get(f"{url}/lag").json()["cpu_s"]
    gc.disable()
    load = uvloop.run(run())
    gc.enable()
    found = sorted(load.latencies)
    lag = httpx.get(f"{url}/lag").json()
    return {
        "req_s": len(found) / seconds,
        "p50_ms": 1000 * found[len(found) // 2],
        "p99_ms": 1000 * found[int(len(found) * 0.99)],
        "errors": load.errors,
        "bytes": load.length,
        "cpu_us": 1e6 * (lag["cpu_s"] - cpu_s) / load.num_answered,
        "lag_p99_ms": 1000 * lag["p99"],
        "lag_max_ms": 1000 * lag["max"],
    }


def wait_ready(url: str) -> None:
    for _ in range(300):
        try:
            if httpx.post(f"{url}/v1/rollouts", content=template(), headers={"Content-Type": CONTENT_TYPE}).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"{url} did not answer within 30 s")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio", help="event loop of all servers")
    given = parser.parse_args()
    print_versions()
    print(f"uvicorn {uvicorn.__version__}, {given.loop} for all servers, {WORKERS} workers, {machine()}", flush=True)
    repeats, seconds = (1, 2.0) if given.quick else (5, 3.0)
    here = Path(__file__)
    with (
        child(here, {"kind": "gateway", "loop": given.loop, "answer": 0}) as gateway,
        multiprocessing.get_context("spawn").Pool(1) as client,
    ):
        wait_ready(gateway)
        answer = client.apply_async(measure, (gateway, 1, 0.5)).get(60)["bytes"]
        same = {"loop": given.loop, "answer": answer}
        with child(here, {"kind": "raw", **same}) as bare, child(here, {"kind": "fastapi", **same}) as fast:
            servers = {"raw uvicorn": bare, "FastAPI": fast, "gateway": gateway}
            for url in servers.values():
                wait_ready(url)
            rows = [
                table(servers, concurrent, repeats, seconds, client) for concurrent in CONCURRENT[:: 2 if given.quick else 1]
            ]  # fmt: skip
    busiest = {name: statistics.median(run["cpu_us"] for run in rows[-1][name]) for name in servers}
    told = ", ".join(f"{name} {1e6 / cpu_us:,.0f}" for name, cpu_us in busiest.items())
    print(
        f"Limit: raw uvicorn. Until a core is full the answers' {1000 * SERVICE_S:.0f} ms bound the requests per second, then "
        f"one Python process on one core does, at (1 s ÷ CPU per request): {told}. Past it: service.direct."
    )
    write_json(given.json, {"rows": rows, "loop": given.loop})


def table(servers: dict[str, str], concurrent: int, repeats: int, seconds: float, client: Any) -> dict[str, Any]:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for repeat in range(repeats):
        for name in list(servers) if repeat % 2 == 0 else list(servers)[::-1]:
            found[name].append(client.apply_async(measure, (servers[name], concurrent, seconds)).get(60))
    print(f"{concurrent:5} concurrent, median of {repeats} (min to max)")
    for name, runs in found.items():
        told = {key: spread([run[key] for run in runs], 0 if key == "req_s" else 1) for key in ("req_s", "p99_ms")}
        ratio = statistics.median(r["req_s"] / b["req_s"] for r, b in zip(runs, found["raw uvicorn"], strict=True))
        lag, cpu = (statistics.median(run[key] for run in runs) for key in ("lag_p99_ms", "cpu_us"))
        print(
            f"  {name:12} {told['req_s']:24} req/s  p99 {told['p99_ms']:24} ms  loop lag p99 {lag:7.1f} ms  "
            f"CPU {cpu:5.0f} µs/request  "
            f"errors {sum(run['errors'] for run in runs):.0f}  ÷ raw {ratio:.2f}", flush=True,
        )  # fmt: skip
    return {"concurrent": concurrent, **found}


def _server() -> None:
    settings = json.loads(sys.argv[2])
    runner = uvloop.run if settings["loop"] == "uvloop" else asyncio.run
    listener = socket.socket(fileno=int(sys.argv[1]))
    listener.setblocking(False)
    runner(serve(settings["kind"], listener, settings["answer"]))


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].isdigit():
        _server()
    else:
        main()
