"""The tokens of high entropy and the bonus belong to the whole step, in runs against a real gateway; equality with TRL
is in test_losses_equal_trl.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fake_service import config_for, lines, serve, write_run
from safetensors.torch import load_file

from rlx.learner.main import train
from rlx.learner.objective.entropy import EntropyBonus, high_entropy
from rlx.learner.ranks import Ranks

pytestmark = pytest.mark.slow

TERMS = {"top_entropy_quantile": 0.37, "entropy_coef": 0.2, "beta": 0.1}


def final(out: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(out / "model.safetensors").items())])


def train_to(out: Path, path: Path, **overrides: object) -> torch.Tensor:
    with serve() as served:
        train(config_for(path, served, output_dir=str(out), **overrides), 1)
    return final(out)


def test_the_highest_share_of_all_micro_batches_is_kept() -> None:
    entropies = [torch.tensor([5.0, 1.0, 4.0]), torch.zeros(0), torch.tensor([2.0, 3.0, 0.5, 6.0])]
    masks = high_entropy(entropies, 0.4, Ranks(1))  # the threshold is 3.6 of the way from 0.5 to 6: between 3 and 4
    assert [mask.tolist() for mask in masks] == [[True, False, True], [], [False, False, False, True]]
    assert sum(int(mask.sum()) for mask in high_entropy(entropies, 0.0, Ranks(1))) == 1
    assert high_entropy([torch.zeros(0)], 0.4, Ranks(1))[0].tolist() == []


def test_a_fixed_coefficient_stays_and_an_adaptive_one_waits_for_a_measured_entropy() -> None:
    fixed = EntropyBonus(0.3)
    fixed.adapt(0.0)
    assert (fixed.applied, fixed.coefficient) == (0.3, 0.3)
    adaptive = EntropyBonus(0.3, adaptive=True, target=1.0, delta=0.1)
    assert adaptive.applied == 0
    adaptive.adapt(1.0)
    assert adaptive.applied == pytest.approx(0.4)
    resumed = EntropyBonus(0.3, adaptive=True, target=1.0, delta=0.1)
    resumed.restore(json.loads(json.dumps(adaptive.state())))
    assert resumed == adaptive
    adaptive.adapt(1.1)
    assert (adaptive.applied, adaptive.coefficient) == (0, pytest.approx(0.3))


def test_micro_batches_of_eight_and_of_two_train_to_the_same_parameters(tmp_path: Path) -> None:
    path = write_run(tmp_path, max_steps=2, trl=TERMS, test_datasets=None)
    whole = train_to(tmp_path / "8", path, micro_batch_size=8)
    torch.testing.assert_close(train_to(tmp_path / "2", path, micro_batch_size=2), whole, atol=1e-5, rtol=0)
    for term, off in (("trl__top_entropy_quantile", 1.0), ("trl__entropy_coef", 0.0)):
        without = train_to(tmp_path / term, path, micro_batch_size=8, **{term: off})
        assert (without - whole).abs().max() > 1e-4, term


def test_a_resumed_run_goes_on_with_the_adapted_coefficient(tmp_path: Path) -> None:
    adaptive = {"use_adaptive_entropy": True, "entropy_target": 10.0, "entropy_coef_delta": 0.1, "entropy_coef": 0.1}
    path = write_run(tmp_path, max_steps=3, save_steps=1, trl=adaptive, test_datasets=None)
    whole = train_to(tmp_path / "out", path)
    resumed = train_to(tmp_path / "b", path, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert [r["entropy_coef"] for r in lines(tmp_path / "b" / "metrics.jsonl")] == pytest.approx([0.3, 0.4])
    torch.testing.assert_close(resumed, whole, atol=1e-6, rtol=0)
