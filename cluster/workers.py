"""`rlx workers list|add|remove`: the rollout workers of a running service, from another terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rlx.config import Config
from rlx.errors import DeadlineExceeded, ServiceError, ServiceUnavailable
from rlx.rollout.auth import service_token
from rlx.rollout.client import ClientTimeouts, RolloutClient

_LOOK_S = 0.5
_CLOSE_S = 30.0
_PIPE_WIDTH = 120
_COLUMNS = ("name", "state", "node", "pid", "weights", "in flight", "kv-cache", "restarts")


def list_main(config: Config) -> int:
    """Print a table of the workers."""
    with _client(config) as client:
        _show(client.workers())
    return 0


def add_main(config: Config, count: int, timeout_s: float | None = None) -> int:
    """Add `count` workers and wait until all of them serve. Those that do not within `timeout_s` seconds (default:
    vllm.start_timeout and service.publish_timeout) are taken out again, and the error has their causes."""
    seconds = timeout_s or config.vllm.start_timeout + config.service.publish_timeout
    with _client(config) as client:
        names = client.add_workers(count)
        said = {name: "" for name in names}
        waiting, end = names, time.monotonic() + seconds
        while waiting and time.monotonic() < end:
            time.sleep(_LOOK_S)
            workers = _by_name(client)
            for name in waiting:
                if said[name] != (now := _words(workers.get(name))):
                    said[name] = now
                    _say(f"{name}: {now}")
            waiting = [name for name in waiting if name not in workers or workers[name]["state"] != "ready"]
            if any(name not in workers or workers[name]["state"] == "gone" for name in waiting):
                break
        if waiting:
            for name in waiting:
                with contextlib.suppress(ServiceError):  # it has gone meanwhile
                    client.remove_worker(name)
            raise ServiceUnavailable(
                f"not added within {seconds:g} s: {'; '.join(f'{name} ({said[name]})' for name in waiting)}"
            )
        _show(client.workers())
    return 0


def remove_main(config: Config, name: str) -> int:
    """Let worker `name` finish what it has, for at most service.drain_timeout, then take it out."""
    with _client(config) as client:
        if name not in (names := _by_name(client)):
            raise ServiceError(f"{config.base_url} has no worker {name!r}; it has {', '.join(names) or 'none'}")
        client.remove_worker(name)
        _say(f"{name}: finishing what it has")
        end = time.monotonic() + config.service.drain_timeout + _CLOSE_S
        while name in _by_name(client):
            if time.monotonic() >= end:
                raise DeadlineExceeded(
                    f"{name} did not leave within service.drain_timeout ({config.service.drain_timeout:g} s) and "
                    f"{_CLOSE_S:g} s to close; the service's terminal says more"
                )
            time.sleep(_LOOK_S)
        _say(f"{name}: removed")
    return 0


def _by_name(client: RolloutClient) -> dict[str, dict[str, Any]]:
    return {worker["name"]: worker for worker in client.workers()["workers"]}


def _say(line: str) -> None:
    print(line, flush=True)


@contextlib.contextmanager
def _client(config: Config) -> Iterator[RolloutClient]:
    with RolloutClient(config.base_url, service_token(), ClientTimeouts()) as client:
        yield client


def _words(worker: dict[str, Any] | None) -> str:
    if worker is None:
        return "gone"
    return worker["state"] + (f": {worker['cause']}" if worker["cause"] else "")


def _show(answer: dict[str, Any]) -> None:
    """Print `answer`, of GET /v1/workers: a table, and below it the causes."""
    table = Table(title=f"weights {answer['weight_version']}", title_justify="left", box=box.SIMPLE_HEAD)
    for column in _COLUMNS:
        table.add_column(column, no_wrap=True)
    for worker in answer["workers"]:
        table.add_row(
            worker["name"],
            worker["state"],
            worker["node"],
            str(worker["pid"] or ""),
            str(worker["weight_version"]),
            str(worker["in_flight"]),
            f"{worker['load']['kv_cache_usage']:.0%}",
            str(worker["restarts"]),
        )
    Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)
    for worker in answer["workers"]:
        if worker["cause"]:
            _say(f"{worker['name']}: {worker['cause']}")
