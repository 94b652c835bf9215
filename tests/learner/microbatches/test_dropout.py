"""`trl.disable_dropout`: a model in training computes what it computes in evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fake_service import write_run
from transformers import PreTrainedModel

from rlx.config import load_config
from rlx.learner.policy.model import load_model

IDS_BT = torch.arange(40, 72)[None]


def model_with_dropout(folder: Path, disabled: bool, attention: str) -> PreTrainedModel:
    path = write_run(folder, trl={"disable_dropout": disabled}, attn_implementation=attention)
    settings = folder / "model" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"attention_dropout": 0.5}))
    return load_model(load_config(path))


@torch.no_grad()
def moves(model: PreTrainedModel) -> float:
    """How far its logits are in training from those in evaluation, at most."""
    quiet = model.eval()(input_ids=IDS_BT).logits
    return float((model.train()(input_ids=IDS_BT).logits - quiet).abs().max())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dropout_that_is_an_argument_of_the_attention_is_off_too(tmp_path: Path, attention: str) -> None:
    model = model_with_dropout(tmp_path / "off", disabled=True, attention=attention)
    assert moves(model) < 1e-5
    assert model.config.attention_dropout == 0
    on = model_with_dropout(tmp_path / "on", disabled=False, attention=attention)
    assert moves(on) > 1e-2
    assert on.config.attention_dropout == 0.5
