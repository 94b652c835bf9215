"""How a model is run: whether its head scores without logits, and whether its sequences are packed.

Models differ: some change their logits after the head (a soft cap, a scale), some mix neighbouring tokens outside of
attention, some have attention of their own. So each way is tried on a few tokens, in float32, before the run, and
taken only where it gives the log-probabilities that the model's own forward gives.
Not here: the head (`head.py`), packed attention (`packing.py`), which samples share a micro-batch (`splitting.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlx.config import Config
from rlx.errors import ConfigError
from rlx.learner.microbatches.batching import Layout, Sample, collate
from rlx.learner.microbatches.head import head_in_float32, prepare_head, restore_head
from rlx.learner.microbatches.logprobs import completion_logprobs
from rlx.learner.microbatches.packing import ATTENTION

_TOLERANCE = 1e-3
"""Nats between two ways to compute a log-probability in float32"""
_LEAK = 1e-5
"""Nats that one packed sequence may move when another one changes"""
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class ForwardPlan:
    """What `prepare` found; `apply_to` other models of the same architecture, such as the reference."""

    layout: Layout
    scoring_head: bool
    """Log-probabilities come from the hidden states, chunk by chunk"""
    notes: tuple[str, ...]
    """For the user: what the model does not allow, and what that costs"""
    float32_head: bool = False

    def apply_to(self, model: PreTrainedModel) -> None:
        if self.scoring_head:
            prepare_head(model)
        if self.float32_head:
            head_in_float32(model)
        if self.layout.packed:
            model.set_attn_implementation(ATTENTION)


def prepare(model: PreTrainedModel, config: Config) -> ForwardPlan:
    """Change `model`, float32 on a CPU, so that it runs the cheapest way that it can and `config` allows. Raises
    ConfigError where `sample_packing: true` asks for what the model cannot do."""
    flash = config.attention if config.attention in ("flash_attention_2", "flash_attention_3") else None
    if flash is not None:
        model.set_attn_implementation("sdpa")  # for the trial, which runs on a CPU
    own_attention = model.config._attn_implementation
    samples = _trial_samples(model.config.get_text_config().vocab_size)
    was_training = model.training
    model.eval()
    notes: list[str] = []
    with torch.no_grad():
        expected = _logprobs(model, samples, Layout())
        scoring_head = _head_scores(model, samples, expected)
        layout = Layout(pair_cost=_pair_cost(model))
        if not scoring_head:
            notes.append(
                f"{type(model).__name__} changes its logits after the head, or its head is not a plain linear layer: "
                "the logits of a whole micro-batch are held in memory"
            )
        if _wants_packing(config, flash):
            model.set_attn_implementation(ATTENTION)
            packed = replace(layout, packed=True, share_prompts=config.share_prompt_prefix)
            problem = _packing_problem(model, samples, expected, packed)
            if problem is None:
                layout = replace(packed, flash=flash)
            elif config.sample_packing:
                raise ConfigError(f"{config.path}: sample_packing: true, but {problem}. Remove the key.")
            else:
                notes.append(f"sequences are padded, not packed: {problem}")
    if not layout.packed:
        model.set_attn_implementation(flash or own_attention)
    if config.trl.cast_lm_head_to_fp32:
        head_in_float32(model)
    model.train(was_training)
    return ForwardPlan(layout, scoring_head, tuple(notes), config.trl.cast_lm_head_to_fp32)


def _wants_packing(config: Config, flash: str | None) -> bool:
    """Without being told: with flash attention, and on a CPU with scaled dot products."""
    if config.sample_packing is None:
        return flash is not None or (not torch.cuda.is_available() and config.attention in (None, "sdpa"))
    return config.sample_packing


def _head_scores(model: PreTrainedModel, samples: list[Sample], expected: Tensor) -> bool:
    if not prepare_head(model):
        return False
    if _equal(_logprobs(model, samples, Layout()), expected):
        return True
    restore_head(model)
    return False


def _packing_problem(model: PreTrainedModel, samples: list[Sample], expected: Tensor, layout: Layout) -> str | None:
    """Why this model cannot be packed; None where it can."""
    name = type(model).__name__
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _ATTENTION_LAYERS
    if kinds or any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return f"{name} mixes tokens outside of attention"
    try:
        packed = _logprobs(model, samples, layout)
        other_first = [replace(samples[0], completion_ids=samples[0].completion_ids[::-1].copy()), *samples[1:]]
        moved = _logprobs(model, other_first, layout)
    except Exception as error:  # a model's own code on arguments that it does not know: whatever it raises, it cannot
        return f"{name} does not take packed rows ({type(error).__name__}: {error})"
    if not _equal(packed, expected):
        return f"{name} gives other log-probabilities for packed sequences"
    rest = samples[0].num_trained
    if not torch.allclose(packed[rest:], moved[rest:], rtol=0, atol=_LEAK):
        return f"in {name}, one packed sequence changes another"
    return None


def _equal(values: Tensor, expected: Tensor) -> bool:
    return values.shape == expected.shape and torch.allclose(values, expected, rtol=0, atol=_TOLERANCE)


def _logprobs(model: PreTrainedModel, samples: list[Sample], layout: Layout) -> Tensor:
    return completion_logprobs(model, collate(samples, layout).to(model.device), 1.0, compute_entropy=False)[0]


def _trial_samples(vocabulary: int) -> list[Sample]:
    """Three completions of one prompt and one of another."""
    rng = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return rng.integers(0, vocabulary, count).astype(np.int32)

    prompts = [ids(4), ids(3)]
    rows = [(prompts[0], ids(n)) for n in (5, 2, 4)] + [(prompts[1], ids(3))]
    return [Sample(prompt, completion, np.zeros(len(completion), np.float32), 0.0, 1.0) for prompt, completion in rows]


def _pair_cost(model: PreTrainedModel) -> float:
    """A token costs 2 operations per weight; attention 4 per layer and hidden unit for each key that it sees."""
    text = model.config.get_text_config()
    weights = sum(p.numel() for p in model.parameters())
    return 2 * int(text.num_hidden_layers) * int(text.hidden_size) / weights
