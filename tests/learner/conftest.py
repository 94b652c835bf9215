"""The token of the fake service, for every process that a test starts."""

from __future__ import annotations

import pytest
from fake_service import TOKEN


@pytest.fixture(autouse=True)
def service_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLX_TOKEN", TOKEN)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
