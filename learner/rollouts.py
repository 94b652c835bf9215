"""Rank 0's dealings with the service: publish before any rollout, evaluate on a published version, bring groups."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

from torch import nn

from rlx.config import Config
from rlx.errors import ServiceError
from rlx.learner.data import Prompt
from rlx.learner.evaluation import Evaluation, evaluation_of
from rlx.learner.publish import Publisher
from rlx.learner.stream import requests_of
from rlx.rollout.client import RolloutClient
from rlx.wire import GroupResult


class Rollouts:
    """Brings the groups of each step. `on_evaluation` gets every evaluation."""

    def __init__(
        self,
        config: Config,
        client: RolloutClient,
        publisher: Publisher,
        model: nn.Module,
        held_out: list[Prompt],
        on_evaluation: Callable[[Evaluation], None],
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
        version, n = self._publisher.version or 0, self._config.trl.num_generations_eval
        groups = self._client.rollouts(requests_of(self._config, self._held_out, self._run_id, step, "eval", n))
        seconds = time.perf_counter() - started
        self._on_evaluation(evaluation_of(self._config, self._held_out, groups, step, version, seconds))
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
