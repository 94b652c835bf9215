"""Rank 0's dealings with the service: publish before any rollout, evaluate on a published version, bring groups."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from rlx.config import Config
from rlx.errors import ServiceError
from rlx.learner.advantages import weighted_rewards
from rlx.learner.data import Prompt
from rlx.learner.publish import Publisher
from rlx.learner.stream import requests_of, reward_names, reward_weights_of, rewards_of
from rlx.rollout.client import RolloutClient
from rlx.wire import GroupResult


@dataclass(frozen=True)
class Evaluation:
    """Mean rewards over the held-out prompts at one step: `reward` weighted, `rewards` by function; NaN where no
    completion had one."""

    step: int
    weight_version: int
    num_prompts: int
    num_generations: int
    reward: float
    rewards: dict[str, float]
    mean_length: float
    seconds: float


class Rollouts:
    """Brings the groups of each step. `on_evaluation` gets every evaluation with its groups."""

    def __init__(
        self,
        config: Config,
        client: RolloutClient,
        publisher: Publisher,
        model: nn.Module,
        held_out: list[Prompt],
        on_evaluation: Callable[[Evaluation, list[Prompt], list[GroupResult]], None],
    ):
        self._config, self._client, self._publisher, self._model = config, client, publisher, model
        self._held_out, self._on_evaluation = held_out, on_evaluation
        self._run_id = uuid.uuid4().hex[:12]

    def fetch(self, step: int, prompts: list[Prompt]) -> tuple[list[GroupResult], dict[str, float]]:
        """Publish the weights that `step` begins with, evaluate when due, and bring the step's scored groups.

        Seconds by part: weight_sync_s, weight_sync_pause_s, rollout_wait_s, eval_s.
        """
        seconds = self.publish()
        every = self._config.eval_steps
        if step == 0 or (every is not None and step % every == 0):
            seconds |= self.evaluate(step)
        started = time.perf_counter()
        requests = requests_of(self._config, prompts, self._run_id, step, "", self._config.trl.num_generations)
        groups = self._client.rollouts(requests)
        seconds["rollout_wait_s"] = time.perf_counter() - started
        for group in groups:
            self._check_version(group)
        return groups, seconds

    def publish(self) -> dict[str, float]:
        """Every worker serves the model's present parameters when this returns."""
        times = self._publisher.publish(self._model)
        return {"weight_sync_s": times.total_s, "weight_sync_pause_s": times.pause_s}

    def evaluate(self, step: int) -> dict[str, float]:
        """Mean reward of the held-out prompts under the published version."""
        if not self._held_out:
            return {}
        started = time.perf_counter()
        n = self._config.trl.num_generations_eval
        groups = self._client.rollouts(requests_of(self._config, self._held_out, self._run_id, step, "eval", n))
        rewards_BF = torch.from_numpy(rewards_of(groups))
        weights_F = reward_weights_of(self._config, rewards_BF.numpy())
        lengths = [episode.num_sampled for group in groups for episode in group.episodes]
        seconds = time.perf_counter() - started
        result = Evaluation(
            step=step,
            weight_version=self._publisher.version or 0,
            num_prompts=len(self._held_out),
            num_generations=n,
            reward=weighted_rewards(rewards_BF, weights_F).nanmean().item(),
            rewards=dict(zip(reward_names(groups[0]), rewards_BF.nanmean(dim=0).tolist(), strict=True)),
            mean_length=sum(lengths) / len(lengths),
            seconds=seconds,
        )
        self._on_evaluation(result, self._held_out, groups)
        return {"eval_s": seconds}

    def _check_version(self, group: GroupResult) -> None:
        """In a synchronous run every token comes from the version just published."""
        expected = self._publisher.version
        for episode in group.episodes:
            if any(version != expected for version in episode.weight_versions):
                raise ServiceError(
                    f"worker {group.worker} sampled {group.key} with weight versions {episode.weight_versions}, but "
                    f"{expected} was published. Is another learner using this service?"
                )
