"""What a worker's log-probabilities are compared with: fixed token sequences under the learner's own forward.

Not here: the comparison, which the service makes (`rollout/parity.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from rlx.rollout.manifest import Probe

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
        return Probe(ids, _logprobs(model, ids, device)) if ids else Probe((), ())
    finally:
        model.train(training)


def _logprobs(model: nn.Module, ids: ProbeIds, device: torch.device) -> tuple[tuple[float, ...], ...]:
    """One forward: padding on the right is hidden from what stands before it."""
    ids_BS = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.int64)
    for row, sequence in enumerate(ids):
        ids_BS[row, : len(sequence)] = torch.tensor(sequence)
    ids_BS = ids_BS.to(device)
    logits_BSV = model(input_ids=ids_BS, use_cache=False).logits[:, :-1].float()
    chosen_BS = logits_BSV.gather(2, ids_BS[:, 1:, None])[:, :, 0] - logits_BSV.logsumexp(2)
    return tuple(tuple(row[: len(i) - 1]) for row, i in zip(chosen_BS.tolist(), ids, strict=True))
