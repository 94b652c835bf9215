"""From a ticket to the request that is sent for it: which prompt it is, how its completions are sampled.

Both depend on the configuration and the ticket's number alone, so that every attempt at a ticket, and every process of
the run, means the same prompt. Not here: when a ticket may be sent (`ledger.py`), and sending it (`feed.py`).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import xxhash

from rlx.config import Config, Plan
from rlx.learner.incoming.data import Prompt
from rlx.wire import GroupRequest, Sampling


class PromptOrder:
    """Which prompt a ticket is: epoch after epoch, each a permutation of all prompts, without a gap between them."""

    def __init__(self, num_prompts: int, seed: int, shuffle: bool):
        self._num_prompts, self._seed, self._shuffle = num_prompts, seed, shuffle
        self._epoch_of = lru_cache(maxsize=4)(self._epoch)

    def at(self, ticket: int) -> int:
        """Index of the prompt of `ticket`, counted from 0."""
        epoch, within = divmod(ticket, self._num_prompts)
        return int(self._epoch_of(epoch)[within])

    def _epoch(self, epoch: int) -> np.ndarray:
        order = np.arange(self._num_prompts)
        return np.random.default_rng([self._seed, epoch]).permutation(order) if self._shuffle else order


def prompt_order(config: Config, num_prompts: int) -> PromptOrder:
    return PromptOrder(num_prompts, config.seed, config.trl.shuffle_dataset and config.shuffle_merged_datasets)


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


def request_of(config: Config, prompt: Prompt, key: str, step: int, n: int, seed_of: str) -> GroupRequest:
    """One prompt's request for `n` completions. The seed of its environments is made of the run's seed and `seed_of`."""
    return GroupRequest(
        key=key,
        prompt=prompt.prompt,
        prompt_ids=prompt.ids,
        num_generations=n,
        sampling=sampling_of(config),
        columns=prompt.columns,
        step=step,
        deadline_s=config.group_deadline_s,
        seed=xxhash.xxh64_intdigest(f"{config.seed}/{seed_of}".encode()) % 2**31,
    )


def requests_of(
    config: Config, prompts: list[Prompt], session: str, step: int, label: str, n: int
) -> list[GroupRequest]:
    """One request per prompt, with keys that name session, label, step and place: those of an evaluation."""
    places = [f"{label}{step}/{index}" for index in range(len(prompts))]
    return [
        request_of(config, prompt, f"{session}/{place}", step, n, place)
        for prompt, place in zip(prompts, places, strict=True)
    ]


def ticket_request(
    config: Config, plan: Plan, prompts: list[Prompt], order: PromptOrder, session: str, number: int, attempt: int
) -> GroupRequest:
    """The request of a ticket. Its seed is that of the ticket: the same for each attempt, and in each run."""
    step, n = number // plan.prompts_per_batch * plan.steps_per_batch, plan.num_generations
    key = f"{session}/{number}.{attempt}"
    return request_of(config, prompts[order.at(number)], key, step, n, str(number))
