"""The quickstart, and a real service for a small untied model, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from e2e_parts import Rlx, serving, write_config, write_rows
from quickstart_model import QUICKSTART, make_quickstart
from tiny_models import make_tiny_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def quickstart() -> Path:
    """The quickstart's folder, with its model and data made."""
    make_quickstart()
    return QUICKSTART


@dataclass
class Project:
    """A folder with a configuration, rewards and data for an untied Llama, and the service that runs on it."""

    config: Path
    model: Path
    service: Rlx

    @property
    def folder(self) -> Path:
        return self.config.parent


REWARDS = """
def lower_case(completions, **kwargs):
    return [sum(c.islower() for c in text) / 16 for text in completions]


def fault(completions, fault=None, **kwargs):
    kind = fault[0] if fault else None
    if kind == "raises":
        return [1.0 / len(text[:0]) for text in completions]
    if kind == "short":
        return [1.0]
    return [float("nan") if kind == "nan" else None] * len(completions)
"""


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    folder = tmp_path_factory.mktemp("llama")
    model = make_tiny_model(folder / "model", tie=False, architecture="llama")
    (folder / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"{word} {number}"} for number in range(8) for word in ("say", "tell", "write", "read")]
    write_rows(folder / "prompts.jsonl", rows)
    write_rows(folder / "raises.jsonl", [{**row, "fault": "raises"} for row in rows])
    config = write_config(
        folder / "llama.yaml",
        base_model=str(model),
        datasets=[{"path": "prompts.jsonl"}],
        trl={"reward_funcs": ["rewards.lower_case", "rewards.fault"], "reward_weights": [1, 0]},
        learning_rate=1e-3,
        save_strategy="no",
    )
    with serving(config) as service:
        yield Project(config, model, service)
