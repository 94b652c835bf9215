"""A run that trains an adapter is replayed, and goes on in the middle of a generation batch, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_service import ScriptedWorker, Served, config_for, serve, write_run
from safetensors.torch import load_file

from rlx.learner.incoming.recording import OPEN_BATCH
from rlx.learner.main import train
from rlx.learner.policy.adapters import WEIGHTS

NOBODY = Served(ScriptedWorker(), port=1)
"""Where no service is"""
KEYS: dict[str, Any] = {
    "adapter": "lora", "lora_r": 4, "lora_alpha": 16, "lora_target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.2,
    "lora_sync": "adapter", "max_steps": 5, "save_steps": 1, "gradient_accumulation_steps": 4, "warmup_steps": 2,
    "test_datasets": None, "record_rollouts": True,
}  # fmt: skip
TRL = {
    "beta": 0.1, "disable_dropout": False, "num_iterations": 2, "steps_per_generation": 8, "generation_batch_size": None,
}  # fmt: skip
"""Batches of 16 completions, in two parts, twice: four steps each. With dropout the random numbers count, too."""


def again(path: Path, out: Path, **overrides: Any) -> dict[str, torch.Tensor]:
    """The adapter of a replay into `out`."""
    rollouts = str(path.parent / "out" / "rollouts")
    train(config_for(path, NOBODY, replay=rollouts, output_dir=str(out), **overrides), 1)
    return load_file(out / WEIGHTS)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.slow
def test_replays_and_resumed_replays_of_an_adapter_are_the_recorded_run(tmp_path: Path) -> None:
    path = write_run(tmp_path, trl=TRL, **KEYS)
    with serve() as served:
        train(config_for(path, served), 1)
    out = tmp_path / "out"
    expected = load_file(out / WEIGHTS)
    assert not same(load_file(out / "checkpoint-1" / WEIGHTS), expected)
    assert sorted(p.name for p in (out / "rollouts").iterdir()) == ["step-1.rlx", "step-5.rlx"]
    assert same(again(path, tmp_path / "whole"), expected)
    for step, is_open in ((3, True), (4, False)):
        checkpoint = out / f"checkpoint-{step}"
        assert (checkpoint / OPEN_BATCH).exists() == is_open
        assert same(again(path, tmp_path / f"from-{step}", resume_from_checkpoint=str(checkpoint)), expected)
