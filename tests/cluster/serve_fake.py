"""`rlx vllm-serve CONFIG` with the fake engine instead of vLLM: a process for the tests to start and to kill."""

from __future__ import annotations

import sys

from fakes import broken_engine, fake_engine

from rlx.cli_parts import guarded
from rlx.cluster.serve import serve_main
from rlx.config import load_config

if __name__ == "__main__":
    path, engine = sys.argv[1:]
    factory = {"fake": fake_engine, "broken": broken_engine}[engine]
    sys.exit(guarded(lambda: serve_main(load_config(path), engine=factory)))
