"""`rlx train`: N learner processes under torch's elastic agent, which stops all of them when one fails."""

from __future__ import annotations

import logging
import os
import sys
import tempfile

from rlx.config import Config, make_plan
from rlx.hub import check_in_reach


def train_main(config: Config, overrides: list[str], num_processes: int) -> int:
    """Run `num_processes` of `rlx.learner.main` to the end; the exit code of the first that failed, else 0."""
    # What can be wrong without loading anything belongs here: said once, before anything is started.
    make_plan(config, num_processes)
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
        _, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"error: a learner process was killed by signal {-failure.exitcode}", file=sys.stderr, flush=True)
            return 128 - failure.exitcode
        return failure.exitcode or 1
    except SignalException as signal:
        return 128 + signal.sigval
    return 0
