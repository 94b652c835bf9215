"""`rlx vllm-serve`: puts the service together, runs it until a signal, and takes it apart again.

port ─► gateway answers "loading" ─► Ray ─► devices ─► actors: engines and rewards ─► ready
SIGINT or SIGTERM ─► drain ─► actors ─► devices ─► Ray ─► port; a second signal ends everything at once
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from rlx.cluster import watchdog
from rlx.cluster.direct import DirectSettings
from rlx.cluster.engines import EngineFactory, vllm_engine
from rlx.cluster.progress import EVENT, WARNING, Say, say, shown
from rlx.cluster.ray_episodes import RayEpisodes
from rlx.cluster.ray_metrics import RayMetrics
from rlx.cluster.ray_routes import add_ray_routes
from rlx.cluster.ray_runtime import RayRuntime
from rlx.cluster.ray_scorer import RayScorer
from rlx.cluster.ray_worker import RayWorker, WeightParcel
from rlx.config import Config
from rlx.envs.single_turn import SingleTurn
from rlx.hub import check_in_reach
from rlx.rollout.app import create_app
from rlx.rollout.auth import service_token
from rlx.rollout.direct import Leases
from rlx.rollout.direct_app import add_routes
from rlx.rollout.gateway import bind, quiet_collector, serving
from rlx.rollout.http_bodies import for_readers
from rlx.rollout.metrics import readings
from rlx.rollout.service import RolloutService
from rlx.rollout.worker import Worker

_RESERVING_SHARE = 0.1
"""Of vllm.start_timeout: the rest is left for loading. A worker that finds no devices asks again."""


def serve_main(config: Config, *, engine: EngineFactory = vllm_engine) -> int:
    """Run the service until it is told to stop. Returns the exit status; raises rlx.errors, with everything closed."""
    logging.basicConfig(level=logging.WARNING, format=f"{WARNING}%(message)s")
    return asyncio.run(serve(config, engine=engine))


async def serve(config: Config, *, engine: EngineFactory = vllm_engine, on_progress: Say = say) -> int:
    """The same inside an event loop. 0 after a drain, 128 + signal when stopped while loading."""
    token = service_token()
    if engine is vllm_engine:
        check_in_reach(config, "base_model")
    listener = bind(config.vllm.host, config.vllm.port)
    stop = _Stop(on_progress)
    watchdog.guard()
    runtime = RayRuntime(config)
    make_worker = worker_factory(config, runtime, engine, token, lambda name, doing: service.fleet.note(name, doing))
    workers = [make_worker() for _ in range(config.vllm.data_parallel_size)]
    service = RolloutService(
        list(workers),
        RayScorer(config),
        RayEpisodes(config) if config.has_episodes else SingleTurn(),
        config.service,
        config.async_,
        model=config.base_model,
        start_timeout_s=config.vllm.start_timeout,
        max_model_len=config.max_model_len,
        make_worker=make_worker,
    )
    service.fleet.on_event = lambda line: on_progress(f"{EVENT}{line}")
    app = gateway_app(config, service, token)
    add_ray_routes(app, runtime, for_readers(token, config.vllm.needs_token))
    async with serving(app, listener) as url:
        metrics = RayMetrics(lambda: readings(service), on_progress)
        try:
            if not await stop.or_done(_load(runtime, service, workers, stop, on_progress)):
                return 128 + stop.signal
            quiet_collector()
            if config.vllm.needs_token:
                on_progress(
                    f"note: {config.vllm.host} can be reached from other machines; every request needs the token of "
                    "RLX_TOKEN or ~/.rlx/token"
                )
            if runtime.dashboard_url:
                on_progress(f"dashboard: {runtime.dashboard_url} (asks for the token that `ray get-auth-token` prints)")
            on_progress(f"ready: {url}, {_count(len(workers), 'worker')}, version {service.fleet.weight_version}")
            metrics.start()
            await stop.asked()
            on_progress("stopping: waiting for the running groups")
            return 0
        finally:
            await metrics.close()
            await service.drain(config.service.drain_timeout)
            await _to_its_end(runtime.stop)
            on_progress("stopped")


async def _load(runtime: RayRuntime, service: RolloutService, workers: list[RayWorker], stop: _Stop, say: Say) -> None:
    say("starting Ray")
    await _to_its_end(runtime.start)
    stop.listen()
    assert runtime.layout is not None
    say(f"reserving {runtime.layout.describe()}")
    await runtime.reserve()
    async with shown(workers, say):
        await service.start()


def worker_factory(
    config: Config, runtime: RayRuntime, engine: EngineFactory, token: str, on_phase: Callable[[str, str], None]
) -> Callable[[], RayWorker]:
    """Makes the service's workers, one after the other; no number is given twice. `on_phase`: see RayWorker."""
    numbers, log_dir, parcel = itertools.count(), Path(config.output_dir) / "logs", WeightParcel()

    def make_worker() -> RayWorker:
        index = next(numbers)
        return RayWorker(
            index,
            partial(engine, config, index),
            runtime=runtime,
            log_dir=log_dir,
            parcel=parcel,
            reserve_timeout_s=_RESERVING_SHARE * config.vllm.start_timeout,
            direct=DirectSettings(config, token) if config.service.direct else None,
            on_phase=on_phase,
        )

    return make_worker


def gateway_app(config: Config, service: RolloutService, token: str) -> FastAPI:
    """The gateway, with the routes to the workers' own endpoints where there are some."""
    app = create_app(service, token, require_token_for_data=config.vllm.needs_token)
    if config.service.direct:
        leases = Leases(
            service, lambda worker: _on_ray(worker).url, lambda worker, key: _on_ray(worker).cancel_group(key)
        )
        add_routes(app, leases, token, require_token=config.vllm.needs_token)
    return app


def _on_ray(worker: Worker) -> RayWorker:
    assert isinstance(worker, RayWorker), "the workers of this service are Ray actors"
    return worker


class _Stop:
    """SIGINT and SIGTERM: the first asks for an orderly stop, the second ends the process; the watchdog ends the rest."""

    def __init__(self, say: Say):
        self.signal = 0
        self._say = say
        self._asked = asyncio.Event()
        self.listen()

    def listen(self) -> None:
        """Take the signals; once more after Ray has started, as it puts a handler of its own over SIGTERM's."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._receive, number)

    async def asked(self) -> None:
        """Until the first signal."""
        await self._asked.wait()

    async def or_done(self, work: Coroutine[Any, Any, None]) -> bool:
        """Run `work` until it is done, or cancel it at a signal; whether it was done."""
        task, asked = asyncio.create_task(work), asyncio.create_task(self._asked.wait())
        try:
            await asyncio.wait([task, asked], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
                return True
            return False
        finally:
            task.cancel()
            asked.cancel()
            await asyncio.gather(task, asked, return_exceptions=True)

    def _receive(self, number: int) -> None:
        if self.signal:
            self._say("stopping at once")
            os._exit(128 + number)
        self.signal = number
        self._asked.set()


async def _to_its_end(function: Callable[[], None]) -> None:
    """Run a blocking function in a thread; a cancellation waits for it, as it cannot be interrupted half-way."""
    task = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
