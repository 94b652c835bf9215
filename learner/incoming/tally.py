"""What a step's batch took: counted by the feed while it comes together, and the StepTimes of it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

from rlx.learner.incoming.courier import Served
from rlx.learner.watch.bottleneck import StepTimes
from rlx.wire import GroupResult


@dataclass(frozen=True)
class Arrived:
    """A group that is here. `oldest` is the optimizer step of the policy that sampled its oldest token; `sent_at` and
    `arrived_at` are on time.monotonic()."""

    group: GroupResult
    oldest: int
    sent_at: float
    arrived_at: float


@dataclass
class Tally:
    """What happened since the last batch. `..._s`: seconds that the main thread waited; `put_back` and `filtered`: groups
    that are sampled again, and that were left out for want of a spread; `served`: the last weights that were published."""

    rollout_wait_s: float = 0.0
    weight_sync_wait_s: float = 0.0
    eval_s: float = 0.0
    generated_tokens: int = 0
    discarded_tokens: int = 0
    put_back: int = 0
    filtered: int = 0
    served: Served | None = None


def num_tokens(group: GroupResult) -> int:
    return sum(episode.num_sampled for episode in group.episodes)


def times_of(tally: Tally, groups: list[Arrived], step: int, always: StepTimes) -> StepTimes:
    """Of `step` with `groups`, none where it goes on with those of the step before; `always` holds what is the same in
    every step."""
    now, count = time.monotonic(), len(groups) or math.nan
    ages = [step - arrived.oldest for arrived in groups]
    times = replace(
        always,
        rollout_wait_s=tally.rollout_wait_s,
        weight_sync_wait_s=tally.weight_sync_wait_s,
        eval_s=tally.eval_s,
        generation_s=sum(arrived.group.generation_s for arrived in groups) / count,
        reward_s=sum(arrived.group.reward_s for arrived in groups) / count,
        in_flight_s=sum(arrived.arrived_at - arrived.sent_at for arrived in groups) / count,
        queue_s=sum(now - arrived.arrived_at for arrived in groups) / count,
        staleness_mean=sum(ages) / count,
        staleness_max=float(max(ages, default=0)),
        generated_tokens=float(tally.generated_tokens),
        discarded_tokens=float(tally.discarded_tokens),
    )
    if tally.served is None:
        return times
    published = tally.served.times
    return replace(
        times,
        weight_sync_s=published.total_s,
        weight_sync_snapshot_s=published.snapshot_s,
        weight_sync_transfer_s=published.transfer_s,
        weight_sync_pause_s=published.pause_s,
        worker_busy=tally.served.worker_busy,
    )
