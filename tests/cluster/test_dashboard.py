"""The shipped dashboards, the configuration that `rlx dashboard` writes, and Ray's metrics, without Ray."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import shutil
import stat
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import yaml
from fakes import write_config

from rlx.cluster import dashboard, panels, ray_metrics, ray_routes, ray_runtime, reservation
from rlx.cluster.dashboard import dashboard_main, write_monitoring
from rlx.cluster.panels import DASHBOARDS
from rlx.cluster.ray_metrics import RayMetrics
from rlx.cluster.ray_runtime import RayRuntime
from rlx.cluster.reservation import Reservation
from rlx.config import Config
from rlx.errors import ConfigError, ServiceError, ServiceUnavailable
from rlx.processes import free_port
from rlx.series import BY_NAME, CATALOGUE, Reading

QUERIES = [query for board in DASHBOARDS for panel in board.panels for query in panel.queries]


def test_the_shipped_dashboards_are_those_of_the_catalogue():
    shipped = {path.name: path.read_text() for path in panels.FOLDER.glob("*.json")}
    assert shipped == dict(panels.files()), "run `python -m rlx.cluster.panels`"


def test_the_page_of_the_series_is_that_of_the_catalogue():
    page = Path(__file__).parents[2] / "docs" / "series.md"
    assert page.read_text() == panels.series_page(), "run `python -m rlx.cluster.panels`"


def test_every_query_names_series_that_exist_and_every_series_is_drawn():
    for query in QUERIES:
        assert set(re.findall(r"rlx_\w+", query.expression)) == set(query.series) <= BY_NAME.keys(), query
        assert query.expression.count('job="$job"') == len(re.findall(r"rlx_\w+", query.expression))
    assert {name for query in QUERIES for name in query.series} == BY_NAME.keys()


def test_names_say_unit_and_kind_as_prometheus_has_it():
    assert len(BY_NAME) == len(CATALOGUE)
    for series in CATALOGUE:
        assert re.fullmatch(r"rlx(_[a-z0-9]+)+", series.name)
        assert set(series.labels) <= {"worker", "state", "outcome", "kind", "function"}


def test_panels_of_a_dashboard_do_not_overlap():
    for board in DASHBOARDS:
        places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board.to_json()["panels"]]
        assert len(set(places)) == len(places)


def monitoring(config: Config, folder: Path, **options: Any) -> dict[str, Any]:
    write_monitoring(config, folder, "http://127.0.0.1:9090", options.get("session", ""), 5)
    return yaml.safe_load((folder / "prometheus.yml").read_text())


def test_the_configuration_names_the_runs_gateway_and_ray_through_it(tmp_path):
    config = write_config(tmp_path, port=8123)
    scrape, ray = monitoring(config, tmp_path / "m", session="/tmp/ray/session")["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": ["127.0.0.1:8123"]}]
    assert ray["http_sd_configs"][0]["url"] == "http://127.0.0.1:8123/v1/ray/targets"
    assert "authorization" not in scrape
    provisioning = tmp_path / "m" / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "rlx.yml").read_text())["datasources"]
    assert source["url"] == "http://127.0.0.1:9090"
    ours, rays = yaml.safe_load((provisioning / "dashboards" / "rlx.yml").read_text())["providers"]
    boards = [json.loads(path.read_text())["uid"] for path in Path(ours["options"]["path"]).iterdir()]
    assert sorted(boards) == ["rlx-learner", "rlx-rewards", "rlx-service"]
    assert rays["options"]["path"] == "/tmp/ray/session/metrics/grafana/dashboards"


def test_on_an_open_address_prometheus_reads_the_token_from_a_file_of_the_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("RLX_TOKEN", "secret")
    config = write_config(tmp_path, port=8123, host="0.0.0.0")
    settings = monitoring(config, tmp_path / "m")
    scrape, ray = settings["scrape_configs"]
    token = Path(scrape["authorization"]["credentials_file"])
    assert token == Path(ray["http_sd_configs"][0]["authorization"]["credentials_file"])
    assert (token.read_text(), stat.S_IMODE(token.stat().st_mode)) == ("secret", 0o600)
    assert "secret" not in yaml.safe_dump(settings)


def test_without_a_service_the_command_says_how_to_start_one(tmp_path):
    config = write_config(tmp_path, port=free_port("127.0.0.1", 18000))
    with pytest.raises(ServiceUnavailable, match=r"no service answers at .* `rlx vllm-serve"):
        dashboard_main(config)
    assert not (tmp_path / "out").exists()


def test_without_a_prometheus_the_command_says_how_to_install_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(dashboard, "_ask", lambda config: {"dashboard": "http://127.0.0.1:8265", "session": ""})
    assert dashboard_main(write_config(tmp_path, port=8123)) == 0
    text = capsys.readouterr().out
    assert "http://127.0.0.1:8123/metrics" in text
    assert "http://127.0.0.1:8265" in text
    assert "apt-get install prometheus" in text
    assert (tmp_path / "out" / "monitoring" / "prometheus.yml").exists()


@pytest.mark.parametrize(("session", "words"), [("/tmp/ray/session", "off (cluster.dashboard)"), ("", "not up yet")])
def test_a_dashboard_that_is_not_there_is_off_or_not_up_yet(session, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dashboard, "_ask", lambda config: {"dashboard": "", "session": session})
    assert dashboard_main(write_config(tmp_path, port=8123), start=False) == 0
    assert words in capsys.readouterr().out


def test_a_prometheus_that_does_not_start_is_an_error_with_its_last_line(tmp_path, monkeypatch):
    binary = tmp_path / "prometheus"
    binary.write_text("#!/bin/sh\necho 'err=\"lock DB directory\"' >&2\nexit 2\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(dashboard, "_ask", lambda config: {"dashboard": "", "session": ""})
    with pytest.raises(ConfigError, match=r"did not start: .*lock DB directory"):
        dashboard_main(write_config(tmp_path, port=8123))


@pytest.mark.parametrize("host", ["0.0.0.0", "10.1.2.3", "node-1"])
def test_rays_dashboard_is_not_served_to_other_machines_without_its_token(host, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    config = write_config(tmp_path, f"cluster: {{dashboard_host: {host}}}")
    with pytest.raises(ConfigError, match=f"cluster.dashboard_host: {host} can be reached from other machines"):
        RayRuntime(config).start()


@pytest.mark.parametrize("answer", [httpx.Response(200, json={"authentication_mode": "disabled"}), httpx.Response(404)])
def test_a_ray_that_knows_no_token_is_not_left_open_to_other_machines(answer, tmp_path, monkeypatch):
    runtime = RayRuntime(write_config(tmp_path, "cluster: {dashboard_host: 0.0.0.0}"))
    stopped: list[bool] = []
    monkeypatch.setattr(httpx, "get", lambda url, timeout: answer)
    monkeypatch.setattr(runtime, "stop", lambda: stopped.append(True))
    with pytest.raises(ServiceError, match=r"does not ask for a token.*write 127\.0\.0\.1"):
        runtime._require_token()
    assert stopped == [True]


@pytest.mark.parametrize(
    ("errors", "message", "attempts"),
    [
        ([Exception("The node timed out during startup.")], None, 2),
        ([RuntimeError("Failed to start GCS.")], None, 2),
        ([TimeoutError("Timed out while waiting for node to startup.")], None, 2),
        ([Exception("The node timed out during startup.")] * 2, "timed out during startup", 2),
        ([ValueError("no such address")], "no such address", 1),
    ],
)
def test_a_ray_whose_processes_are_late_is_started_once_more(errors, message, attempts, tmp_path, monkeypatch):
    runtime, left, events = RayRuntime(write_config(tmp_path)), list(errors), []

    def init(**options):
        events.append("init")
        if left:
            raise left.pop(0)
        return "context"

    monkeypatch.setattr(ray_runtime.ray, "init", init)
    monkeypatch.setattr(runtime, "_shutdown", lambda: events.append("shutdown"))
    with pytest.raises(ServiceError, match=message) if message else nullcontext():
        assert runtime._init(address="local") == "context"
    assert events == (["init", "shutdown"] * attempts)[: 2 * attempts if message else -1]


def test_services_that_start_and_stop_beside_each_other_do_not_take_each_others_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_runtime, "_TEMP_ROOT", tmp_path)
    (tmp_path / "rlx-ray-stopped-meanwhile").symlink_to(tmp_path / "nowhere")
    (tmp_path / "rlx-ray-killed").mkdir()
    made = iter(["removed-at-once", "removed-while-it-waited", "stays"])

    def make(prefix, dir):
        folder = dir / f"{prefix}{next(made)}"
        if "at-once" not in folder.name:
            folder.mkdir()
        return str(folder)

    def lock(file, how):
        if how == fcntl.LOCK_SH:
            shutil.rmtree(tmp_path / "rlx-ray-removed-while-it-waited", ignore_errors=True)
        return flock(file, how)

    flock = fcntl.flock
    monkeypatch.setattr(ray_runtime.tempfile, "mkdtemp", make)
    monkeypatch.setattr(ray_runtime.fcntl, "flock", lock)
    folder, held = ray_runtime._locked_folder()
    ray_runtime._remove_leftovers()
    os.close(held)
    assert folder == tmp_path / "rlx-ray-stays"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["rlx-ray-stays"]


def test_prometheus_hears_of_rays_endpoints_from_rays_file_or_from_its_nodes(tmp_path, monkeypatch):
    session = tmp_path / "session"
    nodes = [
        {"Alive": alive, "NodeManagerAddress": f"10.0.0.{i}", "MetricsExportPort": 9000 + i}
        for i, alive in enumerate((True, False, True))
    ]
    monkeypatch.setattr(ray_routes.ray, "nodes", lambda: nodes)
    assert ray_routes.ray_targets("") == []
    assert ray_routes.ray_targets(str(session)) == [
        {"labels": {"job": "ray"}, "targets": ["10.0.0.0:9000", "10.0.0.2:9002"]}
    ]
    told = [{"labels": {"job": "ray"}, "targets": ["10.0.0.9:1"]}]
    (tmp_path / "prom_metrics_service_discovery.json").write_text(json.dumps(told))
    assert ray_routes.ray_targets(str(session)) == told


def test_a_placement_group_has_a_name_and_another_one_when_it_is_asked_for_anew(monkeypatch):
    names: list[str] = []
    monkeypatch.setattr(reservation, "placement_group", lambda bundles, name: names.append(name) or name)
    monkeypatch.setattr(reservation, "remove_placement_group", lambda group: None)
    devices = Reservation({"CPU": 1}, "rlx-engine-3")
    for _ in range(2):
        devices.ask()
        devices.ask()
        devices.release()
    assert names == ["rlx-engine-3", "rlx-engine-3.1"]


class FakeMetric:
    """Of ray.util.metrics: what was recorded, by name and labels."""

    recorded: ClassVar[defaultdict[tuple[str, ...], list[float]]] = defaultdict(list)
    error: ClassVar[Exception | None] = None

    def __init__(self, name: str, help: str, labels: tuple[str, ...]):
        self.name, self.labels = name, labels

    def set(self, value: float, tags: dict[str, str]) -> None:
        if FakeMetric.error:
            raise FakeMetric.error
        assert tuple(tags) == self.labels
        FakeMetric.recorded[self.name, *tags.values()].append(value)

    inc = set


@pytest.fixture
def fake_metric(monkeypatch):
    monkeypatch.setattr(FakeMetric, "recorded", defaultdict(list))
    monkeypatch.setattr(FakeMetric, "error", None)
    monkeypatch.setattr(ray_metrics, "Gauge", FakeMetric)
    monkeypatch.setattr(ray_metrics, "Counter", FakeMetric)
    monkeypatch.setattr(ray_metrics, "REFRESH_S", 0.0)
    monkeypatch.setattr(ray_metrics, "_SHARE", 1.0)
    return FakeMetric


def tokens(value: float) -> Reading:
    return Reading(BY_NAME["rlx_worker_generated_tokens_total"], ("w-0",), value)


def version(value: float) -> Reading:
    return Reading(BY_NAME["rlx_weight_version"], (), value)


async def test_rays_metrics_get_gauges_as_they_are_and_counters_by_what_they_grew(fake_metric):
    rounds = iter([[tokens(0), version(1)], [tokens(5), version(2)], [tokens(7), version(2)], [tokens(3), version(2)]])
    done = asyncio.Event()

    def read() -> list[Reading]:
        found = next(rounds, None)
        if found is None:
            done.set()
        return found or []

    metrics = RayMetrics(read, print)
    metrics.start()
    await asyncio.wait_for(done.wait(), 60)
    await metrics.close()
    assert fake_metric.recorded == {
        ("rlx_weight_version",): [1, 2, 2, 2],
        ("rlx_worker_generated_tokens_total", "w-0"): [5, 2, 3],
    }


async def test_when_rays_metrics_fail_it_is_said_once_and_nothing_else_happens(fake_metric):
    fake_metric.error = RuntimeError("no agent")
    said: list[str] = []
    asked: list[int] = []

    def read() -> list[Reading]:
        asked.append(1)
        return [version(1)]

    metrics = RayMetrics(read, said.append)
    metrics.start()
    assert metrics._task is not None
    await asyncio.wait_for(metrics._task, 60)
    await metrics.close()
    assert (len(asked), len(said)) == (1, 1)
    assert "no agent" in said[0]
