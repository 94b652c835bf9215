"""`GET /metrics`: the series of `rlx.series` in Prometheus's text form.

Values are read from the live service when somebody asks, in its event loop; they are written down beside it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

from rlx.rollout.fleet import State
from rlx.rollout.service import RolloutService
from rlx.series import BY_NAME, Reading


async def exposition(service: RolloutService, accept: str) -> tuple[bytes, str]:
    """Body and content type, in the form that the header `accept` asks for."""
    return await asyncio.to_thread(_encode, list(readings(service)), accept)


def readings(service: RolloutService) -> Iterator[Reading]:
    """Every series that has a value now: the service's own, then those of its learner's newest records."""
    yield from _of_service(service)
    yield from _of_groups(service)
    yield from _of_workers(service)
    yield from service.observations.readings()


def _of_service(service: RolloutService) -> Iterator[Reading]:
    fleet = service.fleet
    states = Counter(member.state for member in fleet.members)
    for state in get_args(State):
        yield _reading("rlx_workers", states[state], state)
    yield _reading("rlx_weight_version", fleet.weight_version)
    yield _reading("rlx_groups_running", service.groups.num_running)
    yield _reading("rlx_groups_waiting", service.router.waiting)
    yield _reading("rlx_queue_age_seconds", service.router.oldest_s)
    yield _reading("rlx_weight_updates_total", fleet.updates)
    if (last := service.weights.last) is not None:
        yield _reading("rlx_weight_update_transfer_seconds", last.transfer_s)
        yield _reading("rlx_weight_update_commit_seconds", last.commit_s)
        yield _reading("rlx_weight_update_pause_seconds", last.pause_s)
        yield _reading("rlx_weight_update_bytes", last.nbytes)
    for kind, count in fleet.events.counts.items():
        yield _reading("rlx_service_events_total", count, kind)


def _of_groups(service: RolloutService) -> Iterator[Reading]:
    for outcome, count in service.groups.outcomes.items():
        yield _reading("rlx_groups_total", count, outcome)
    statistics = service.statistics
    yield _reading("rlx_generation_seconds_total", statistics.generation_s)
    yield _reading("rlx_scoring_seconds_total", statistics.scoring_s)
    for (function, outcome), count in statistics.calls.items():
        yield _reading("rlx_reward_calls_total", count, function, outcome)
    for function, seconds in statistics.call_s.items():
        yield _reading("rlx_reward_seconds_total", seconds, function)
    for function, count in statistics.failed_completions.items():
        yield _reading("rlx_reward_failed_completions_total", count, function)
    for status, count in statistics.episodes.items():
        yield _reading("rlx_episodes_total", count, status)
    yield _reading("rlx_episode_turns_total", statistics.turns)
    yield _reading("rlx_episode_retries_total", statistics.retries)


def _of_workers(service: RolloutService) -> Iterator[Reading]:
    now = time.monotonic()
    for member in service.fleet.members:
        name, load = member.name, member.load
        yield _reading("rlx_worker_up", member.state == "ready", name)
        yield _reading("rlx_worker_weight_version", member.weight_version, name)
        yield _reading("rlx_worker_sequences_in_flight", member.in_flight, name)
        yield _reading("rlx_worker_sequences_waiting", load.waiting, name)
        yield _reading("rlx_worker_sequences_limit", service.router.limit(member).sequences, name)
        yield _reading("rlx_worker_kv_cache_usage_ratio", load.kv_cache_usage, name)
        yield _reading("rlx_worker_token_age_seconds", now - member.token_at, name)
        yield _reading("rlx_worker_generated_tokens_total", load.generated_tokens, name)
        yield _reading("rlx_worker_preemptions_total", load.preemptions, name)
        yield _reading("rlx_worker_busy_seconds_total", load.busy_s, name)
        yield _reading("rlx_worker_restarts_total", member.incarnation, name)


def _reading(name: str, value: float, *labels: str) -> Reading:
    return Reading(BY_NAME[name], labels, float(value))


class _Snapshot:
    """A collector of prometheus-client."""

    def __init__(self, found: Iterable[Reading]):
        self._found = found

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        families: dict[str, Any] = {}
        for reading in self._found:
            series = reading.series
            family = families.get(series.name)
            if family is None:
                make = CounterMetricFamily if series.kind == "counter" else GaugeMetricFamily
                family = families[series.name] = make(series.name, series.help, labels=series.labels)
            family.add_metric(reading.labels, reading.value)
        yield from families.values()


def _encode(found: list[Reading], accept: str) -> tuple[bytes, str]:
    registry = CollectorRegistry()
    registry.register(_Snapshot(found))  # type: ignore[arg-type]  # of which `collect` is all that it calls
    encoder, content_type = choose_encoder(accept)
    return encoder(registry), content_type
