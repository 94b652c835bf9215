"""`rlx train`: N learner processes under torch's elastic agent, which stops all of them when one fails."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterable
from typing import Protocol

from rlx.config import Config, make_plan
from rlx.config.trackers import check_trackers
from rlx.hub import check_in_reach


class Failure(Protocol):
    """What the elastic agent says of a process that failed: `timestamp` in whole seconds, `exitcode` as Popen has it."""

    exitcode: int
    timestamp: int


def first_cause(failures: Iterable[Failure]) -> Failure:
    """The failure that the others follow from. A process that loses another fails within the same second; the agent
    itself ends the rest with SIGTERM."""
    by_time = sorted(failures, key=lambda f: f.timestamp)
    at_first = [f for f in by_time if f.timestamp <= by_time[0].timestamp + 1]
    return next((f for f in at_first if f.exitcode < 0 and f.exitcode != -signal.SIGTERM), by_time[0])


def train_main(config: Config, overrides: list[str], num_processes: int) -> int:
    """Run `num_processes` of `rlx.learner.main` to the end; the exit code of the first that failed, else 0."""
    # What can be wrong without loading anything belongs here: said once, before anything is started.
    make_plan(config, num_processes)
    check_trackers(config, config.path)
    check_in_reach(config, "base_model")
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for module in ("agent.server.api", "multiprocessing.api"):  # each has set a level of its own
        logging.getLogger(f"torch.distributed.elastic.{module}").setLevel(logging.CRITICAL)
    arguments = ["-u", "-m", "rlx.learner.main", str(num_processes), str(config.path), *overrides]
    try:
        with tempfile.TemporaryDirectory(prefix="rlx-learner-") as logs:
            launch = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=num_processes,
                rdzv_backend="c10d",
                rdzv_endpoint="127.0.0.1:0",
                run_id="rlx",
                max_restarts=0,
                monitor_interval=0.2,
                logs_specs=DefaultLogsSpecs(logs),
            )
            elastic_launch(launch, sys.executable)(*arguments)
    except ChildFailedError as error:
        failure = first_cause(error.failures.values())
        if failure.exitcode < 0:
            print(f"error: a learner process was killed by signal {-failure.exitcode}", file=sys.stderr, flush=True)
            return 128 - failure.exitcode
        return failure.exitcode or 1
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0
