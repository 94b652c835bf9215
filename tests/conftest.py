"""Its folder comes first on sys.path, so that tests can import `tiny_models`; how Hypothesis runs; and what several pytest
processes run beside each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("rlx", deadline=None, derandomize=True)  # on a busy machine, too, and with the same examples
settings.load_profile("rlx")

for _name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "COLUMNS", "TERMINAL_WIDTH"):
    os.environ.pop(_name, None)  # have what goes into a pipe look as in some terminal

_ENGINES = ("test_engine_contract", "test_vllm_engine", "test_vllm_lora", "test_vllm_weights")


def _unit(nodeid: str) -> str:
    """What one of several test processes runs as a whole, in the usual order: a folder whose tests share services or a
    Ray cluster, and take their ports from one range; the files that share engines; any other file."""
    file = Path(nodeid.partition("::")[0])
    if file.parent.name in ("e2e", "cluster"):
        return file.parent.name
    return "engines" if file.stem in _ENGINES else str(file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _unit(nodeid)

    return Units(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes longest begins first, when there are several processes."""
    if not hasattr(config, "workerinput"):
        return
    units = [_unit(item.nodeid) for item in items]
    slow = {unit for unit, item in zip(units, items, strict=True) if item.get_closest_marker("slow")}
    first = ["e2e", "cluster", "engines", *sorted(slow - {"e2e", "cluster", "engines"})]
    ranks = {unit: rank for rank, unit in enumerate(first)}
    order = sorted(range(len(items)), key=lambda at: (ranks.get(units[at], len(first)), units[at], at))
    items[:] = [items[at] for at in order]


@pytest.fixture(autouse=True)
def _hub_setting() -> Iterator[None]:
    """A command that runs inside a test may find that the hub does not answer, and say so to its children."""
    before = os.environ.get("HF_HUB_OFFLINE")
    yield
    if before is None:
        os.environ.pop("HF_HUB_OFFLINE", None)
