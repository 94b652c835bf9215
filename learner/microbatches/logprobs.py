"""Log-probabilities of the trained tokens of a micro-batch under a model.

Shapes: B sequences, S tokens of the longest, T trained tokens, V vocabulary, C tokens of one chunk.
Not here: the head that scores without logits (`head.py`), which models can (`forward.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlx.learner.microbatches.batching import MicroBatch
from rlx.learner.microbatches.head import HeadRequest, asking
from rlx.learner.microbatches.packing import segmented

_CHUNK_ELEMENTS = 2**25
"""Logits that are held in float32 at once: 128 MiB. More are taken in chunks, and again in the backward."""


def completion_logprobs(
    model: nn.Module,
    batch: MicroBatch,
    temperature: float,
    compute_entropy: bool = True,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log p(token | what stands before it) at `temperature` for every trained token, float32 [T], and the entropy of
    each distribution in nats, float32 [T], without gradient unless `entropy_gradient`.

    `model` is a causal language model as `transformers` calls it, wrapped or not. Where its head is a prepared one,
    the logits of all tokens never exist together. Padded sequences start in column 0: causal attention hides the
    padding from every trained position and positions count from 0, so neither an attention mask nor position ids are
    needed. A packed batch needs a prepared model. With T = 0 the result still depends on the parameters, with gradient
    zero, as data-parallel training needs.
    """
    logits_to_keep = batch.input_ids_BS.shape[1] - batch.first_col
    request = HeadRequest(
        batch.row_T, batch.col_T - batch.first_col, batch.target_ids_T, temperature, compute_entropy, entropy_gradient
    )
    with asking(request), segmented(batch.segments) as arguments:
        logits = model(input_ids=batch.input_ids_BS, logits_to_keep=logits_to_keep, use_cache=False, **arguments).logits
    if request.served:
        return logits[0], logits[1] if compute_entropy else None
    logits_TV = logits[request.row_T, request.col_T]
    del logits

    size = max(1, _CHUNK_ELEMENTS // logits_TV.shape[1])
    if len(logits_TV) <= size:
        return _score(logits_TV, batch.target_ids_T, temperature, compute_entropy, entropy_gradient)
    parts = [
        checkpoint(_score, logits_CV, ids_C, temperature, compute_entropy, entropy_gradient, use_reentrant=False)
        for logits_CV, ids_C in zip(torch.split(logits_TV, size), torch.split(batch.target_ids_T, size), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies) if compute_entropy else None


def _score(
    logits_CV: Tensor, ids_C: Tensor, temperature: float, compute_entropy: bool, entropy_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    logits_CV = logits_CV.float() / temperature
    normalizer_C = logits_CV.logsumexp(dim=-1)
    logprobs_C = logits_CV.gather(-1, ids_C[:, None]).squeeze(-1) - normalizer_C
    if not compute_entropy:
        return logprobs_C, None
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        return logprobs_C, normalizer_C - (logits_CV.softmax(dim=-1) * logits_CV).sum(dim=-1)
