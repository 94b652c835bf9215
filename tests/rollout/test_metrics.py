"""GET /metrics and POST /v1/observations of a running service, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from service_parts import TOKEN, LocalWorker, eventually, group, make_service, on_http, started, weights

from rlx.config.sections import ServiceSection
from rlx.rollout.service import RolloutService
from rlx.rollout.worker import EngineLoad, WorkerStatus
from rlx.series import CATALOGUE, MAX_FUNCTIONS, learner_readings

BEARER = {"authorization": f"Bearer {TOKEN}"}
RECORD = {series.key.format(function="f.a", outcome="ok"): 1.5 for series in CATALOGUE if series.key}
EVALUATION = {"step": 3, "reward": 0.75}
CALM = ServiceSection(group_timeout=60, publish_timeout=60, probe_interval=3600, probe_timeout=60, drain_timeout=1)
PATIENCE_S = 60.0


@asynccontextmanager
async def running(*workers: LocalWorker, **options: Any) -> AsyncIterator[tuple[RolloutService, httpx.AsyncClient]]:
    service = make_service(list(workers) or [LocalWorker()], settings=CALM)
    async with (
        started(service),
        on_http(service, **options) as url,
        httpx.AsyncClient(base_url=url, headers=BEARER, timeout=60) as client,
    ):
        yield service, client


async def scrape(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    """{(name, label values in the order of the names …): value}"""
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    return {
        (sample.name, *(sample.labels[label] for label in sample.labels)): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


async def tell(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await client.post("/v1/observations", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_every_series_of_the_catalogue_is_there_once_it_has_a_value():
    async with running() as (service, client):
        before = {name for name, *_ in await scrape(client)}
        assert not any(name.startswith("rlx_learner_") or "weight_update_" in name for name in before)
        data = b"\0" * 8
        await service.weights.announce(weights(1, data))

        async def bytes_of() -> AsyncIterator[bytes]:
            yield data

        await service.weights.receive(1, bytes_of())
        await service.weights.commit(1)
        await service.rollout(group(deadline_s=PATIENCE_S))
        await tell(client, metrics=[RECORD], evaluations=[EVALUATION])
        assert {name for name, *_ in await scrape(client)} == {series.name for series in CATALOGUE}


async def test_what_is_measured_moves_with_the_service():
    worker = LocalWorker()
    async with running(worker) as (service, client):
        before = await scrape(client)
        worker.open.clear()
        ends = [asyncio.create_task(service.rollout(group(f"g-{i}", n=4, deadline_s=PATIENCE_S))) for i in range(2)]
        await eventually(lambda: len(worker.generated) == 2, PATIENCE_S)
        during = await scrape(client)
        worker.open.set()
        await asyncio.gather(*ends)
        after = await scrape(client)
    in_flight = ("rlx_worker_sequences_in_flight", "worker-0")
    assert [found[in_flight] for found in (before, during, after)] == [0, 8, 0]
    assert [found["rlx_groups_running",] for found in (before, during, after)] == [0, 2, 0]
    assert [found["rlx_groups_total", "ok"] for found in (before, during, after)] == [0, 0, 2]
    assert [found["rlx_episodes_total", "ok"] for found in (before, during, after)] == [0, 0, 8]
    assert after["rlx_reward_calls_total", "rewards.position", "ok"] == 2
    assert after["rlx_reward_seconds_total", "rewards.position"] == pytest.approx(0.002)
    assert after["rlx_generation_seconds_total",] > 0


class FullWorker(LocalWorker):
    """Its limit does not grow: something waits in its engine."""

    async def status(self) -> WorkerStatus:
        return replace(await super().status(), load=EngineLoad(waiting=1))


async def test_groups_that_wait_for_a_worker_show_in_the_queue_and_cancelled_ones_in_the_outcomes():
    worker = FullWorker()
    async with running(worker) as (service, client):
        worker.open.clear()
        service.router.limit(service.fleet.members[0]).sequences = 2
        ends = [asyncio.create_task(service.rollout(group(f"g-{i}", deadline_s=PATIENCE_S))) for i in range(3)]
        await eventually(lambda: service.router.waiting == 2, PATIENCE_S)
        waiting = await scrape(client)
        service.cancel([f"g-{i}" for i in range(3)])
        await asyncio.gather(*ends, return_exceptions=True)
        after = await scrape(client)
    assert waiting["rlx_groups_waiting",] == 2
    assert 0 < waiting["rlx_queue_age_seconds",] < 60
    assert (after["rlx_groups_waiting",], after["rlx_queue_age_seconds",]) == (0, 0)
    assert after["rlx_groups_total", "cancelled"] == 3


class CountingWorker(LocalWorker):
    """Has generated as many tokens as it was asked for groups."""

    async def status(self) -> WorkerStatus:
        return replace(await super().status(), load=EngineLoad(generated_tokens=len(self.generated)))


async def test_the_load_of_a_worker_is_known_soon_after_a_group_that_was_over_at_once():
    worker = CountingWorker()
    async with running(worker) as (service, client):
        await service.rollout(group(deadline_s=PATIENCE_S))
        await eventually(lambda: service.fleet.members[0].load.generated_tokens == 1, PATIENCE_S)
        found = await scrape(client)
    assert found["rlx_worker_generated_tokens_total", "worker-0"] == 1


async def test_a_worker_that_dies_and_returns_is_counted_and_told_to_the_learner():
    async with running() as (service, client):
        first = await tell(client, after=0)
        service.fleet.mark_down(service.fleet.members[0], "killed")
        await eventually(lambda: service.fleet.events.counts["worker_started"] == 1, PATIENCE_S)
        told = await tell(client, after=first["next"])
        found = await scrape(client)
    assert [event["kind"] for event in told["events"]] == ["worker_down", "worker_restarted", "worker_started"]
    assert [event["n"] for event in told["events"]] == list(range(first["next"] + 1, told["next"] + 1))
    assert told["events"][0]["text"] == "worker-0: down: killed"
    assert {event["source"] for event in told["events"]} == {"service"}
    assert found["rlx_worker_restarts_total", "worker-0"] == 1
    assert found["rlx_service_events_total", "worker_started"] == 1


async def test_a_learner_that_counts_on_from_another_service_gets_all_events_of_this_one():
    async with running() as (service, client):
        service.fleet.tell("worker_down", "worker-0", "down: for the test")
        told = await tell(client, after=900)
    assert [event["text"] for event in told["events"]] == ["worker-0: down: for the test"]
    assert told["next"] == 1


async def test_only_the_newest_thousand_events_are_kept():
    async with running() as (service, client):
        for index in range(1005):
            service.fleet.tell("worker_down", "worker-0", str(index))
        assert [event["n"] for event in (await tell(client))["events"]] == list(range(6, 1006))
        assert [event["n"] for event in (await tell(client, after=1003))["events"]] == [1004, 1005]


async def test_the_newest_record_stands_and_another_run_forgets_it():
    async with running() as (_, client):
        await tell(
            client,
            run={"output_dir": "a"},
            metrics=[{"step": 1, "reward": 0.25}, {"step": 2, "reward": 0.5, "kl": None}],
        )
        first = await scrape(client)
        await tell(client, run={"output_dir": "a"}, metrics=[])
        same = await scrape(client)
        await tell(client, run={"output_dir": "b"})
        other = await scrape(client)
    assert (first["rlx_learner_step",], first["rlx_learner_reward",]) == (2, 0.5)
    assert ("rlx_learner_kl_nats",) not in first
    assert same["rlx_learner_reward",] == 0.5
    assert not any(name.startswith("rlx_learner_") for name, *_ in other)


async def test_observations_need_the_token_and_the_shape_and_have_a_limit():
    async with running() as (_, client):
        without = await client.post("/v1/observations", json={}, headers={"authorization": "Bearer no"})
        wrong = [
            await client.post("/v1/observations", json=body)
            for body in ({"metrics": {}}, {"samples": [1]}, {"run": 1}, {"after": -1}, {"after": "1"})
        ]
        big = await client.post("/v1/observations", json={"samples": [{"completion": "x" * 8 * 2**20}]})
        other = await client.post("/v1/observations", json={}, headers={"rlx-session": "nobody"})
    assert without.status_code == 401
    assert [answer.status_code for answer in wrong] == [400] * 5
    assert big.status_code == 413
    assert other.status_code == 503


@pytest.mark.parametrize(("open_address", "status"), [(False, 200), (True, 401)])
async def test_metrics_need_the_token_where_the_data_plane_does(open_address, status):
    async with running(require_token_for_data=open_address) as (_, client):
        answer = await client.get("/metrics", headers={"authorization": ""})
        allowed = await client.get("/metrics")
    assert answer.status_code == status
    assert allowed.status_code == 200


async def test_openmetrics_is_served_to_those_who_ask_for_it():
    async with running() as (_, client):
        answer = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_labels_stay_bounded_and_odd_values_are_left_out():
    record = {f"rewards/f{i}/mean": 1.0 for i in range(100)} | {
        "episodes/turns": 3.0,
        "episodes/ok": 1.0,
        "loss": "nan",
    }
    found = list(learner_readings(record | {"kl": float("nan")}))
    assert sum(reading.series.name == "rlx_learner_function_reward" for reading in found) == MAX_FUNCTIONS
    assert [reading.labels for reading in found if reading.series.name == "rlx_learner_episodes_ratio"] == [("ok",)]
    assert len(found) == MAX_FUNCTIONS + 1


async def test_a_worker_costs_eleven_series():
    counts = []
    for number in (1, 3):
        async with running(*[LocalWorker(f"worker-{i}") for i in range(number)]) as (_, client):
            counts.append(len(await scrape(client)))
    assert (counts[1] - counts[0]) / 2 == sum("worker" in series.labels for series in CATALOGUE) == 11


async def test_the_page_shows_the_learners_records_and_the_workers():
    async with running() as (service, client):
        await tell(client, run={"name": "a", "output_dir": "a"}, metrics=[{"step": 1, "reward": 0.25}])
        service.fleet.tell("worker_down", "worker-0", "down: for the test")
        told = await tell(client)
        await tell(client, events=[*told["events"], {"source": "learner", "kind": "resumed", "text": "resumed"}])
        state = (await client.get("/view/state")).json()
        page = await client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert [event["text"] for event in state["events"]["records"]] == [
        "worker-0: down: for the test",
        "resumed",
    ]
    assert state["run"]["step"] == 1
    assert [worker["name"] for worker in state["workers"]] == ["worker-0"]


@pytest.mark.parametrize("path", ["/view/state", "/metrics"])
async def test_a_web_page_that_leads_its_own_name_to_this_machine_reads_nothing(path):
    async with running() as (_, client):
        answer = await client.get(path, headers={"host": "evil.example"})
    assert answer.status_code == 401


async def test_the_pages_data_needs_the_token_where_the_data_plane_does_and_the_page_asks_for_it():
    async with running(require_token_for_data=True) as (_, client):
        page = await client.get("/", headers={"authorization": ""})
        data = await client.get("/view/state", headers={"authorization": ""})
        allowed = await client.get("/view/state", headers={"host": "gpu-node"})
    assert [page.status_code, data.status_code, allowed.status_code] == [200, 401, 200]
