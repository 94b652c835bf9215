"""The Ray that the service runs on: started here, or joined where RAY_ADDRESS is set.

A Ray that we start lives on this machine, gets the last N GPUs only, and ends with us. Of a cluster that we joined
we only take a placement group for each engine; the actors on it end with our connection.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import ray

from rlx.cluster.layout import Inventory, Layout, plan_layout, this_machine, too_few_devices
from rlx.cluster.reservation import Reservation, counts
from rlx.config import Config
from rlx.errors import ConfigError, ServiceError, ServiceUnavailable
from rlx.processes import descendants, end_processes, is_free

PLACEMENT_TIMEOUT_S = 60.0
# Ray's sockets live below it, and a socket's path may have 107 characters.
_TEMP_ROOT, _TEMP_PREFIX = Path("/tmp"), "rlx-ray-"
_STOP_GRACE_S, _ASK_S = 5.0, 10.0
# Ray starts its workers at niceness 15: beside a learner that computes, an engine would get some 4 % of a core.
# Where a call's connection broke, it waits so long for Ray's word that the actor is dead, and of what: 1 s is too short on
# a busy machine, and the error then says no more than that nobody was reached.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
    "RAY_timeout_ms_task_wait_for_death_info": "20000",
}
# Ray announces each time that it asks for its token (~/.ray/auth_token), which is what we want.
logging.getLogger("ray").setLevel(logging.ERROR)


class RayRuntime:
    """A connection to Ray, and the reservations of the engines' devices. `start` → `reserve` → `stop`."""

    def __init__(self, config: Config):
        self.layout: Layout | None = None
        self._reservations: dict[int, Reservation] = {}
        self.dashboard_url = self.session_dir = ""
        self._config = config
        self._temp_dir: Path | None = None
        self._lock = -1
        self._before: dict[int, int] = {}

    def start(self) -> None:
        """Start or join Ray. Blocks for 3 to 10 seconds. Raises ConfigError, ServiceError or ServiceUnavailable."""
        self._before = descendants(os.getpid())
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        address = os.environ.get("RAY_ADDRESS", "").strip()
        if address in ("", "local"):
            self._start_local()
        else:
            self._join(address)

    async def reserve(self, timeout_s: float = PLACEMENT_TIMEOUT_S) -> None:
        """Reserve the devices of the first engines; ServiceUnavailable says what is missing when not all are free in
        time, and then none is kept."""
        assert self.layout is not None, "start comes first"
        first = [self.reservation(index) for index in range(self.layout.num_engines)]
        for reservation in first:
            reservation.ask()
        outcomes = await asyncio.gather(*(reservation.wait(timeout_s) for reservation in first), return_exceptions=True)
        if any(isinstance(outcome, ServiceUnavailable) for outcome in outcomes):
            resource = self.layout.resource
            free, total = await asyncio.to_thread(counts, resource)
            free += self.layout.devices_per_engine * outcomes.count(None)
            for reservation in first:
                reservation.release()
            raise ServiceUnavailable(
                f"{self.layout.describe()} could not be reserved in the Ray cluster within {timeout_s:g} s: {free:g} of "
                f"its {total:g} {resource}s are free (an engine's must be on one node). Wait for the other jobs, or lower "
                "vllm.data_parallel_size."
            )

    def reservation(self, index: int) -> Reservation:
        """Of the devices of engine `index`; an engine beyond the first ones asks for its own when it starts."""
        assert self.layout is not None, "start comes first"
        return self._reservations.setdefault(index, Reservation(self.layout.bundle, f"rlx-engine-{index}"))

    def stop(self) -> None:
        """Give everything back: reservations, connection, and the Ray that was started here. Idempotent."""
        if not ray.is_initialized():
            return
        for reservation in self._reservations.values():
            reservation.release()
        self._shutdown()
        if self._temp_dir is not None:
            shutil.rmtree(self._temp_dir, ignore_errors=True)
            os.close(self._lock)

    def _start_local(self) -> None:
        inventory = this_machine()
        layout = plan_layout(inventory, self._config)
        cluster = self._config.cluster
        if (
            cluster.dashboard
            and cluster.dashboard_port is not None
            and not is_free(cluster.dashboard_host, cluster.dashboard_port)
        ):
            raise ConfigError(
                f"{self._config.path}: cluster.dashboard_port: port {cluster.dashboard_port} is in use. Write another, or "
                "remove the key and a free one is taken."
            )
        if cluster.dashboard:
            _check_dashboard_host(self._config)
        _remove_leftovers()
        self._temp_dir, self._lock = _locked_folder()
        with _visible_gpus(layout.service_gpus):
            context = self._init(
                address="local",
                num_cpus=inventory.cpus,
                num_gpus=len(layout.service_gpus),
                include_dashboard=cluster.dashboard,
                dashboard_host=cluster.dashboard_host,
                dashboard_port=cluster.dashboard_port,
                object_store_memory=cluster.object_store_mib * 2**20,
                logging_level="error",
                _temp_dir=str(self._temp_dir),
            )
        self.layout = layout
        self._know(context)
        if cluster.dashboard and not cluster.dashboard_is_local:
            self._require_token()
        ours = Path(self._config.output_dir).absolute() / "logs"
        (Path(self.session_dir) / "logs" / "rlx").symlink_to(ours)  # Ray's dashboard shows them with its own

    def _init(self, **options: Any) -> Any:
        """Ray gives its own processes 10 to 30 s to come up, which a busy machine may exceed; and another process may take
        a port that it has chosen. Then once more."""
        for is_last in (False, True):
            try:
                return ray.init(**options)
            except Exception as error:  # a bare one, a RuntimeError or a TimeoutError when its processes are late
                self._shutdown()
                if is_last or isinstance(error, ValueError):
                    logs = f"{self._temp_dir}/session_latest/logs"
                    raise ServiceError(f"Ray did not start: {_first_line(error)} Its logs: {logs}") from error
        raise AssertionError("the last attempt returns or raises")

    def _require_token(self) -> None:
        """ServiceError, with Ray ended, unless the dashboard asks for Ray's token."""
        try:
            answer = httpx.get(f"{self.dashboard_url}/api/authentication_mode", timeout=_ASK_S)
            asks = answer.is_success and answer.json().get("authentication_mode") == "token"
        except httpx.HTTPError:
            asks = False
        if not asks:
            self.stop()
            raise ServiceError(
                f"cluster.dashboard_host: {self._config.cluster.dashboard_host}: this Ray ({ray.__version__}) does not ask for "
                "a token, and its job API runs commands for anybody who reaches it; write 127.0.0.1"
            )

    def _join(self, address: str) -> None:
        if address.startswith("ray://"):
            raise ConfigError(
                f"RAY_ADDRESS={address}: Ray's client protocol is not supported. Run this on a node of the cluster "
                "with RAY_ADDRESS=HOST:6379, or RAY_ADDRESS=auto for the cluster of this machine."
            )
        try:
            context = ray.init(address=address, logging_level="error")
        except (RuntimeError, OSError, ValueError) as error:
            self._shutdown()
            raise ServiceUnavailable(
                f"RAY_ADDRESS={address}: no Ray cluster could be joined there ({_first_line(error)}). Start one with "
                "`ray start --head`, or unset RAY_ADDRESS and rlx starts its own."
            ) from error
        self.layout = _plan_on_cluster(self._config, address)
        self._know(context)

    def _know(self, context: Any) -> None:
        self.dashboard_url = f"http://{context.dashboard_url}" if context.dashboard_url else ""
        self.session_dir = str(context.address_info["session_dir"])

    def _shutdown(self) -> None:
        """Disconnect; then nothing runs below this process that did not run before `start`."""
        started = {pid: since for pid, since in descendants(os.getpid()).items() if pid not in self._before}
        ray.shutdown()
        end_processes(started, _STOP_GRACE_S)


