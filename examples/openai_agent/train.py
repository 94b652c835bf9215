"""What rlx needs beside the agent: the rollout function that runs it, one episode a call."""

from __future__ import annotations

import asyncio

from agent import solve


async def rollout(ctx) -> float:
    """Run the agent on one question; 1.0 where its answer is right."""
    question = ctx.task["prompt"][-1]["content"]
    answer = await asyncio.to_thread(solve, ctx.openai.base_url, ctx.openai.api_key, question)
    return float(answer == ctx.task["answer"])
