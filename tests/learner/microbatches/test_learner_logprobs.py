"""The learner's own log-probabilities in the sample records of a run, which are written when a step ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_service import config_for, lines, serve, write_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlx.learner.trainer as trainer_module
from rlx.learner.main import train


def gaps(samples: list[dict[str, Any]]) -> list[float]:
    rows = [row for sample in samples for row in sample["rows"]]
    return [abs(a - b) for row in rows for a, b in zip(row["learner_logprobs"], row["logprobs"], strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("num_iterations", [1, 2])
def test_they_are_those_of_the_model_that_the_step_began_with(
    tmp_path: Path, num_iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second batch is left in the midst of its first step: its records are there, without them."""
    forwards, right = 0, trainer_module.policy_loss

    def fails_in_the_second_batch(*args: Any) -> Any:
        nonlocal forwards
        forwards += 1
        if forwards > 4 * num_iterations + 1:
            raise FloatingPointError("in the second batch")
        return right(*args)

    monkeypatch.setattr(trainer_module, "policy_loss", fails_in_the_second_batch)
    path = write_run(
        tmp_path, max_steps=4, samples_per_step=100, test_datasets=None, gradient_accumulation_steps=4,
        save_steps=1, trl={"num_iterations": num_iterations, "temperature": 0.7},
    )  # fmt: skip
    with serve() as served, pytest.raises(FloatingPointError):
        train(config_for(path, served), 1)
    samples, second = lines(tmp_path / "out" / "samples.jsonl"), 1 + num_iterations
    assert [sample["step"] for sample in samples] == [1] * 8 + [second] * 8
    assert not any("learner_logprobs" in row for sample in samples[8:] for row in sample["rows"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for sample in samples[:8]:
        [row], prompt = sample["rows"], tokenizer(sample["prompt"])["input_ids"]
        ids = torch.tensor([*prompt, *row["ids"]])
        with torch.no_grad():
            table = (model(ids[None]).logits[0, :-1] / 0.7).log_softmax(-1)
        expected = table.gather(-1, ids[1:, None])[len(prompt) - 1 :, 0]
        assert row["learner_logprobs"] == pytest.approx(expected.tolist(), abs=1e-4)
    metrics = lines(tmp_path / "out" / "metrics.jsonl")[0]
    assert np.mean(gaps(samples[:8])) == pytest.approx(metrics["sampling/sampling_logp_difference/mean"], abs=1e-5)
    assert max(gaps(samples[:8])) == pytest.approx(metrics["sampling/sampling_logp_difference/max"], abs=1e-5)
