"""Worker processes that die, and workers that join and leave, with the whole service over Ray."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import ray
from fakes import PATIENCE_S, patiently, write_config
from ray.cluster_utils import Cluster
from serve_parts import TOKEN, Stage, chunks, group, service_on_ray, update

from rlx.cluster import workers
from rlx.cluster.workers import add_main, list_main, remove_main
from rlx.errors import ServiceError, ServiceUnavailable, SessionReplaced
from rlx.processes import free_port, start_of
from rlx.rollout.client import RolloutClient

pytestmark = pytest.mark.slow
QUICK = "service: {probe_interval: 1, publish_timeout: 60, drain_timeout: 20}"


def config(folder, text=QUICK, **vllm):
    return write_config(folder, text, port=free_port("127.0.0.1", 18100), data_parallel_size=2, **vllm)


def until_told(stage: Stage) -> Callable[[], float]:
    """A clock on which no time goes by until it was asked three times while a new worker says what is missing."""
    told: list[bool] = []

    def clock() -> float:
        told.extend("are free" in member.doing for member in stage.service.fleet.members[2:] if member.doing)
        return 0.0 if told.count(True) < 3 else 10**9

    return clock


async def test_a_worker_killed_mid_generation_loses_no_group_and_comes_back_verified(runtime, tmp_path):
    async with service_on_ray(config(tmp_path), runtime) as stage:
        await stage.publish(1)
        running = asyncio.create_task(stage.rollouts([group(f"g{i}", max_tokens=400) for i in range(12)]))
        await stage.comes_true(lambda: all(m.in_flight >= 4 for m in stage.service.fleet.members))
        stage.kill("rlx-rollout-1")
        results = await running
        assert Counter(result.key for result in results) == Counter(f"g{i}" for i in range(12))
        assert {result.worker for result in results} == {"rlx-rollout-0"}
        assert {row.versions for result in results for e in result.episodes for row in e.rows} == {((1, 400),)}
        await stage.publish(2)
        await stage.comes_true(lambda: stage.state("rlx-rollout-1") == ("ready", 2))
        assert any("rlx-rollout-1: down: rollout worker rlx-rollout-1 died" in line for line in stage.events)
        assert any(
            line.startswith("rlx-rollout-1: ready with weights") and "log p is off by 0 nats" in line
            for line in stage.events
        ), stage.events
        results = await stage.rollouts([group(f"h{i}", max_tokens=8) for i in range(8)])
        assert {result.worker for result in results} == {"rlx-rollout-0", "rlx-rollout-1"}
        assert {row.versions for result in results for e in result.episodes for row in e.rows} == {((2, 8),)}


async def test_a_worker_killed_between_announce_and_commit_is_behind_and_catches_up(runtime, tmp_path):
    async with service_on_ray(config(tmp_path), runtime) as stage:
        manifest, data = await update(1)
        await stage.service.weights.announce(manifest)
        await stage.service.weights.receive(1, chunks(data))
        stage.kill("rlx-rollout-0")
        times = await stage.service.weights.commit(1)
        assert [worker["name"] for worker in times.behind] == ["rlx-rollout-0"]
        assert stage.state("rlx-rollout-1") == ("ready", 1)
        [result] = await stage.rollouts([group("a")])
        assert result.worker == "rlx-rollout-1" or stage.state("rlx-rollout-0") == ("ready", 1)
        assert {row.versions for e in result.episodes for row in e.rows} == {((1, 50),)}
        await stage.comes_true(lambda: stage.state("rlx-rollout-0") == ("ready", 1))


async def test_workers_join_and_leave_a_service_that_generates(
    cluster: Cluster, runtime, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("RLX_TOKEN", TOKEN)
    async with service_on_ray(config(tmp_path), runtime) as stage:
        await stage.publish(1)
        with monkeypatch.context() as patch:
            patch.setattr(workers, "time", SimpleNamespace(monotonic=until_told(stage), sleep=time.sleep))
            with pytest.raises(ServiceUnavailable, match=r"rlx-rollout-2 .*1 CPU on one node .* 0 of 2 are free"):
                await asyncio.to_thread(add_main, stage.config, 1, timeout_s=6.0)
        await stage.comes_true(lambda: len(stage.service.fleet.members) == 2)
        node = patiently(lambda: cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20))
        try:
            running = asyncio.create_task(stage.rollouts([group(f"g{i}", max_tokens=250) for i in range(8)]))
            assert await asyncio.to_thread(add_main, stage.config, 1, timeout_s=PATIENCE_S) == 0
            assert stage.state("rlx-rollout-3") == ("ready", 1)
            assert stage.worker("rlx-rollout-3").node_id == node.node_id
            late = asyncio.create_task(stage.rollouts([group(f"h{i}") for i in range(6)]))
            await stage.comes_true(lambda: stage.service.fleet.members[2].in_flight > 0 or late.done())
            assert await asyncio.to_thread(list_main, stage.config) == 0
            assert await asyncio.to_thread(remove_main, stage.config, "rlx-rollout-3") == 0
            results = [*await running, *await late]
            assert Counter(r.key for r in results) == Counter(
                [*(f"g{i}" for i in range(8)), *(f"h{i}" for i in range(6))]
            )
            assert {r.worker for r in results} == {"rlx-rollout-0", "rlx-rollout-1", "rlx-rollout-3"}
            assert [m.name for m in stage.service.fleet.members] == ["rlx-rollout-0", "rlx-rollout-1"]
            await stage.comes_true(lambda: ray.available_resources().get("CPU") == 1)
            with pytest.raises(ServiceError, match="no worker 'rlx-rollout-3'; it has rlx-rollout-0, rlx-rollout-1"):
                await asyncio.to_thread(remove_main, stage.config, "rlx-rollout-3")
            await asyncio.to_thread(remove_main, stage.config, "rlx-rollout-1")
            with pytest.raises(ServiceError, match="rlx-rollout-0 is the only worker"):
                await asyncio.to_thread(remove_main, stage.config, "rlx-rollout-0")
        finally:
            cluster.remove_node(node)
    output = capsys.readouterr().out
    assert "rlx-rollout-3: ready" in output
    assert "rlx-rollout-3: removed" in output
    assert "weights 1" in output
    assert re.search(r"rlx-rollout-3 +ready +[\d.]+ +\d+ +1 +\d+ +0% +0", output)


async def test_a_service_grows_and_shrinks_with_its_cluster(cluster: Cluster, runtime, tmp_path):
    missing = "waiting for 1 CPU on one node of the Ray cluster, where 0 of 2 are free"
    async with service_on_ray(config(tmp_path, QUICK[:-1] + ", max_workers: 3}"), runtime) as stage:
        await stage.publish(1)
        third = stage.service.fleet.members[2]
        await stage.comes_true(lambda: third.doing == missing)
        assert (third.state, stage.service.health()[1]["status"]) == ("loading", "ok")
        node = patiently(lambda: cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20))
        try:
            await stage.comes_true(lambda: stage.state(third.name) == ("ready", 1), 2 * PATIENCE_S)
            assert stage.worker(third.name).node_id == node.node_id
            running = asyncio.create_task(stage.rollouts([group(f"g{i}") for i in range(6)]))
            await stage.comes_true(lambda: third.in_flight > 0 or running.done())
            cluster.remove_node(node)
            assert Counter(result.key for result in await running) == Counter(f"g{i}" for i in range(6))
            await stage.comes_true(lambda: (third.state, third.doing) == ("restarting", missing), 2 * PATIENCE_S)
            assert stage.service.health()[1]["status"] == "degraded"
            await stage.publish(2)
            node = patiently(lambda: cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20))
            await stage.comes_true(lambda: stage.state(third.name) == ("ready", 2), 2 * PATIENCE_S)
        finally:
            cluster.remove_node(node)


async def test_a_new_learner_takes_the_service_over_from_a_killed_one(runtime, tmp_path):
    async with service_on_ray(config(tmp_path), runtime) as stage:
        await asyncio.to_thread(stage.client.begin_session, "first")
        left_behind = [stage.client.submit(group(f"first/{i}.0", max_tokens=10**6)) for i in range(4)]
        await stage.comes_true(lambda: sum(m.in_flight for m in stage.service.fleet.members) == 8)
        await stage.service.weights.announce((await update(1))[0])
        with RolloutClient(stage.client.base_url, TOKEN) as second:
            answer = await asyncio.to_thread(second.begin_session, "second")
            assert sorted(answer["replaced"]) == [f"first/{i}.0" for i in range(4)]
            for future in left_behind:
                with pytest.raises(SessionReplaced):
                    await asyncio.wrap_future(future)
            await stage.engines_end()
            await asyncio.to_thread(second.publish, *await update(1))
            [result] = await asyncio.to_thread(second.rollouts, [group("second/0.0", max_tokens=4)])
            assert result.episodes[0].rows[0].versions == ((1, 4),)
            with pytest.raises(SessionReplaced):
                await stage.rollouts([group("first/9.0")])


async def test_a_service_that_stops_while_a_worker_restarts_gives_everything_back(runtime, tmp_path):
    async with service_on_ray(config(tmp_path), runtime) as stage:
        stage.kill("rlx-rollout-1")
        await stage.comes_true(lambda: stage.state("rlx-rollout-1")[0] == "restarting")
        pids = [m.pid for m in stage.service.fleet.members]
    await stage.comes_true(lambda: ray.available_resources().get("CPU") == 2)
    await stage.comes_true(lambda: all(start_of(pid) is None for pid in pids))
