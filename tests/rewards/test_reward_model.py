"""A sequence classifier as reward gives what TRL's trainer computes with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import make_tiny_model, make_tiny_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from trl.data_utils import apply_chat_template

from rlx.errors import UserCodeError
from rlx.rewards.scoring import ScoreRequest, score_group
from rlx.rewards.sources import load_source

PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+2?"}]
REPLIES = ["4", "The answer is four.", "", "5 " * 40]


def make_classifier(
    folder: Path, architecture: str = "llama", num_labels: int = 1, *, pad: bool = True, chat: bool = True
) -> Path:
    """A random classifier and its tokenizer. `pad`, `chat`: whether the tokenizer has a padding token, a template."""
    tokenizer = make_tiny_tokenizer()
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        architecture, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=256, num_labels=num_labels,
        initializer_range=0.3, pad_token_id=tokenizer.pad_token_id if pad else None, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token if pad else None
    tokenizer.chat_template = tokenizer.chat_template if chat else None
    tokenizer.save_pretrained(folder)
    return folder


def as_trl_computes(folder: Path, prompts: list, completions: list) -> np.ndarray:
    """What GRPOTrainer does with a reward model, in its order."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if isinstance(prompts[0], list):
        messages = [{"messages": p + c} for p, c in zip(prompts, completions, strict=True)]
        texts = [apply_chat_template(m, tokenizer)["text"] for m in messages]
    else:
        texts = [p + c for p, c in zip(prompts, completions, strict=True)]
    inputs = tokenizer(text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    with torch.inference_mode():
        return model.eval()(**inputs).logits[:, 0].numpy()


def scored(folder: Path, prompt, completions: list) -> np.ndarray:
    reward = load_source(folder.name, folder.parent, "trl.reward_funcs[0]")
    return score_group(reward, ScoreRequest(prompt, completions, [[0]] * len(completions), {"answer": "4"}))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("pad", [True, False])
def test_chat_prompts_score_as_in_trl(tmp_path, architecture, pad):
    folder = make_classifier(tmp_path / "judge", architecture, pad=pad)
    completions = [[{"role": "assistant", "content": reply}] for reply in REPLIES]
    expected = as_trl_computes(folder, [PROMPT] * 4, completions)
    values = scored(folder, PROMPT, completions)
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(values, expected, atol=1e-5)


@pytest.mark.parametrize("pad", [True, False])
def test_plain_prompts_score_as_in_trl_also_without_a_chat_template(tmp_path, pad):
    folder = make_classifier(tmp_path / "judge", pad=pad, chat=False)
    expected = as_trl_computes(folder, ["2+2="] * 4, REPLIES)
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(scored(folder, "2+2=", REPLIES), expected, atol=1e-5)


def test_a_large_group_is_scored_in_batches_and_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("rlx.rewards.model.BATCH_SIZE", 3)
    folder = make_classifier(tmp_path / "judge")
    texts = [str(number) * (number + 1) for number in range(8)]
    expected = as_trl_computes(folder, ["a"] * 8, texts)
    np.testing.assert_allclose(scored(folder, "a", texts), expected, atol=1e-5)


def test_a_text_beyond_the_context_of_the_model_is_an_error_not_a_score(tmp_path):
    folder = make_classifier(tmp_path / "judge")
    with pytest.raises(UserCodeError, match="are 304 tokens, and the reward model reads at most 256"):
        scored(folder, "2+2=", ["a", "b" * 300])


def test_chat_prompts_without_a_template_are_told(tmp_path):
    folder = make_classifier(tmp_path / "judge", chat=False)
    with pytest.raises(UserCodeError, match=r"\(judge\) has no chat template, and the prompts are chat messages"):
        scored(folder, PROMPT, ["4"])


def test_a_language_model_is_refused_as_its_head_would_be_random(tmp_path):
    make_tiny_model(tmp_path / "policy", architecture="llama")
    with pytest.raises(
        UserCodeError, match=r"trl.reward_funcs\[0\] \(policy\): this is not a reward model: .* no score.weight"
    ):
        load_source("policy", tmp_path, "trl.reward_funcs[0]")


def test_a_classifier_of_several_labels_is_refused(tmp_path):
    make_classifier(tmp_path / "judge", num_labels=3)
    with pytest.raises(UserCodeError, match=r"score.weight is \(3, 32\), and with one output \(1, 32\)"):
        load_source("judge", tmp_path, "key")


def test_a_folder_without_a_model_and_a_missing_folder_are_told(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserCodeError, match=r"empty holds no model: config.json is missing"):
        load_source("./empty", tmp_path, "key")
    with pytest.raises(UserCodeError, match=r"there is no folder './nowhere' next to the YAML"):
        load_source("./nowhere", tmp_path, "key")


def test_a_folder_without_a_tokenizer_is_told(tmp_path):
    folder = make_classifier(tmp_path / "judge")
    for file in folder.glob("*token*"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    with pytest.raises(UserCodeError, match=r"key \(judge\): the reward model cannot be loaded: "):
        load_source("judge", tmp_path, "key")


def test_a_model_of_a_hub_out_of_reach_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserCodeError, match=r"The hub cannot be reached from here. 'org/judge' is no local folder"):
        load_source("org/judge", tmp_path, "key")
