"""Whether a worker computes what the learner computes: log-probabilities of fixed tokens, compared."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rlx.errors import ParityError
from rlx.rollout.deadline import answer_of
from rlx.rollout.manifest import Probe
from rlx.rollout.worker import Worker

UNLIKELY = 0.01
"""Probability, by the learner, below which a token of the probe does not count."""
CAUSES = (
    ". Usual causes: the service was started with another base_model or from another YAML, another dtype (a quantised "
    "model, or float16 against bfloat16), an LM head that is tied on one side only, an update that the worker missed. "
    "If it is rounding alone, which a larger model in bfloat16 may show, raise async.parity_threshold"
)
"""The end of the message; of several workers it is said once."""


async def verify(worker: Worker, version: int, probe: Probe, threshold: float, timeout_s: float) -> float:
    """How far the worker is off, in nats; ParityError above `threshold`. It has `timeout_s` seconds for all."""

    async def ask() -> list[np.ndarray]:
        return [await worker.prompt_logprobs(np.asarray(ids, np.int32)) for ids in probe.ids]

    off = distance(probe, await answer_of(worker.name, timeout_s, ask()))
    check(worker.name, version, off, threshold)
    return off


def distance(probe: Probe, found: Sequence[np.ndarray]) -> float:
    """Mean |log p(worker) - log p(learner)| in nats over the probe's tokens; infinite where the worker gave no number.

    `found[i]` is float32 [T_i - 1] at temperature 1. Tokens to which the learner gives less than 1 % are left out
    unless none would remain: far down the distribution one rounding of a bfloat16 logit (of magnitude 16 and more by
    1/16 and more) moves log p by what a wrong weight moves it where it matters.
    """
    want = np.concatenate([np.asarray(row, np.float64) for row in probe.logprobs])
    have = np.concatenate([np.asarray(row, np.float64).reshape(-1) for row in found]) if found else np.empty(0)
    if have.shape != want.shape or not np.isfinite(have).all():
        return math.inf
    likely = want >= math.log(UNLIKELY)
    differences = np.abs(have - want)
    return float(differences[likely].mean() if likely.any() else differences.mean())


def check(worker: str, version: int, found: float, threshold: float) -> None:
    """ParityError unless `found`, a distance, is at most `threshold`."""
    if not found <= threshold:
        raise ParityError(
            f"worker {worker} does not compute what the learner computes with weights {version}: log p differs by "
            f"{found:.4g} nats in the mean over the probe's tokens, async.parity_threshold is {threshold:g}{CAUSES}"
        )
