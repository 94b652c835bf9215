"""`rlx dashboard CONFIG`: where to look at a service, the configuration for Prometheus and Grafana, and a Prometheus.

Everything is written below `output_dir/monitoring`. Where Ray is, the gateway tells (`ray_routes.py`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import yaml

from rlx.config import Config
from rlx.errors import ConfigError, ServiceError, ServiceUnavailable
from rlx.processes import die_with_parent, free_port, stop_process
from rlx.rollout.auth import TOKEN_VARIABLE, service_token
from rlx.rollout.http_errors import raise_answer

PROMETHEUS_PORT, GRAFANA_PORT = 9090, 3000
_READY_S, _STOP_S, _ASK_S = 60.0, 10.0, 30.0
_INSTALL = "install one, for example with `apt-get install prometheus`, and run this again"


def dashboard_main(config: Config, start: bool = True, interval_s: int = 5) -> int:
    """Print the addresses; with `start`, run Prometheus until Ctrl-C where there is one. Returns the exit status.
    `interval_s`: seconds from one scrape to the next."""
    folder = Path(config.output_dir).absolute() / "monitoring"
    about = _ask(config)
    binary = shutil.which("prometheus")
    port = free_port("127.0.0.1", PROMETHEUS_PORT)
    prometheus = f"http://127.0.0.1:{port}"
    write_monitoring(config, folder, prometheus, about["session"], interval_s)
    _say("the run's page", f"{config.base_url}/")
    _say("metrics", f"{config.base_url}/metrics" + (" (with the bearer token)" if config.vllm.needs_token else ""))
    off = "off (cluster.dashboard)" if about["session"] else "not up yet: the service is loading, run this again"
    _say("Ray's dashboard", about["dashboard"] or off)
    if about["dashboard"]:
        _say("", "it asks for the token that `ray get-auth-token` prints")
    _say("configuration", str(folder))
    _say("Grafana", f"grafana server --homepath /usr/share/grafana --config {folder}/grafana/grafana.ini")
    _say("", f"then http://127.0.0.1:{GRAFANA_PORT}, folder rlx")
    _say("Ray's Metrics tab", "start the service with these, then this command:")
    _say("", f"RAY_PROMETHEUS_HOST={prometheus} RAY_GRAFANA_HOST=http://127.0.0.1:{GRAFANA_PORT}")
    if not start:
        return 0
    if binary is None:
        _say("Prometheus", f"there is no `prometheus` on the PATH: {_INSTALL}")
        return 0
    return _run_prometheus(binary, folder, port)


def write_monitoring(config: Config, folder: Path, prometheus: str, ray_session: str, interval_s: int) -> None:
    """prometheus.yml, and a folder for Grafana: its configuration, provisioning and dashboards."""
    grafana = folder / "grafana"
    boards = grafana / "dashboards"
    boards.mkdir(parents=True, exist_ok=True)
    shipped = files("rlx.cluster").joinpath("dashboards")
    for part in shipped.iterdir():
        if part.name.endswith(".json"):
            (boards / part.name).write_bytes(part.read_bytes())
    settings = yaml.safe_load(shipped.joinpath("prometheus.yml").read_text())
    (folder / "prometheus.yml").write_text(
        yaml.safe_dump(_for_run(settings, config, folder, interval_s), sort_keys=False)
    )
    providers = [_provider("rlx", boards)]
    if ray_session:
        providers.append(_provider("Ray", Path(ray_session) / "metrics" / "grafana" / "dashboards"))
    source = {"name": "Prometheus", "type": "prometheus", "access": "proxy", "url": prometheus, "isDefault": True}
    for kind, content in {"dashboards": {"providers": providers}, "datasources": {"datasources": [source]}}.items():
        path = grafana / "provisioning" / kind / "rlx.yml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({"apiVersion": 1, **content}, sort_keys=False))
    (grafana / "grafana.ini").write_text(
        f"[server]\nhttp_addr = 127.0.0.1\nhttp_port = {GRAFANA_PORT}\n"
        f"[paths]\nprovisioning = {grafana}/provisioning\ndata = {grafana}/data\nlogs = {grafana}/logs\n"
        "[security]\nallow_embedding = true\n"  # Ray's Metrics tab shows it in a frame
        "[auth.anonymous]\nenabled = true\norg_role = Viewer\n"
    )


def _for_run(settings: dict[str, Any], config: Config, folder: Path, interval_s: int) -> dict[str, Any]:
    """The shipped configuration of Prometheus with the addresses of this run."""
    settings["global"] = {"scrape_interval": f"{interval_s}s", "scrape_timeout": f"{min(interval_s, 10)}s"}
    scrape = {job["job_name"]: job for job in settings["scrape_configs"]}
    scrape["rlx"]["static_configs"][0]["targets"] = [config.base_url.partition("://")[2]]
    discovery = scrape["ray"]["http_sd_configs"][0]
    discovery["url"] = f"{config.base_url}/v1/ray/targets"
    if config.vllm.needs_token:
        token = {"authorization": {"credentials_file": str(_token_file(folder))}}
        scrape["rlx"] |= token
        discovery |= token
    return settings


def _token_file(folder: Path) -> Path:
    """The file that the service's token is in; one is made for that of RLX_TOKEN."""
    token = service_token()
    if not os.environ.get(TOKEN_VARIABLE, "").strip():
        return Path.home() / ".rlx" / "token"
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text(token)
    return path


def _provider(name: str, folder: Path) -> dict[str, Any]:
    return {"name": name, "folder": name, "type": "file", "options": {"path": str(folder)}}


def _ask(config: Config) -> dict[str, str]:
    url = f"{config.base_url}/v1/ray"
    try:
        answer = httpx.get(url, headers={"authorization": f"Bearer {service_token()}"}, timeout=_ASK_S)
    except httpx.TransportError as error:
        raise ServiceUnavailable(
            f"no service answers at {config.base_url} ({type(error).__name__}); start it with `rlx vllm-serve "
            f"{config.path}` or `rlx run`"
        ) from None
    if answer.is_error:
        raise_answer(answer.status_code, answer.content, f"the service at {config.base_url}")
    found: dict[str, str] = answer.json()
    return found


def _run_prometheus(binary: str, folder: Path, port: int) -> int:
    """Until Ctrl-C, which ends it, too."""
    log = folder / "prometheus.log"
    address = f"127.0.0.1:{port}"
    command = [
        binary, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/prometheus-data",
        f"--web.listen-address={address}",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=die_with_parent
        )
    try:
        _wait_ready(process, f"http://{address}/-/ready", log)
        _say("Prometheus", f"http://{address} (Ctrl-C ends it; its log: {log})")
        process.wait()
        raise ServiceError(f"Prometheus ended with status {process.returncode}: {_last_line(log)}")
    finally:
        stop_process(process, 15, _STOP_S)


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + _READY_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ConfigError(f"Prometheus did not start: {_last_line(log)}")
        try:
            if httpx.get(url, timeout=1).status_code == 200:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(0.1)
    raise ServiceUnavailable(f"Prometheus was not ready within {_READY_S:g} s; its log: {log}")


def _last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]


def _say(what: str, where: str) -> None:
    print(f"{what + ':' if what else '':<19}{where}", flush=True)
