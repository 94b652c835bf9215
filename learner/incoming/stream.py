"""The stream: the learner's data set, one optimizer step of scored groups at a time.

    rank 0   feed: the step's tickets and their groups ─┐ one frame per group
    all      ◄──────────────── broadcast ──────────────┘
             advantages and token weights of the whole step → own micro-batches → Trainer

Several steps train on one batch where `num_iterations` or `steps_per_generation` say so; the first of them asks the
present policy for the old log-probabilities.

Consumes: batches of the feed. Waits for: the feed (rank 0), as long as that allows; rank 0 (the others), at most the
process group's timeout. Unblocked by: the groups of the step, or an error, which rank 0 passes on. Produces:
micro-batches. Not here: which prompt a ticket is, and its request (`requests.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlx.config import Config, Plan
from rlx.episode import Episode, Row
from rlx.learner.incoming.data import Prompt
from rlx.learner.incoming.requests import prompt_order
from rlx.learner.incoming.scored_groups import known_logprobs, reward_weights_of, rewards_of
from rlx.learner.microbatches.batching import PADDED, Layout, MicroBatch, Sample, collate
from rlx.learner.microbatches.row_logprobs import RowLogprobs
from rlx.learner.microbatches.splitting import split
from rlx.learner.objective.advantages import AdvantageOptions, Advantages, group_advantages
from rlx.learner.objective.losses import token_weights
from rlx.learner.ranks import Ranks
from rlx.learner.watch.bottleneck import StepTimes
from rlx.wire import GroupResult


@dataclass(frozen=True)
class Fetched:
    """What rank 0 brings for one step, in ticket order. `metrics` by their names in metrics.jsonl."""

    tickets: tuple[int, ...]
    groups: list[GroupResult]
    times: StepTimes = field(default_factory=StepTimes)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepBatch:
    """What one optimizer step trains on: the groups of all ranks, in ticket order."""

    step: int
    prompts: list[Prompt]
    groups: list[GroupResult]
    advantages: Advantages
    rewards_BF: np.ndarray
    tickets: tuple[int, ...] = ()
    times: StepTimes = field(default_factory=StepTimes)
    """Rank 0's split of the time before training; `trainer.py` adds the rest. Of zeros on the other ranks."""
    metrics: dict[str, float] = field(default_factory=dict)
    """More of rank 0's, by their names in metrics.jsonl"""
    is_reused: bool = False
    """Whether a step before trained on these groups, too (`num_iterations`, `steps_per_generation`)"""

    @property
    def episodes(self) -> list[Episode]:
        return [episode for group in self.groups for episode in group.episodes]

    def shown(self, count: int) -> list[int]:
        """Places in `episodes` of the first `count`, spread over the groups, ascending: those with a sample record."""
        size, total = len(self.groups[0].episodes), len(self.groups) * len(self.groups[0].episodes)
        return sorted(sorted(range(total), key=lambda i: (i % size, i // size))[:count])


class RolloutStream:
    """Iterates over the micro-batches of this rank from the trainer's current step to the last.

    `fetch(step)` is called on rank 0 only, once per step, when everything up to that step has been trained. `on_step`
    sees every StepBatch, on all ranks. Where several steps train on a generation batch, `fetch` brings groups for the
    first of them and none for the others, `old_logprobs` scores a micro-batch under the policy before the first, and
    `reopen(step)` brings, on rank 0, the batch and the scores of `open_batch` to a run that was resumed between them.

    `num_micro_batches` are those of the step that is being iterated over.
    """

    num_micro_batches = 0

    def __init__(
        self,
        config: Config,
        plan: Plan,
        ranks: Ranks,
        prompts: list[Prompt],
        current_step: Callable[[], int],
        last_step: int,
        fetch: Callable[[int], Fetched],
        on_step: Callable[[StepBatch], None],
        layout: Layout = PADDED,
        old_logprobs: Callable[[MicroBatch], Tensor] | None = None,
        reopen: Callable[[int], tuple[Fetched, np.ndarray]] | None = None,
    ):
        self._config, self._plan, self._ranks, self._prompts, self._layout = config, plan, ranks, prompts, layout
        self._current_step, self._last_step = current_step, last_step
        self._fetch, self._on_step = fetch, on_step
        self._score, self._reopen = old_logprobs, reopen
        self._batch: StepBatch | None = None
        self._old_logprobs: np.ndarray | None = None
        """Of `_batch`: float32, of all trained tokens in the order of its rows; None where one step trains on it"""
        self._parts: list[list[Sample]] = []
        """The samples of all ranks for each step of a pass over `_batch`"""
        self._shown: dict[int, list[Sample]] = {}
        """By place in `StepBatch.episodes`, the rows of the episodes that get a sample record"""
        self._kept_logprobs: RowLogprobs | None = None
        """Of the rows in `_shown`; None where their old log-probabilities are kept anyway"""
        self.order = prompt_order(config, len(prompts))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for step in range(self._current_step(), self._last_step):
            batch = self._next(step)
            self._on_step(batch)
            if batch is not self._batch:
                self._arrange(batch)
            part = self._parts[step % self._plan.steps_per_batch % self._plan.steps_per_pass]
            mine = self._own_micro_batches(part)
            micro_batches = [collate(samples, self._layout) for samples in mine]
            self.num_micro_batches = len(micro_batches)
            for micro_batch, samples in zip(micro_batches, mine, strict=True):
                yield {"micro_batch": micro_batch, "samples": samples}

    def keep_logprobs(self, samples: list[Sample], logprobs_T: Tensor) -> None:
        """Give the learner's log-probabilities of a micro-batch, float [T]; those of shown samples are kept."""
        if self._kept_logprobs is not None:
            self._kept_logprobs.take(samples, logprobs_T)

    def shown_logprobs(self) -> dict[int, list[np.ndarray]]:
        """After the first step on a batch, on every rank: for the places of `StepBatch.shown`, of each training row the
        trained tokens' log-probabilities under the policy of that step, float32. Empty after the other steps."""
        if self._batch is None or self._batch.is_reused or not self._shown:
            return {}
        if self._kept_logprobs is None:
            return {
                place: [s.old_logprobs for s in rows if s.old_logprobs is not None]
                for place, rows in self._shown.items()
            }
        ends = iter(self._kept_logprobs.split(self._kept_logprobs.of_all(self._ranks)))
        return {place: [next(ends) for _ in rows] for place, rows in self._shown.items()}

    def open_batch(self) -> tuple[StepBatch, np.ndarray] | None:
        """Between two steps on one batch: that, and its old log-probabilities, float32, of all trained tokens in the
        order of its rows."""
        if self._batch is None or self._old_logprobs is None or self._current_step() % self._plan.steps_per_batch == 0:
            return None
        return self._batch, self._old_logprobs

    def _next(self, step: int) -> StepBatch:
        """What `step` trains on: the batch of the step before, or one that rank 0 brings and every rank decodes."""
        fetched, is_reused = Fetched((), []), step % self._plan.steps_per_batch > 0

        def fetch() -> list[bytes]:
            nonlocal fetched
            fetched = self._fetch(step)
            brought, old = fetched, b""
            if is_reused and self._batch is None:
                assert self._reopen is not None
                brought, logprobs = self._reopen(step)
                old = logprobs.tobytes()
            return [json.dumps(brought.tickets).encode(), old, *(group.encode() for group in brought.groups)]

        head, old, *frames = self._ranks.from_first(fetch)
        if is_reused and self._batch is not None:
            self._batch = replace(self._batch, step=step, times=fetched.times, metrics=fetched.metrics, is_reused=True)
            return self._batch
        self._old_logprobs = np.frombuffer(old, np.float32) if is_reused else None
        groups = [GroupResult.decode(frame) for frame in frames]
        rewards_BF, tickets = rewards_of(groups), tuple(json.loads(head))
        prompts = [self._prompts[self.order.at(ticket)] for ticket in tickets]
        return StepBatch(
            step, prompts, groups, self._advantages(rewards_BF), rewards_BF, tickets, fetched.times, fetched.metrics,
            is_reused,
        )  # fmt: skip

    def _advantages(self, rewards_BF: np.ndarray) -> Advantages:
        trl = self._config.trl
        return group_advantages(
            torch.from_numpy(rewards_BF),
            reward_weights_of(self._config, rewards_BF),
            self._plan.num_generations,
            AdvantageOptions(trl.advantage_estimator, trl.scale_rewards, self._config.normalizes_each_reward),
        )

    def _arrange(self, batch: StepBatch) -> None:
        """Cut `batch` into one part for each step of a pass; every pass has the same."""
        episodes, parts = self._samples(batch), self._plan.steps_per_pass
        order = np.arange(len(episodes))
        if parts > 1:
            seed = [self._config.seed, self._plan.first_of(batch.step)]
            order = np.random.default_rng(seed).permutation(order)
        if self._plan.steps_per_batch > 1:
            if self._old_logprobs is None:
                self._old_logprobs = self._scored(episodes, order)
            ends = iter(
                np.split(self._old_logprobs, np.cumsum([s.num_trained for rows in episodes for s in rows])[:-1])
            )
            episodes = [[replace(sample, old_logprobs=next(ends)) for sample in rows] for rows in episodes]
        self._shown = {place: episodes[place] for place in batch.shown(self._config.samples_per_step)}
        if self._shown and self._plan.steps_per_batch == 1:
            self._kept_logprobs = RowLogprobs(sample for rows in self._shown.values() for sample in rows)
        self._batch = batch
        self._parts = _parts(episodes, order, parts)

    def _scored(self, episodes: list[list[Sample]], order: np.ndarray) -> np.ndarray:
        """The old log-probabilities of all ranks' samples, one after the other."""
        assert self._score is not None
        old = RowLogprobs(sample for rows in episodes for sample in rows)
        for part in _parts(episodes, order, self._plan.steps_per_pass):
            for mine in self._own_micro_batches(part):
                old.take(mine, self._score(collate(mine, self._layout)))
        return old.of_all(self._ranks)

    def _own_micro_batches(self, part: list[Sample]) -> list[list[Sample]]:
        """This rank's micro-batches of one step."""
        accumulation = self._plan.gradient_accumulation_steps
        return split(part, self._ranks.size, accumulation, self._config.token_budget, self._layout)[self._ranks.rank]

    def _samples(self, batch: StepBatch) -> list[list[Sample]]:
        """The rows of each episode, weighted for a step on an equal share of the batch."""
        trl, episodes = self._config.trl, batch.episodes
        cut = [trl.mask_truncated_completions and e.truncated for e in episodes]
        unused = torch.tensor(
            [not e.scorable or out or not known_logprobs(e) for e, out in zip(episodes, cut, strict=True)]
        )
        lengths = torch.tensor([e.num_sampled for e in episodes])
        weights = token_weights(trl.loss_type, lengths, trl.max_completion_length, unused) * self._plan.steps_per_pass
        prompt_of = [prompt for prompt, group in zip(batch.prompts, batch.groups, strict=True) for _ in group.episodes]
        return [
            [
                Sample(
                    prompt.ids if row.prompt_ids is None else row.prompt_ids,
                    row.ids, row.logprobs, float(advantage), float(weight), bool(masked), row.mask,
                )
                for row in episode.rows or (_NO_ROW,)
            ]
            for prompt, episode, advantage, weight, masked in zip(
                prompt_of, episodes, batch.advantages.advantages, weights, unused, strict=True
            )
        ]  # fmt: skip


def _parts(episodes: list[list[Sample]], order: np.ndarray, count: int) -> list[list[Sample]]:
    """The rows of the episodes, taken in `order` (places, int [E]), in `count` parts of as many episodes each."""
    return [[sample for i in chosen for sample in episodes[i]] for chosen in np.split(order, count)]


_NO_ROW = Row(np.empty(0, np.int32), np.empty(0, np.float32), ())
"""Stands for an episode that failed before it sampled anything."""
