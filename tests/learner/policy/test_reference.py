"""A reference that follows the policy, in numbers and in a run that is resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_service import config_for, lines, serve, write_run
from safetensors.torch import load_file
from torch import nn
from trl.trainer.callbacks import SyncRefModelCallback

from rlx.learner.main import train
from rlx.learner.policy.reference import load_reference, mix_into, save_reference

pytestmark = pytest.mark.slow


def test_the_reference_moves_by_its_share_of_the_way(tmp_path: Path) -> None:
    reference, policy = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        reference.weight.copy_(torch.tensor([[0.0, 10.0]]))
        policy.weight.copy_(torch.tensor([[1.0, 0.0]]))
    load_reference(reference, tmp_path)
    assert reference.weight.tolist() == [[0.0, 10.0]]
    mix_into(reference, policy, 0.25)
    assert reference.weight.tolist() == [[0.25, 7.5]]
    assert policy.weight.tolist() == [[1.0, 0.0]]
    by_trl = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        by_trl.weight.copy_(torch.tensor([[0.0, 10.0]]))
    SyncRefModelCallback._sync_target_model(policy, by_trl, 0.25)
    assert by_trl.weight.tolist() == reference.weight.tolist()
    save_reference(reference, tmp_path, is_first=True)
    load_reference(policy, tmp_path)
    assert policy.weight.tolist() == [[0.25, 7.5]]


def test_the_kl_returns_to_zero_when_the_reference_becomes_the_policy_also_after_a_resume(tmp_path: Path) -> None:
    keys = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}
    path = write_run(tmp_path, max_steps=4, save_steps=2, trl=keys, test_datasets=None)
    with serve() as served:
        train(config_for(path, served), 1)
        kls = [record["kl"] for record in lines(tmp_path / "out" / "metrics.jsonl")]
        start = str(tmp_path / "out" / "checkpoint-2")
        train(config_for(path, served, resume_from_checkpoint=start, output_dir=str(tmp_path / "b")), 1)
    assert kls[0] == pytest.approx(0, abs=1e-6)
    assert kls[1] > 1e-3
    assert kls[2] == pytest.approx(0, abs=1e-6)
    assert kls[3] > 1e-4
    assert [record["kl"] for record in lines(tmp_path / "b" / "metrics.jsonl")] == pytest.approx(kls[2:], abs=1e-6)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "b"))
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=0)
