"""A conversation of up to three turns: the policy answers a sum; as long as it is wrong it is asked again.

The reward is 1 for a right first answer and half as much for each turn more. `ctx.turn()` samples, `ctx.observe()`
appends what the environment says; only what the policy sampled is trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlx.envs.rollout import Rollout

MAX_TURNS = 3


async def solve(ctx: Rollout) -> float:
    question = ctx.task["prompt"][-1]["content"]
    for turn in range(MAX_TURNS):
        reply = await ctx.turn(max_tokens=8)
        if reply.text == ctx.task["answer"]:
            ctx.metric("sums/turns_to_solve", turn + 1)
            return 0.5**turn
        ctx.observe({"role": "user", "content": f"no. {question}"})
    return 0.0
