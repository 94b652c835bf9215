"""Rank 0's connection to the service, put together from the configuration: client, publisher, evaluations, feed."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Callable
from functools import partial
from urllib.parse import urlsplit

import torch
from rich.console import Console
from torch import nn

from rlx.config import Config, Plan
from rlx.hosts import is_loopback
from rlx.learner.incoming.best import BestModel
from rlx.learner.incoming.courier import Waits
from rlx.learner.incoming.evaluation import Evaluation, Evaluator
from rlx.learner.incoming.feed import Feed
from rlx.learner.incoming.ledger import Ledger, Rules
from rlx.learner.incoming.recording import Batch, Recorder
from rlx.learner.incoming.requests import prompt_order, ticket_request
from rlx.learner.incoming.scored_groups import has_spread
from rlx.learner.incoming.stream import Fetched
from rlx.learner.job import Job
from rlx.learner.policy.checkpoints import ResumePoint
from rlx.learner.policy.model import rollout_dtype
from rlx.learner.watch.journal import Journal
from rlx.learner.watch.report import RunFiles, evaluation_line
from rlx.learner.weights.handoff import buffers_for
from rlx.learner.weights.parity import make_probe
from rlx.learner.weights.publish import Packed, Publisher
from rlx.rollout.auth import service_token
from rlx.rollout.client import MAX_IN_FLIGHT, PUBLISH, ClientTimeouts, RolloutClient

_MARGIN_S = 60.0
_MOST_CONNECTIONS = 4096


class Rollouts:
    """Publisher, evaluator and feed of one run, wired together around `client`. `close` ends them, the client last."""

    def __init__(
        self,
        job: Job,
        client: RolloutClient,
        files: RunFiles,
        journal: Journal,
        recorder: Recorder | None,
        call_ranks: Callable[[], None] = lambda: None,
    ):
        config, plan, resume, prompts, held_out = job.config, job.plan, job.resume, job.prompts, job.held_out
        self._client, self._recorder = client, recorder
        self.session = session = uuid.uuid4().hex[:12]
        self.publisher = Publisher(
            client,
            rollout_dtype(config),
            resume.weight_version if resume else 0,
            probe_ids=make_probe([prompt.ids for prompt in prompts]),
            transfer=config.async_.weight_transfer,
            lora_sync=config.lora_sync,
            call_ranks=call_ranks,
            buffers=buffers_for(config.base_url) if config.async_.weight_transfer == "auto" else None,
        )
        best = BestModel(config, job.tokenizer, files.output_dir, resumed=resume is not None)

        def on_evaluation(evaluation: Evaluation, packed: Packed) -> None:
            files.evaluation(evaluation)
            line = evaluation_line(evaluation)
            journal.evaluated(evaluation.step, line, evaluation.seconds, reward=evaluation.reward)
            best.consider(evaluation, packed)
            job.say(line)

        every = config.eval_steps
        self.feed = Feed(
            client,
            self.publisher,
            Evaluator(config, client, held_out, session) if held_out else None,
            make_ledger(config, plan, job.total_steps, resume),
            session,
            waits_of(config, len(held_out)),
            request_of=partial(ticket_request, config, plan, prompts, prompt_order(config, len(prompts)), session),
            has_spread=partial(has_spread, config),
            evaluates=lambda step: step in (0, job.total_steps) or (every is not None and step % every == 0),
            on_evaluation=on_evaluation,
            on_wait=say_waiting(config, job.console),
            patience_s=patience_s(config, len(held_out)),
            shares_cpu=not torch.cuda.is_available() and is_loopback(urlsplit(config.base_url).hostname),
            journal=journal,
        )

    def start(self) -> None:
        self.feed.start()

    def batch(self, step: int, model: nn.Module) -> Fetched:
        """The groups that `step` is the first to train on, recorded where that is asked for; `model` is its policy."""
        fetched = self.feed.batch(step, model)
        if self._recorder is not None and fetched.groups:
            self._recorder.write(Batch(step, fetched.tickets, fetched.groups, self.state()))
        return fetched

    def finish(self, model: nn.Module) -> None:
        self.feed.finish(model)

    def state(self) -> dict[str, object]:
        """What a checkpoint keeps."""
        return {"weight_version": self.publisher.version or 0, "ledger": self.feed.state()}

    def close(self) -> None:
        self.feed.close()
        self._client.close()


def make_ledger(config: Config, plan: Plan, total_steps: int, resume: ResumePoint | None) -> Ledger:
    keys = config.async_
    rules = Rules(
        groups_per_step=plan.prompts_per_batch,
        steps_per_batch=plan.steps_per_batch,
        total_steps=total_steps,
        max_staleness=keys.max_staleness,
        max_inflight_groups=keys.max_inflight_groups,
        max_requeues=keys.max_requeues,
        oversample=keys.oversample,
        dynamic_sampling=keys.dynamic_sampling,
        max_sampling_attempts=keys.max_sampling_attempts,
    )
    ledger = Ledger(rules, plan.next_batch(resume.step) if resume else 0)
    if resume and resume.ledger:
        ledger.restore(resume.ledger)
    return ledger


def waits_of(config: Config, num_held_out: int) -> Waits:
    """An evaluation's groups wait for a connection behind those of the training, hence two waves more."""
    waves = math.ceil(num_held_out / MAX_IN_FLIGHT) + 2
    return Waits(config.trl.vllm_server_timeout, waves * config.group_deadline_s)


def patience_s(config: Config, num_held_out: int) -> float:
    """Seconds that nothing at all may happen: more than each single thing that the feed waits for may take."""
    waits = waits_of(config, num_held_out)
    return (
        waits.service_s + waits.evaluation_s + PUBLISH * config.service.publish_timeout
        + config.group_deadline_s + _MARGIN_S
    )  # fmt: skip


def longest_step_s(config: Config, num_held_out: int) -> float:
    """Seconds that the other ranks wait for rank 0: for the service to start, or for a batch that is sampled as often
    as the keys allow."""
    keys = config.async_
    rounds = 2 + keys.max_requeues + (keys.max_sampling_attempts if keys.dynamic_sampling else 0)
    return rounds * patience_s(config, num_held_out)


def connect(config: Config, plan: Plan, console: Console) -> RolloutClient:
    """A client of a service that is up; waits for it, and says so."""
    groups = math.ceil(plan.prompts_per_batch * (config.async_.max_staleness + config.async_.oversample))
    client = RolloutClient(
        config.base_url,
        service_token(),
        ClientTimeouts(publish_s=config.service.publish_timeout),
        min(max(MAX_IN_FLIGHT, groups), _MOST_CONNECTIONS),
        direct=config.service.direct,
    )
    try:
        client.wait_until_ready(config.trl.vllm_server_timeout, say_waiting(config, console))
    except BaseException:  # whatever it was, nobody gets the client to close it
        client.close()
        raise
    return client


def say_waiting(config: Config, console: Console) -> Callable[[str], None]:
    """Prints what the service is waited for, each message once, and how to start it where there is none."""
    told = ""

    def waiting(message: str) -> None:
        nonlocal told
        start = f"    (to start it, type in another terminal: rlx vllm-serve {os.path.relpath(config.path)})"
        is_first = not told and message.startswith("nobody answers")
        for line in [f"waiting for the rollout service: {message}", *([start] if is_first else [])]:
            if message != told:
                console.print(line, highlight=False, markup=False, soft_wrap=True)
        told = message

    return waiting
