"""The probe: fixed ends of prompts, and the learner's log-probabilities of them, the same whenever nothing changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlx.learner.weights.parity import make_probe, probe_logprobs
from rlx.rollout.manifest import WeightManifest


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> PreTrainedModel:
    folder: Path = make_tiny_model(tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attention_dropout=0.5)


IDS = ((5, 6, 7, 8, 9, 10), (11, 12), tuple(range(20, 84)))


def prompts(*lists: list[int]) -> list[np.ndarray]:
    return [np.array(ids, np.int32) for ids in lists]


def test_the_probe_is_the_different_ends_of_the_longest_prompts() -> None:
    system = list(range(100))
    given = prompts([1, 2], [7], *[[*system, i] for i in range(3)], [], [*system, 1], [3, 4, 5])
    assert make_probe(given) == (*[(*range(37, 100), i) for i in range(3)], (3, 4, 5))
    assert make_probe(reversed(given)) != (), "any iterable"
    assert all(type(i) is int for ids in make_probe(given) for i in ids), "it travels as JSON"


def test_prompts_of_one_token_make_no_probe() -> None:
    assert make_probe(prompts([1], [], [2])) == ()


def test_the_log_probs_are_those_of_the_model_at_temperature_one_in_float32(model: PreTrainedModel) -> None:
    probe = probe_logprobs(model, IDS)
    assert probe.ids == IDS
    model.eval()
    for ids, found in zip(IDS, probe.logprobs, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        want = torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        np.testing.assert_allclose(found, want, atol=1e-5)
    manifest = WeightManifest(1, 1, "", (), probe=probe)
    assert WeightManifest.from_json(manifest.to_json()).probe == probe


def test_dropout_is_off_and_the_model_comes_back_as_it_was(model: PreTrainedModel) -> None:
    found = []
    for training in (True, False, True):
        model.train(training)
        state = torch.random.get_rng_state()
        found.append(probe_logprobs(model, IDS).logprobs)
        assert model.training is training
        assert model.model.layers[0].training is training
        assert torch.equal(torch.random.get_rng_state(), state), "training draws what it would have drawn"
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert found[0] == found[1] == found[2]


def test_a_failed_forward_leaves_the_model_in_its_mode(model: PreTrainedModel) -> None:
    model.train()
    with pytest.raises(IndexError):
        probe_logprobs(model, ((5, 10**6),))
    assert model.training


def test_other_weights_of_one_layer_show(model: PreTrainedModel) -> None:
    before = np.concatenate(probe_logprobs(model, IDS).logprobs)
    weight = model.model.layers[-1].mlp.down_proj.weight
    with torch.no_grad():
        kept = weight.clone()
        weight *= -1
        after = np.concatenate(probe_logprobs(model, IDS).logprobs)
        weight.copy_(kept)
    assert np.abs(after - before).mean() > 0.1
