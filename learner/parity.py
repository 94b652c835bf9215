"""What a worker's log-probabilities are compared with: fixed token sequences under the learner's own forward.

Not here: the comparison, which the service makes (`rollout/parity.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from rlx.wire import Probe

SEQUENCES, LONGEST = 4, 64

ProbeIds = tuple[tuple[int, ...], ...]


def make_probe(prompts: Iterable[np.ndarray]) -> ProbeIds:
    """The sequences of a run: the ends of the longest of `prompts` (int32 [P] each), all different.

    The end, because what chat templates and system prompts begin with is the same in every prompt. A part of a prompt
    always fits in the engines' context. Empty when no prompt has two tokens.
    """
    ends = {tuple(ids[-LONGEST:].tolist()): None for ids in sorted(prompts, key=len, reverse=True) if ids.size > 1}
    return tuple(ends)[:SEQUENCES]


@torch.no_grad()
def probe_logprobs(model: nn.Module, ids: ProbeIds) -> Probe:
    """log p of all tokens but the first of each sequence at temperature 1, computed in float32.

    `model` is a causal language model as `transformers` calls it, not wrapped for data parallelism: other ranks need
    not take part. Dropout is off; the model comes back in the mode that it was in.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        return Probe(ids, tuple(_logprobs(model, torch.tensor(sequence, device=device)) for sequence in ids))
    finally:
        model.train(training)


def _logprobs(model: nn.Module, ids_T: torch.Tensor) -> tuple[float, ...]:
    logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0, :-1].float()
    chosen_T = logits_TV.gather(1, ids_T[1:, None])[:, 0]
    return tuple((chosen_T - logits_TV.logsumexp(1)).tolist())
