"""Evaluation: the held-out prompts sampled beside the training groups, all on one weight version, and what came out.

    start(step, version) ─► one request per held-out prompt ─► service ─► result(): Evaluation
                                                                └─ cancel() takes the requests back

Consumes: the held-out prompts. Waits for: their groups, in `result`, at most as long as it is told; the error names
what is missing. Not here: when to evaluate, and keeping the workers on the version meanwhile (the feed).
"""

from __future__ import annotations

import concurrent.futures
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from rlx.config import Config
from rlx.errors import DeadlineExceeded, ServiceError
from rlx.learner.incoming.data import Prompt
from rlx.learner.incoming.requests import requests_of
from rlx.learner.incoming.scored_groups import reward_names, reward_weights_of, rewards_of
from rlx.learner.objective.advantages import weighted_rewards
from rlx.wire import GroupRequest, GroupResult

_NUM_SAMPLES = 16
_ROUNDING = 1e-6
"""Of a sum of weighted float32 rewards, which counts as solved from `eval_success_reward` less this."""


@dataclass(frozen=True)
class Evaluation:
    """What the held-out prompts gave at one step. Means are over the completions that have a reward; NaN where none
    has."""

    step: int
    weight_version: int
    num_prompts: int
    num_generations: int
    reward: float
    """Weighted"""
    rewards: dict[str, float]
    """By function"""
    pass_at_k: dict[str, float]
    """By k = 1, 2, 4, … ≤ num_generations, see `pass_at_k`"""
    num_unscored: int
    """Completions without any reward, which count nowhere else"""
    mean_length: float
    """Tokens per completion"""
    seconds: float
    """From the start until all groups were there"""
    samples: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """The first completion of some prompts, with its rewards"""


class Client(Protocol):
    """What this needs of `rlx.rollout.client.RolloutClient`."""

    def submit(self, request: GroupRequest) -> concurrent.futures.Future[GroupResult]: ...

    def cancel(self, keys: Sequence[str]) -> None: ...


class Evaluator:
    """One evaluation at a time. `session` begins the keys of its requests. Call it from one thread; `cancel` from any."""

    def __init__(self, config: Config, client: Client, held_out: Sequence[Prompt], session: str):
        self._config, self._client, self._held_out, self._session = config, client, list(held_out), session
        self._step, self._version, self._attempt = -1, 0, 0
        self._started_at = 0.0
        self._futures: dict[str, concurrent.futures.Future[GroupResult]] = {}

    def start(self, step: int, version: int) -> None:
        """Submit every held-out prompt; returns at once. Does nothing without held-out prompts.

        Called again for the same step, as after a lost service, it samples anew, by other keys. An evaluation that
        still runs is cancelled.
        """
        self.cancel()
        self._attempt = self._attempt + 1 if step == self._step else 0
        self._step, self._version = step, version
        self._started_at = time.perf_counter()
        n = self._config.trl.num_generations_eval
        again = f".{self._attempt}" if self._attempt else ""
        requests = requests_of(self._config, self._held_out, self._session, step, "eval", n)
        keyed = {request.key + again: request for request in requests}
        self._futures = {key: self._client.submit(replace(request, key=key)) for key, request in keyed.items()}

    def result(self, timeout_s: float) -> Evaluation:
        """Wait for the groups and sum them up. Raises what a group failed with, DeadlineExceeded, or ServiceError when
        a token is not of the version that `start` named. Then nothing is running any more, also after an error."""
        try:
            groups = self._groups(timeout_s)
            seconds = time.perf_counter() - self._started_at
            for group in groups:
                self._check_version(group)
        except BaseException:  # whatever ends it, nobody will ask for its groups any more
            self.cancel()
            raise
        finally:
            self._futures = {}
        return evaluation_of(self._config, self._held_out, groups, self._step, self._version, seconds)

    def cancel(self) -> None:
        """Take back what is still sampled; returns at once. Who waits in `result` gets GroupCancelled."""
        if left := [key for key, future in self._futures.items() if not future.done()]:
            self._client.cancel(left)

    def _groups(self, timeout_s: float) -> list[GroupResult]:
        futures = self._futures.values()
        done, missing = concurrent.futures.wait(futures, timeout_s, concurrent.futures.FIRST_EXCEPTION)
        for future in done:
            future.result()
        if missing:
            waiting = [key for key, future in self._futures.items() if future in missing]
            raise DeadlineExceeded(
                f"the evaluation after step {self._step}: the rollout service did not bring {len(missing)} of "
                f"{len(futures)} groups within {timeout_s:g} s, the first of them {waiting[0]}"
            )
        return [future.result() for future in futures]

    def _check_version(self, group: GroupResult) -> None:
        for episode in group.episodes:
            if any(version != self._version for version in episode.weight_versions):
                raise ServiceError(
                    f"worker {group.worker} sampled {group.key} with weight versions {episode.weight_versions}, but the "
                    f"evaluation is of version {self._version}. Is another learner using this service?"
                )


def evaluation_of(
    config: Config, prompts: Sequence[Prompt], groups: list[GroupResult], step: int, version: int, seconds: float
) -> Evaluation:
    """The evaluation that `groups`, one for each of `prompts`, are. `groups` is not empty."""
    rewards_BF = torch.from_numpy(rewards_of(groups))
    rewards_B = weighted_rewards(rewards_BF, reward_weights_of(config, rewards_BF.numpy()))
    n = len(groups[0].episodes)
    lengths = [episode.num_sampled for group in groups for episode in group.episodes]
    return Evaluation(
        step=step,
        weight_version=version,
        num_prompts=len(groups),
        num_generations=n,
        reward=rewards_B.nanmean().item(),
        rewards=dict(zip(reward_names(groups[0]), rewards_BF.nanmean(dim=0).tolist(), strict=True)),
        pass_at_k=pass_at_k(rewards_B.view(-1, n).numpy(), config.eval_success_reward),
        num_unscored=int(rewards_B.isnan().sum()),
        mean_length=sum(lengths) / len(lengths),
        seconds=seconds,
        samples=[_sample(prompt, group) for prompt, group in list(zip(prompts, groups, strict=True))[:_NUM_SAMPLES]],
    )


def pass_at_k(rewards_PG: np.ndarray, success: float) -> dict[str, float]:
    """The chance that one of k completions of a prompt is solved, for k = 1, 2, 4, … ≤ G, mean over the prompts.

    Of n completions with a reward of which c reach `success`, 1 - C(n-c, k) / C(n, k) is the unbiased estimate (Chen et
    al. 2021, arXiv 2107.03374). NaN is no reward: it does not count in n, and a prompt with n < k not in that mean,
    which is NaN when no prompt is left.
    """
    known_P = (~np.isnan(rewards_PG)).sum(axis=1).tolist()
    solved_P = (rewards_PG >= success - _ROUNDING).sum(axis=1).tolist()
    result = {}
    for k in (2**i for i in range(rewards_PG.shape[1].bit_length())):
        chances = [1 - math.comb(n - c, k) / math.comb(n, k) for n, c in zip(known_P, solved_P, strict=True) if n >= k]
        result[str(k)] = sum(chances) / len(chances) if chances else math.nan
    return result


def _sample(prompt: Prompt, group: GroupResult) -> dict[str, Any]:
    first = group.episodes[0]
    rewards = {r.name: float(r.values[0]) for r in group.rewards}
    return {"prompt": prompt.prompt, "completion": first.text, "status": first.status, "rewards": rewards}
