"""The spans of one group: on its way, queued, generated, its episodes' turns, scored, ready. Pure: no clock, no I/O.

The service measures its parts with its own clock; `ClockOffset` estimates how far that is ahead of the learner's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rlx.learner.watch.records import Record
from rlx.wire import GroupResult, GroupTimes

LEARNER = "learner rank 0"
_FORGET = 1.01
"""The shortest way known counts as so much longer with each exchange, so that clocks that drift apart are followed."""


def span(step: int, name: str, process: str, track: str, start: float, end: float, args: Mapping[str, Any]) -> Record:
    """A line of spans.jsonl; unix seconds, to the microsecond."""
    return {"step": step, "name": name, "process": process, "track": track, "start": round(start, 6),
            "end": round(max(start, end), 6), "args": dict(args)}  # fmt: skip


class ClockOffset:
    """How many `seconds` the service's clock is ahead of ours, as NTP estimates it: of the exchange that was the
    shortest time on its way. That may be wrong by `uncertainty_s`; what is within it counts as no offset."""

    def __init__(self) -> None:
        self._way, self._ahead = math.inf, 0.0

    def learn(self, sent: float, times: GroupTimes | None, arrived: float) -> None:
        """`sent` and `arrived` by our clock. A result that was there before it was asked for teaches nothing."""
        if times is None:
            return
        way = (arrived - sent) - (times.scored - times.received)
        self._way *= _FORGET
        if 0 <= way < self._way:
            self._way = way
            self._ahead = ((times.received - sent) + (times.scored - arrived)) / 2

    @property
    def uncertainty_s(self) -> float:
        return self._way / 2

    @property
    def seconds(self) -> float:
        return self._ahead if abs(self._ahead) > self.uncertainty_s else 0.0


def group_spans(
    step: int, group: GroupResult, sent: float, arrived: float, taken: float, offset: ClockOffset
) -> Iterator[Record]:
    """By our clock. `sent`, `arrived` and `taken`, by `step`, are the learner's."""
    tokens = sum(episode.num_sampled for episode in group.episodes)
    versions = sorted({version for episode in group.episodes for version in episode.weight_versions})
    key = {"group": group.key}
    yield span(step, "group in flight", LEARNER, "groups in flight", sent, arrived, key)
    yield span(step, "group ready", LEARNER, "groups ready", arrived, taken, key)
    if (times := group.times) is None:
        return
    ahead = offset.seconds
    service = key | ({"clock_offset_s": round(ahead, 6)} if ahead else {})
    received, placed, generated = (at - ahead for at in (times.received, times.placed, times.generated))
    sampled = service | {"tokens": tokens, "episodes": len(group.episodes), "versions": versions}
    yield span(step, "queued", "gateway", "queue", received, placed, service)
    yield span(step, "generate", group.worker, "groups", placed, generated, sampled)
    for index, episode in enumerate(group.episodes):
        if episode.turn_times:
            turns = [[round(start - ahead, 6), round(end - ahead, 6)] for start, end in episode.turn_times]
            process = episode.process or group.worker
            args: Record = service | {"index": index, "status": episode.status, "turns": turns}
            yield span(step, "episode", process, "episodes", turns[0][0], turns[-1][1], args)
    for reward in group.rewards:
        if reward.began_at:
            began = reward.began_at - ahead
            outcome = service | {"outcome": reward.outcome}
            yield span(step, reward.name, reward.process, "groups", began, began + reward.seconds, outcome)
