"""Its folder comes first on sys.path, so that tests can import `tiny_models`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _hub_setting() -> Iterator[None]:
    """A command that runs inside a test may find that the hub does not answer, and say so to its children."""
    before = os.environ.get("HF_HUB_OFFLINE")
    yield
    if before is None:
        os.environ.pop("HF_HUB_OFFLINE", None)
