"""A reward model: a sequence classifier with one output, as TRL's GRPOTrainer takes it for a reward.

The text is the chat template of the model's own tokenizer over prompt and completion, or for a plain prompt the two
one after the other; it is not truncated. The only module of rewards with torch and transformers, imported on use.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlx.errors import ModelError, UserCodeError

BATCH_SIZE = 32


class RewardModel:
    """The classifier in the folder or on the hub under `name`, on a GPU when this process sees one.

    float32 on a CPU; on a GPU the type of the checkpoint. ModelError when it cannot be had, is no reward model, or
    lacks weights.
    """

    def __init__(self, name: str):
        import torch

        self.name = name
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer, self.model = self._load()
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # The score is read at the last token that is not padding.
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        """One score for each completion. ValueError when one is longer than the model's context."""
        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        batches = [texts[start : start + BATCH_SIZE] for start in range(0, len(texts), BATCH_SIZE)]
        return [score for batch in batches for score in self._scores(batch)]

    def _scores(self, texts: list[str]) -> list[float]:
        import torch

        inputs = self.tokenizer(
            text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        )
        length, limit = inputs["input_ids"].shape[1], getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ValueError(f"prompt and completion are {length} tokens, and the reward model reads at most {limit}.")
        with torch.inference_mode():
            logits = self.model(**inputs.to(self.device)).logits
        scores: list[float] = logits[:, 0].float().tolist()
        return scores

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return prompt + (completion if isinstance(completion, str) else completion[-1]["content"] or "")
        if self.tokenizer.chat_template is None:
            raise UserCodeError(
                "has no chat template, and the prompts are chat messages. Let the transform make texts."
            )
        reply = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        text: str = self.tokenizer.apply_chat_template([*prompt, *reply], tokenize=False)
        return text

    def _load(self) -> tuple[Any, Any]:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.name)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.name,
                num_labels=1,
                dtype=torch.float32 if self.device.type == "cpu" else "auto",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ModelError(f"the reward model cannot be loaded: {_first_line(error)}{_hint(self.name)}") from error
        missing = sorted(info["missing_keys"])
        if missing:
            raise ModelError(
                f"this is not a reward model: the checkpoint has no {', '.join(missing[:3])}"
                f"{' and others' if len(missing) > 3 else ''}, and random weights score nothing. Name a model that was "
                "trained as a sequence classifier with one output."
            )
        if info["mismatched_keys"]:
            key, saved, wanted = sorted(info["mismatched_keys"])[0]
            raise ModelError(
                f"this is not a reward model: {key} is {tuple(saved)}, and with one output {tuple(wanted)}."
            )
        return tokenizer, model.to(self.device).eval()


def _hint(name: str) -> str:
    if Path(name).is_dir():
        return ""
    offline = " The hub cannot be reached from here." if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
    return f"{offline} {name!r} is no local folder: check the name and the network, or name a folder."


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
