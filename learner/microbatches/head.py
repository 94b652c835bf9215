"""The language-model head, scored: log-probabilities and entropies straight from the hidden states.

The logits of all T tokens at once, [T, V], are the largest tensor of a step. Here they exist for one chunk of tokens
at a time, in the forward and again in the backward. Where all of them fit one chunk they are kept instead, which
saves computing them twice. A head that is not trained, as beside an adapter, needs neither: what a log-probability's
gradient is in the hidden states, [T, D], is found in the forward.

Shapes: T tokens, D hidden size, V vocabulary, C tokens of one chunk, R tokens of one block of it; B sequences and K
columns that the model hands to its head.
Not here: which tokens are scored (`logprobs.py`).
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

_KEPT_LOGITS = 2**25
"""Up to so many logits in float32, 128 MiB, are computed once and kept for the backward."""
_CHUNK_LOGITS = 2**25
"""More are computed in chunks of so many, and again in the backward."""
_CACHED_LOGITS = 2**20
"""Between two matrix products, so many are taken through all that is done to each: on a CPU its cache holds them."""


@dataclass
class HeadRequest:
    """What a prepared head computes instead of logits while `asking` it."""

    row_T: Tensor
    """int64, row of the hidden states [B, K, D]"""
    col_T: Tensor
    """int64, column"""
    target_ids_T: Tensor
    """int64"""
    temperature: float
    compute_entropy: bool = True
    entropy_gradient: bool = False
    served: bool = False
    """Whether the head was a prepared one"""

    def answer(self, hidden_BKD: Tensor, head: nn.Linear) -> Tensor:
        """float32 [2, T]: log-probabilities, and entropies or zeros."""
        self.served = True
        both = score(
            hidden_BKD[self.row_T, self.col_T], head.weight, head.bias, self.target_ids_T, self.temperature,
            self.compute_entropy, self.entropy_gradient,
        )  # fmt: skip
        return torch.stack(both)


_request: ContextVar[HeadRequest | None] = ContextVar("head_request", default=None)


@contextmanager
def asking(request: HeadRequest) -> Iterator[None]:
    """A forward in here returns `request.answer` as the logits of a prepared model, however it is wrapped."""
    token = _request.set(request)
    try:
        yield
    finally:
        _request.reset(token)


def prepare_head(model: PreTrainedModel) -> bool:
    """Let the head answer requests; without one it gives logits as before. False, and nothing done, where it is no
    plain linear layer. Whether the model changes what its head returns is for the caller to find out."""
    head: Any = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    vars(head)["forward"] = types.MethodType(_forward, head)
    return True


def restore_head(model: PreTrainedModel) -> None:
    """Undo `prepare_head`."""
    vars(model.get_output_embeddings()).pop("forward", None)


def _forward(head: nn.Linear, hidden: Tensor) -> Tensor:
    request = _request.get()
    return nn.Linear.forward(head, hidden) if request is None else request.answer(hidden, head)


def head_in_float32(model: PreTrainedModel) -> None:
    """Let the head, prepared or not, multiply in float32 under autocast, too."""
    head: Any = model.get_output_embeddings()
    rounded = head.forward

    def forward(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return rounded(hidden.float())

    vars(head)["forward"] = forward


def score(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_ids_T: Tensor,
    temperature: float,
    compute_entropy: bool = True,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """log p(target) float32 [T] of softmax((hidden · weightᵀ + bias) / temperature), and its entropy in nats, float32
    [T], without gradient unless `entropy_gradient`; zeros unless `compute_entropy`.

    Under autocast the products are taken in its type, as a linear layer would. Gradients of weight and bias are summed
    over the chunks in float32.
    """
    device_type = hidden_TD.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight_VD.dtype
    with torch.autocast(device_type, enabled=False):
        bias_V = bias_V if bias_V is None else bias_V.to(dtype)
        logprobs_T, entropies_T = _Score.apply(  # type: ignore[no-untyped-call]
            hidden_TD.to(dtype), weight_VD.to(dtype), bias_V, target_ids_T, temperature, compute_entropy,
            entropy_gradient,
        )  # fmt: skip
    return logprobs_T, entropies_T if entropy_gradient else entropies_T.detach()


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        ids_T: Tensor,
        temperature: float,
        compute_entropy: bool,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        needs_gradient = any(ctx.needs_input_grad)
        ctx.frozen = needs_gradient and not entropy_gradient and not any(ctx.needs_input_grad[1:3])
        num_tokens, vocabulary = len(hidden_TD), len(weight_VD)
        keep = needs_gradient and not ctx.frozen and num_tokens * vocabulary <= _KEPT_LOGITS
        size = max(1, num_tokens if keep else _CHUNK_LOGITS // vocabulary)
        logprobs_T = torch.empty(num_tokens, dtype=torch.float32, device=hidden_TD.device)
        normalizers_T, entropies_T = torch.empty_like(logprobs_T), torch.zeros_like(logprobs_T)
        kept = hidden_TD.new_empty(0)
        slopes_TD = torch.empty_like(hidden_TD if ctx.frozen else kept)
        for start in range(0, num_tokens, size):
            chunk = slice(start, start + size)
            logits_CV = _logits(hidden_TD[chunk], weight_VD, bias_V)
            for part, logits_RV in _blocks(start, logits_CV):
                targets_R = logits_RV.div_(temperature).gather(1, ids_T[part, None])[:, 0]
                greatest_R1 = logits_RV.amax(dim=1, keepdim=True)
                exp_RV = logits_RV.sub_(greatest_R1).exp()
                sums_R1 = exp_RV.sum(dim=1, keepdim=True)
                normalizers_T[part] = (greatest_R1 + sums_R1.log())[:, 0]
                logprobs_T[part] = targets_R - normalizers_T[part]
                if compute_entropy:
                    expected_R1 = logits_RV.mul_(exp_RV).sum(dim=1, keepdim=True) / sums_R1
                    entropies_T[part] = (sums_R1.log() - expected_R1)[:, 0]
                if keep:
                    torch.div(exp_RV, sums_R1, out=logits_RV)
                elif ctx.frozen:
                    torch.div(exp_RV, -sums_R1, out=logits_RV)
                    logits_RV.scatter_add_(1, ids_T[part, None], torch.ones_like(sums_R1))
            if keep:
                kept = logits_CV
            elif ctx.frozen:
                torch.mm(logits_CV.to(weight_VD.dtype), weight_VD, out=slopes_TD[chunk])
        if ctx.frozen:
            ctx.save_for_backward(slopes_TD.div_(temperature))
        elif needs_gradient:
            ctx.save_for_backward(hidden_TD, weight_VD, bias_V, ids_T, normalizers_T, entropies_T, kept)
            ctx.temperature, ctx.size, ctx.keep, ctx.entropy_gradient = temperature, size, keep, entropy_gradient
        return logprobs_T, entropies_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprobs_T: Tensor, grad_entropies_T: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.frozen:
            (slopes_TD,) = ctx.saved_tensors
            return (slopes_TD * grad_logprobs_T[:, None]).to(slopes_TD.dtype), None, None, None, None, None, None
        hidden_TD, weight_VD, bias_V, ids_T, normalizers_T, entropies_T, kept = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden_TD = torch.empty_like(hidden_TD) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        grad_bias_V = torch.zeros(len(weight_VD), device=weight_VD.device) if wants_bias else None
        for start in range(0, len(hidden_TD), ctx.size):
            chunk = slice(start, start + ctx.size)
            grad_CV = kept if ctx.keep else _logits(hidden_TD[chunk], weight_VD, bias_V)
            for part, probs_RV in _blocks(start, grad_CV):
                if not ctx.keep:
                    probs_RV.div_(ctx.temperature).sub_(normalizers_T[part, None]).exp_()
                scale_R1 = grad_logprobs_T[part, None]
                if ctx.entropy_gradient:
                    # dH/dlogit = -p · (log p + H)
                    scale_R1 = scale_R1 + grad_entropies_T[part, None] * (probs_RV.log() + entropies_T[part, None])
                    scale_R1 = scale_R1.where(probs_RV > 0, 0.0)
                probs_RV.mul_(scale_R1 / -ctx.temperature)
                probs_RV.scatter_add_(1, ids_T[part, None], grad_logprobs_T[part, None] / ctx.temperature)
            grad_CV = grad_CV.to(weight_VD.dtype)
            if grad_hidden_TD is not None:
                torch.mm(grad_CV, weight_VD, out=grad_hidden_TD[chunk])
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, grad_CV.t(), hidden_TD[chunk])
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(dim=0, dtype=torch.float32)
        grad_weight = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        grad_bias = None if grad_bias_V is None else grad_bias_V.to(weight_VD.dtype)
        return grad_hidden_TD, grad_weight, grad_bias, None, None, None, None


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    return functional.linear(hidden_CD, weight_VD, bias_V).float()


def _blocks(start: int, logits_CV: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a chunk that begins at token `start`, as places among all tokens and as a view."""
    on_cpu = logits_CV.device.type == "cpu"
    size = max(1, _CACHED_LOGITS // logits_CV.shape[1]) if on_cpu else len(logits_CV)
    for first in range(0, len(logits_CV), size):
        block_RV = logits_CV[first : first + size]
        yield slice(start + first, start + first + len(block_RV)), block_RV


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left · right, summed in float32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.add_(left @ right)