def _plan_on_cluster(config: Config, address: str) -> Layout:
    """The layout on the nodes of the joined cluster; Ray chooses which, an engine's devices are all on one."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    place = f"the Ray cluster at {address} ({len(nodes)} node{'s' if len(nodes) > 1 else ''})"
    layout = plan_layout(Inventory(tuple(str(i) for i in range(sum(gpus))), sum(cpus), place), config)
    counts = gpus if layout.resource == "GPU" else cpus
    if sum(count // layout.devices_per_engine for count in counts) < layout.num_engines:
        raise too_few_devices(config, layout.resource, max(counts), f"the largest node of {place}")
    return layout


def _check_dashboard_host(config: Config) -> None:
    """On an address that others reach, Ray asks for its token unless RAY_AUTH_MODE says otherwise."""
    host, mode = config.cluster.dashboard_host, os.environ.get("RAY_AUTH_MODE", "token")
    if not config.cluster.dashboard_is_local and mode.lower() != "token":
        raise ConfigError(
            f"{config.path}: cluster.dashboard_host: {host} can be reached from other machines, RAY_AUTH_MODE={mode} switches "
            "Ray's token off, and Ray's job API runs commands for anybody who reaches it. Unset RAY_AUTH_MODE, or write "
            "cluster.dashboard_host: 127.0.0.1."
        )


@contextmanager
def _visible_gpus(names: tuple[str, ...]) -> Iterator[None]:
    """Ray's processes inherit CUDA_VISIBLE_DEVICES, and hand out what it names."""
    saved = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    try:
        yield
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if saved is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = saved


def _remove_leftovers() -> None:
    """Remove the folders of this user's services that were killed, with Ray's logs in them: nobody holds their lock."""
    for folder in _TEMP_ROOT.glob(f"{_TEMP_PREFIX}*"):
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its service stopped meanwhile
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


def _locked_folder() -> tuple[Path, int]:
    """A new folder for Ray, and the descriptor that holds its lock. Another one when `_remove_leftovers` of a service
    that starts beside this one took the first before it was locked."""
    for _ in range(10):
        folder = Path(tempfile.mkdtemp(prefix=_TEMP_PREFIX, dir=_TEMP_ROOT))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_SH)
        if folder.is_dir():
            return folder, lock
        os.close(lock)
    raise ServiceError(f"Ray's folders in {_TEMP_ROOT} are removed as soon as they are made; who does that?")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
