"""The stream: the learner's data set, one optimizer step of scored groups at a time.

    rank 0   prompts of the step → publish weights → groups from the service ─┐ one frame per group
    all      ◄──────────────────────────── broadcast ────────────────────────┘
             advantages and token weights of the whole step → own micro-batches → Trainer

Consumes: the prompt order, which is a function of seed and step alone, so resuming needs only the step.
Waits for: the service (rank 0), at most service.group_timeout; rank 0 (the others), at most the process group's
timeout. Unblocked by: the groups of the step, or an error, which rank 0 passes on. Produces: micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash

from rlx.config import Config, Plan
from rlx.episode import Episode, Row
from rlx.learner.advantages import AdvantageOptions, Advantages, group_advantages
from rlx.learner.batching import MicroBatch, Sample, collate, split
from rlx.learner.data import Prompt
from rlx.learner.losses import token_weights
from rlx.learner.ranks import Ranks
from rlx.wire import GroupRequest, GroupResult, Sampling


@dataclass(frozen=True)
class StepBatch:
    """What one optimizer step trains on: the groups of all ranks, in the order of the prompts."""

    step: int
    prompts: list[Prompt]
    groups: list[GroupResult]
    advantages: Advantages
    rewards_BF: np.ndarray
    seconds: dict[str, float] = field(default_factory=dict)
    """Rank 0's split of the time before training: publish, publish_pause, rollout_wait, evaluate."""

    @property
    def episodes(self) -> list[Episode]:
        return [episode for group in self.groups for episode in group.episodes]


