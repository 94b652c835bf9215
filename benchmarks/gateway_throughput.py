"""Tokens per second through client, HTTP gateway and Ray, against the same vLLM engine called directly, in one run.

The same prompts and sampling, A/B/A/B. Direct means vLLM's `AsyncLLM.generate` in the process that hosts it, one
request per group, nothing sent anywhere. Through the gateway means `RolloutClient.rollouts`, with the ids and
log-probabilities of every token and the rewards of every group. Completions have a forced length, so both do equal
work. Limit: on two cores the gateway, Ray and the client take their time from the engine's cores.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from typing import Any

import httpx
import numpy as np
from service import print_versions, running_service

from rlx.cluster.engines import vllm_engine
from rlx.cluster.serve import serve_main
from rlx.config import Config, load_config, parse_overrides
from rlx.rollout.client import RolloutClient
from rlx.rollout.vllm_engine import VllmEngine
from rlx.rollout.vllm_params import sampling_params
from rlx.wire import GroupRequest, Sampling

GROUPS, GENERATIONS, TOKENS, REPEATS = 32, 8, 64, 5
SAMPLING = Sampling(max_tokens=TOKENS, extra={"min_tokens": TOKENS, "ignore_eos": True})


def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(4, 20, size=16).astype(np.int32) for _ in range(GROUPS)]


class MeasuredEngine(VllmEngine):
    """Answers one more kind of request: the benchmark's work, done by the bare engine in this process."""

    async def openai(self, route: str, body: dict[str, Any]) -> Any:
        if "benchmark" not in body:
            return await super().openai(route, body)
        began = time.perf_counter()
        tokens = await asyncio.gather(*(self._bare(f"bare-{time.time_ns()}-{i}", p) for i, p in enumerate(prompts())))
        return {"tokens": sum(tokens), "seconds": time.perf_counter() - began}

    async def _bare(self, request_id: str, prompt: np.ndarray) -> int:
        params = sampling_params(GENERATIONS, SAMPLING)
        count = 0
        async for output in self._llm.generate({"prompt_token_ids": prompt.tolist()}, params, request_id):
            count = sum(len(o.token_ids) for o in output.outputs)
        return count


def measured_engine(config: Config, index: int) -> VllmEngine:
    engine = vllm_engine(config, index)
    assert isinstance(engine, VllmEngine)
    engine.__class__ = MeasuredEngine
    return engine


def direct(config: Config) -> float:
    body = {"benchmark": True, "prompt": "", "model": config.base_model}
    answer = httpx.post(f"{config.base_url}/v1/completions", json=body, timeout=300).json()
    assert answer["tokens"] == GROUPS * GENERATIONS * TOKENS, answer
    return answer["tokens"] / answer["seconds"]


def gateway(config: Config, client: RolloutClient) -> float:
    requests = [
        GroupRequest(f"{time.time_ns()}-{i}", "p", ids, GENERATIONS, SAMPLING, {"answer": "0"})
        for i, ids in enumerate(prompts())
    ]
    began = time.perf_counter()
    groups = client.rollouts(requests)
    seconds = time.perf_counter() - began
    tokens = sum(e.num_sampled for group in groups for e in group.episodes)
    assert tokens == GROUPS * GENERATIONS * TOKENS
    return tokens / seconds


def main() -> None:
    print_versions()
    options = (
        "--vllm.max_model_len",
        "128",
        "--trl.reward_funcs",
        "[rlx.rewards.length.brevity]",
        "--vllm.max_num_seqs",
        "256",
    )
    with running_service(*options, program=(__file__, "--serve")) as (config, client):
        direct(config), gateway(config, client)
        pairs = [(direct(config), gateway(config, client)) for _ in range(REPEATS)]
    print(
        f"{GROUPS} groups × {GENERATIONS} completions × {TOKENS} tokens, {REPEATS} pairs, tokens per second, median (min to max)"
    )
    for name, values in zip(("engine called directly", "through the gateway"), zip(*pairs, strict=True), strict=True):
        print(f"  {name:24} {statistics.median(values):8.0f}  ({min(values):.0f} to {max(values):.0f})")
    ratios = [through / bare for bare, through in pairs]
    print(f"  gateway ÷ direct         {statistics.median(ratios):8.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        sys.exit(serve_main(load_config(sys.argv[2], parse_overrides(sys.argv[3:])), engine=measured_engine))
    main()
