"""Tokens per second with log-probabilities, 1 to 256 completions at a time, real vLLM: four ways, one engine, one run.

- offline: `AsyncLLM.generate` in the process that hosts the engine, nothing sent anywhere: the limit.
- gateway: `RolloutClient` → HTTP → gateway → Ray actor → engine, with rewards, ids and log-probabilities as arrays.
- vLLM's own server (its FastAPI app, in the process that hosts the engine, as `vllm serve` has it) over
  `/v1/completions` and over `/inference/v1/generate`, with ids and log-probabilities, read with aiohttp into arrays.

The same prompts, 8 completions a request (one at 1), forced length, all ways interleaved. On two cores everything
around the engine takes its time from the engine's cores. B/token: the answers' bodies. µs/token: more than offline.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import aiohttp
import httpx
import numpy as np
from local_parts import arguments, machine, spread, write_json
from service import print_versions, running_service

from rlx.cluster.engines import vllm_engine
from rlx.cluster.serve import serve_main
from rlx.config import Config, load_config, parse_overrides
from rlx.rollout.client import RolloutClient
from rlx.rollout.vllm_engine import VllmEngine
from rlx.rollout.vllm_params import sampling_params
from rlx.wire import GroupRequest, Sampling

TOKENS, PROMPT, MODEL = 64, 16, "benchmark"
CONCURRENT = (1, 8, 32, 64, 128, 256)
SAMPLING = Sampling(max_tokens=TOKENS, extra={"min_tokens": TOKENS, "ignore_eos": True})
_number = itertools.count(time.time_ns())


def prompts(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(4, 20, size=PROMPT).astype(np.int32) for _ in range(count)]


def shape(concurrent: int) -> tuple[int, int, int]:
    """Completions per request, requests at a time, requests in all."""
    n = min(concurrent, 8)
    at_once = concurrent // n
    return n, at_once, max(3 * at_once, 16)


async def closed_loop(one: Callable[[np.ndarray], Awaitable[int]], at_once: int, count: int) -> tuple[int, float]:
    """Tokens and seconds of `count` requests, `at_once` at a time."""
    work, tokens = iter(prompts(count)), []

    async def player() -> None:
        for prompt in work:
            tokens.append(await one(prompt))

    began = time.perf_counter()
    await asyncio.gather(*(player() for _ in range(at_once)))
    return sum(tokens), time.perf_counter() - began


# --- in the process that hosts the engine -----------------------------------------------------------------------------


class MeasuredEngine(VllmEngine):
    """Answers two more kinds of request: the benchmark's work done by the bare engine, and vLLM's own server."""

    async def openai(self, route: str, body: dict[str, Any]) -> Any:
        if "serve" in body:
            return await self._serve(body["serve"])
        if "offline" not in body:
            return await super().openai(route, body)
        n, at_once, count = shape(body["offline"])
        tokens, seconds = await closed_loop(lambda prompt: self._bare(prompt, n), at_once, count)
        return {"tokens": tokens, "seconds": seconds}

    async def _bare(self, prompt: np.ndarray, n: int) -> int:
        count = 0
        request_id = f"bare-{next(_number)}"
        async for output in self._llm.generate(
            {"prompt_token_ids": prompt.tolist()}, sampling_params(n, SAMPLING), request_id
        ):
            count = sum(len(o.token_ids) for o in output.outputs)
        return count

    async def _serve(self, model: str) -> dict[str, Any]:
        """vLLM's own app around this engine, on a port of its own; what is imported here exists in this process only."""
        import uvicorn
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        args = make_arg_parser(FlexibleArgumentParser()).parse_args(
            ["--model", model, "--served-model-name", MODEL, "--enable-scale-out"]
        )
        tasks = await self._llm.get_supported_tasks()
        app = build_app(args, tasks, self._llm.model_config)
        await init_app_state(self._llm, app.state, args, tasks)
        listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
        self._server = asyncio.create_task(uvicorn.Server(config)._serve(sockets=[listener]))
        return {"port": listener.getsockname()[1]}


def measured_engine(config: Config, index: int) -> VllmEngine:
    engine = vllm_engine(config, index)
    assert isinstance(engine, VllmEngine)
    engine.__class__ = MeasuredEngine
    return engine


# --- the ways ---------------------------------------------------------------------------------------------------------


