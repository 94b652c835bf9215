"""`service.direct`: groups go from the learner to the workers' own endpoints, over Ray."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx
import pytest
from fakes import write_config
from serve_parts import TOKEN, Stage, group, service_on_ray

from rlx.errors import GroupCancelled, SessionReplaced
from rlx.processes import free_port
from rlx.rollout.client import RolloutClient

pytestmark = pytest.mark.slow
DIRECT = "service: {probe_interval: 1, publish_timeout: 60, direct: true}"


def config(folder):
    # The second node of the tests is a node of its own for Ray, which loopback does not reach.
    return write_config(folder, DIRECT, port=free_port("127.0.0.1", 18200), data_parallel_size=2, host="0.0.0.0")


def values(result):
    return [
        (e.text, [(row.ids.tolist(), row.logprobs.tolist(), row.versions) for row in e.rows]) for e in result.episodes
    ] + [(r.name, r.values.tolist()) for r in result.rewards]


async def leases_end(stage: Stage) -> None:
    await stage.comes_true(lambda: not any(m.in_flight for m in stage.service.fleet.members))


async def test_groups_do_not_pass_the_gateway_and_are_what_it_would_give(runtime, tmp_path):
    async with service_on_ray(config(tmp_path), runtime) as stage:
        await stage.publish(1)
        requests = [group(f"g{i}", n=4, max_tokens=40, deadline_s=600) for i in range(16)]
        direct = await stage.rollouts(requests)
        assert {r.worker for r in direct} == {"rlx-rollout-0", "rlx-rollout-1"}
        assert stage.gateway.requests["/v1/rollouts"] == 0
        assert stage.gateway.answered["/v1/routes"] < 16 * 150
        await leases_end(stage)
        with RolloutClient(stage.client.base_url, TOKEN) as through:
            same = await asyncio.to_thread(through.rollouts, requests)
        assert stage.gateway.requests["/v1/rollouts"] == 16
        assert [values(r) for r in direct] == [values(r) for r in same]
        async with httpx.AsyncClient() as nobody:
            for url in (f"{stage.worker('rlx-rollout-0').url}/v1/rollouts", f"{stage.client.base_url}/v1/routes"):
                assert (await nobody.post(url, json={})).status_code == 401


async def test_a_killed_worker_loses_no_group_that_went_to_it_directly(runtime, tmp_path):
    async with service_on_ray(config(tmp_path), runtime) as stage:
        running = asyncio.create_task(stage.rollouts([group(f"g{i}", max_tokens=400) for i in range(12)]))
        await stage.comes_true(lambda: all(m.in_flight >= 8 for m in stage.service.fleet.members))
        stage.kill("rlx-rollout-1")
        results = await running
        assert Counter(r.key for r in results) == Counter(f"g{i}" for i in range(12))
        assert {len(e.rows[0].ids) for r in results for e in r.episodes} == {400}
        await stage.comes_true(lambda: stage.state("rlx-rollout-1") == ("ready", 0))
        again = await stage.rollouts([group(f"h{i}", max_tokens=4) for i in range(8)])
        assert {r.worker for r in again} == {"rlx-rollout-0", "rlx-rollout-1"}
        assert stage.gateway.requests["/v1/rollouts"] == 0


async def test_cancelled_replaced_and_refused_groups_end_at_the_worker_too(runtime, tmp_path):
    async with service_on_ray(config(tmp_path), runtime) as stage:
        await asyncio.to_thread(stage.client.begin_session, "a")
        endless = {key: stage.client.submit(group(key, max_tokens=10**6)) for key in ("a/0.0", "a/1.0")}
        await stage.comes_true(lambda: sum(m.in_flight for m in stage.service.fleet.members) == 4)
        stage.client.cancel(["a/0.0"])
        with pytest.raises(GroupCancelled, match=r"a/0\.0"):
            await asyncio.wrap_future(endless["a/0.0"])
        with RolloutClient(stage.client.base_url, TOKEN) as second:
            assert (await asyncio.to_thread(second.begin_session, "b"))["replaced"] == ["a/1.0"]
        with pytest.raises(SessionReplaced):
            await asyncio.wrap_future(endless["a/1.0"])
        await stage.engines_end()
        await leases_end(stage)
