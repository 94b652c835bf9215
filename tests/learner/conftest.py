"""The token of the fake service, for every process that a test starts; one thread, so that busy cores slow nothing; and
time for the thread that writes a run's files."""

from __future__ import annotations

import pytest
import torch
from fake_service import TOKEN

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def service_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLX_TOKEN", TOKEN)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("rlx.learner.watch.report._FLUSH_S", 60.0)
