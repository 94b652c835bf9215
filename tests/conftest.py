"""Its folder comes first on sys.path, so that tests can import `tiny_models`; and what two pytest processes share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

_TOGETHER = ("e2e", "cluster")
"""Folders whose tests share services and a Ray cluster, and take their ports from one range."""


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `pytest -n 2`: a process runs the tests of a file, those of a folder of `_TOGETHER`, or all others that start
    vLLM, one after the other in the usual order; what takes longest begins first."""
    if not hasattr(config, "workerinput"):
        return
    ranks: dict[str, int] = {}
    groups = [_group_of(item, ranks) for item in items]
    for item, group in zip(items, groups, strict=True):
        item.add_marker(pytest.mark.xdist_group(group))
    order = sorted(range(len(items)), key=lambda at: (ranks[groups[at]], groups[at], at))
    items[:] = [items[at] for at in order]


def _group_of(item: pytest.Item, ranks: dict[str, int]) -> str:
    """The name of its group, whose rank in the queue is noted."""
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    if folder in _TOGETHER:
        group, rank = folder, _TOGETHER.index(folder)
    elif item.get_closest_marker("vllm"):
        group, rank = "engines", len(_TOGETHER)
    else:
        group, rank = item.path.stem, 8 if item.get_closest_marker("slow") else 9
    ranks[group] = min(rank, ranks.get(group, rank))
    return group


@pytest.fixture(autouse=True)
def _hub_setting() -> Iterator[None]:
    """A command that runs inside a test may find that the hub does not answer, and say so to its children."""
    before = os.environ.get("HF_HUB_OFFLINE")
    yield
    if before is None:
        os.environ.pop("HF_HUB_OFFLINE", None)