class Ways:
    """Each way: concurrent completions → (tokens per second, bytes per token)."""

    def __init__(self, config: Config, client: RolloutClient):
        self._config, self._client = config, client
        answer = self._ask({"serve": config.base_model})
        self._vllm = f"http://127.0.0.1:{answer['port']}"

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        body = {"prompt": "", "model": self._config.base_model, **body}
        answer = httpx.post(f"{self._config.base_url}/v1/completions", json=body, timeout=300)
        answer.raise_for_status()
        return answer.json()

    def offline(self, concurrent: int) -> tuple[float, float]:
        answer = self._ask({"offline": concurrent})
        return self._rate(concurrent, answer["tokens"], answer["seconds"]), 0.0

    def gateway(self, concurrent: int) -> tuple[float, float]:
        n, at_once, count = shape(concurrent)
        requests = iter(
            GroupRequest(f"{next(_number)}", "p", ids, n, SAMPLING, {"answer": "0"}) for ids in prompts(count)
        )
        began = time.perf_counter()
        groups = list(self._in_turn(requests, at_once))
        seconds = time.perf_counter() - began
        tokens = sum(e.num_sampled for group in groups for e in group.episodes)
        return self._rate(concurrent, tokens, seconds), len(groups[0].encode()) / (n * TOKENS)

    def _in_turn(self, requests: Iterator[GroupRequest], at_once: int) -> Iterator[Any]:
        flying = {self._client.submit(request) for request in itertools.islice(requests, at_once)}
        while flying:
            done, flying = concurrent.futures.wait(flying, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                flying |= {self._client.submit(request) for request in itertools.islice(requests, 1)}
                yield future.result()

    def completions(self, concurrent: int) -> tuple[float, float]:
        n = shape(concurrent)[0]
        body = {
            "model": MODEL, "n": n, "max_tokens": TOKENS, "min_tokens": TOKENS, "ignore_eos": True, "logprobs": 0,
            "return_token_ids": True, "temperature": 1.0,
        }  # fmt: skip
        return self._http(
            concurrent, "/v1/completions", lambda ids: {**body, "prompt": ids},
            lambda choice: (choice["token_ids"], choice["logprobs"]["token_logprobs"]),
        )  # fmt: skip

    def generate(self, concurrent: int) -> tuple[float, float]:
        n = shape(concurrent)[0]
        sampling = {"n": n, "max_tokens": TOKENS, "min_tokens": TOKENS, "ignore_eos": True, "logprobs": 0,
                    "detokenize": False}  # fmt: skip
        return self._http(
            concurrent, "/inference/v1/generate",
            lambda ids: {"model": MODEL, "token_ids": ids, "sampling_params": sampling},
            lambda choice: (choice["token_ids"], [item["logprob"] for item in choice["logprobs"]["content"]]),
        )  # fmt: skip

    def _http(self, concurrent: int, route: str, body: Callable[[list[int]], Any], read: Callable[[Any], Any]) -> Any:
        n, at_once, count = shape(concurrent)
        sizes = []

        async def run() -> tuple[int, float]:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

                async def one(prompt: np.ndarray) -> int:
                    async with session.post(self._vllm + route, json=body(prompt.tolist())) as response:
                        data = await response.read()
                        assert response.status == 200, data[:500]
                    sizes.append(len(data))
                    tokens = 0
                    for choice in json.loads(data)["choices"]:
                        ids, logprobs = read(choice)
                        assert np.asarray(logprobs, np.float32).size == np.asarray(ids, np.int32).size
                        tokens += len(ids)
                    return tokens

                return await closed_loop(one, at_once, count)

        tokens, seconds = asyncio.run(run())
        return self._rate(concurrent, tokens, seconds), statistics.mean(sizes) / (n * TOKENS)

    @staticmethod
    def _rate(concurrent: int, tokens: int, seconds: float) -> float:
        n, _, count = shape(concurrent)
        assert tokens == n * count * TOKENS, tokens
        return tokens / seconds


def main() -> None:
    given = arguments(__doc__).parse_args()
    print_versions()
    repeats = 2 if given.quick else 5
    options = ("--vllm.max_model_len", "128", "--trl.reward_funcs", "[rlx.rewards.length.brevity]",
               "--vllm.max_num_seqs", "256")  # fmt: skip
    with running_service(*options, program=(__file__, "--serve")) as (config, client):
        ways = Ways(config, client)
        named = {
            "offline": ways.offline,
            "gateway": ways.gateway,
            "vLLM /v1/completions": ways.completions,
            "vLLM /inference/v1/generate": ways.generate,
        }
        print(
            f"completions of {TOKENS} tokens with log-probabilities, {repeats} rounds, median (min to max); {machine()}"
        )
        rows = [table(named, c, repeats) for c in ((8, 64, 256) if given.quick else CONCURRENT)]
    print(
        f"Limit: 1.0 of offline. Client, gateway, Ray and rewards take their time from the engine's {os.cpu_count()} cores (two calls "
        "of Ray per group are most of it), and all completions are equally long, so that the engine idles while they travel."
    )
    write_json(given.json, {"rows": rows})


def table(ways: dict[str, Any], concurrent: int, repeats: int) -> dict[str, Any]:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for way in ways.values():
        way(concurrent)
    for repeat in range(repeats):
        for name in list(ways)[:: 1 if repeat % 2 == 0 else -1]:
            found[name].append(ways[name](concurrent))
    print(f"{concurrent:4} concurrent")
    offline = [rate for rate, _ in found["offline"]]
    for name, runs in found.items():
        rates, nbytes = [rate for rate, _ in runs], runs[0][1]
        more = statistics.median(1e6 / rate - 1e6 / bare for rate, bare in zip(rates, offline, strict=True))
        ratio = [rate / bare for rate, bare in zip(rates, offline, strict=True)]
        print(
            f"  {name:28} {spread(rates, 0):26} tok/s   ÷ offline {spread(ratio):22}   {nbytes:6.1f} B/token  "
            f"{more:7.1f} µs/token more", flush=True,
        )  # fmt: skip
    return {"concurrent": concurrent, **{name: [list(run) for run in runs] for name, runs in found.items()}}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        sys.exit(serve_main(load_config(sys.argv[2], parse_overrides(sys.argv[3:])), engine=measured_engine))
    main()