class PromptOrder:
    """Which prompts each step takes. Every epoch visits every prompt; its last step is filled up from its start."""

    def __init__(self, num_prompts: int, prompts_per_step: int, seed: int, shuffle: bool):
        self._num_prompts, self._per_step, self._seed, self._shuffle = num_prompts, prompts_per_step, seed, shuffle
        self.steps_per_epoch = -(-num_prompts // prompts_per_step)

    def at(self, step: int) -> list[int]:
        """Indices of the prompts of `step`, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = np.arange(self._num_prompts)
        if self._shuffle:
            order = np.random.default_rng([self._seed, epoch]).permutation(order)
        start = within * self._per_step
        return [int(order[i % self._num_prompts]) for i in range(start, start + self._per_step)]


def reward_names(group: GroupResult) -> list[str]:
    """The reward functions by the last part of their dotted names, or by the whole where those are not distinct."""
    whole = [outcome.name for outcome in group.rewards]
    short = [name.rpartition(".")[2].rpartition(":")[2] for name in whole]
    return short if len(set(short)) == len(short) else whole


def rewards_of(groups: list[GroupResult]) -> np.ndarray:
    """Rewards [B, F] of all episodes, group after group; NaN for None."""
    return np.concatenate([np.stack([r.values for r in group.rewards], axis=1) for group in groups])


def reward_weights_of(config: Config, rewards_BF: np.ndarray) -> torch.Tensor:
    """One weight [F] per column of rewards: `trl.reward_weights`, and 1 for the episodes' own reward without one."""
    given = config.trl.reward_weights or []
    return torch.tensor([*given, *[1.0] * (rewards_BF.shape[1] - len(given))])


def known_logprobs(episode: Episode) -> bool:
    """Whether all sampled tokens have a log-probability. Where one is NaN or infinite, the worker was broken, and the
    episode is not trained; its reward stays in the group's baseline."""
    return all(bool(np.isfinite(row.logprobs[row.mask]).all()) for row in episode.rows)


def advantage_options(config: Config) -> AdvantageOptions:
    trl = config.trl
    return AdvantageOptions(trl.advantage_estimator, trl.scale_rewards, config.normalizes_each_reward)


def sampling_of(config: Config) -> Sampling:
    """The sampling parameters of `trl:`."""
    trl = config.trl
    extra = dict(trl.generation_kwargs)
    stop = extra.pop("stop", None) or ()
    return Sampling(
        max_tokens=trl.max_completion_length,
        temperature=trl.temperature,
        top_p=trl.top_p,
        top_k=max(trl.top_k, 0),
        min_p=trl.min_p or 0.0,
        repetition_penalty=trl.repetition_penalty,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        regex=trl.regex,
        extra=extra,
    )


def requests_of(
    config: Config, prompts: list[Prompt], run_id: str, step: int, label: str, n: int
) -> list[GroupRequest]:
    """One request per prompt, with keys that name run, step and place."""
    return [
        GroupRequest(
            key=f"{run_id}/{label}{step}/{index}",
            prompt=prompt.prompt,
            prompt_ids=prompt.ids,
            num_generations=n,
            sampling=sampling_of(config),
            columns=prompt.columns,
            step=step,
            deadline_s=config.service.group_timeout,
            seed=xxhash.xxh64_intdigest(f"{config.seed}/{label}{step}/{index}".encode()) % 2**31,
        )
        for index, prompt in enumerate(prompts)
    ]


class RolloutStream:
    """Iterates over the micro-batches of this rank from the trainer's current step to the last.

    `fetch(step, prompts) -> (groups, seconds)` is called on rank 0 only, once per step, when everything up to that
    step has been trained: it publishes the weights and brings the groups. `on_step` sees every StepBatch, on all ranks.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        ranks: Ranks,
        prompts: list[Prompt],
        current_step: Callable[[], int],
        last_step: int,
        fetch: Callable[[int, list[Prompt]], tuple[list[GroupResult], dict[str, float]]],
        on_step: Callable[[StepBatch], None],
    ):
        self._config, self._plan, self._ranks, self._prompts = config, plan, ranks, prompts
        self._current_step, self._last_step = current_step, last_step
        self._fetch, self._on_step = fetch, on_step
        trl = config.trl
        self.order = PromptOrder(
            len(prompts), plan.prompts_per_step, config.seed, trl.shuffle_dataset and config.shuffle_merged_datasets
        )

    def __iter__(self) -> Iterator[dict[str, MicroBatch]]:
        for step in range(self._current_step(), self._last_step):
            batch = self._next(step)
            self._on_step(batch)
            for micro_batch in self._micro_batches(batch):
                yield {"micro_batch": micro_batch}

    def _next(self, step: int) -> StepBatch:
        prompts = [self._prompts[i] for i in self.order.at(step)]
        seconds: dict[str, float] = {}

        def fetch() -> list[bytes]:
            groups, times = self._fetch(step, prompts)
            seconds.update(times)
            return [group.encode() for group in groups]

        groups = [GroupResult.decode(frame) for frame in self._ranks.from_first(fetch)]
        rewards_BF = rewards_of(groups)
        advantages = group_advantages(
            torch.from_numpy(rewards_BF),
            reward_weights_of(self._config, rewards_BF),
            self._plan.num_generations,
            advantage_options(self._config),
        )
        return StepBatch(step, prompts, groups, advantages, rewards_BF, seconds)

    def _micro_batches(self, batch: StepBatch) -> list[MicroBatch]:
        trl, episodes = self._config.trl, batch.episodes
        cut = [trl.mask_truncated_completions and e.truncated for e in episodes]
        unused = torch.tensor(
            [not e.scorable or out or not known_logprobs(e) for e, out in zip(episodes, cut, strict=True)]
        )
        lengths = torch.tensor([e.num_sampled for e in episodes])
        weights = token_weights(trl.loss_type, lengths, trl.max_completion_length, unused)
        prompt_of = [prompt for prompt, group in zip(batch.prompts, batch.groups, strict=True) for _ in group.episodes]
        samples = [
            Sample(
                prompt.ids if row.prompt_ids is None else row.prompt_ids,
                row.ids, row.logprobs, float(advantage), float(weight), bool(masked), row.mask,
            )
            for prompt, episode, advantage, weight, masked in zip(
                prompt_of, episodes, batch.advantages.advantages, weights, unused, strict=True
            )
            for row in episode.rows or (_NO_ROW,)
        ]  # fmt: skip
        mine = split(samples, self._ranks.size, self._plan.gradient_accumulation_steps)[self._ranks.rank]
        return [collate(samples) for samples in mine]


_NO_ROW = Row(np.empty(0, np.int32), np.empty(0, np.float32), ())
"""Stands for an episode that failed before it sampled anything."""
