"""Every series that the gateway exports, at `GET /metrics` and through Ray's metrics, and what the shipped Grafana
dashboards draw: one table.

Names are Prometheus's: a unit at the end, `_total` for counters. Labels are few and bounded: `worker`, `state`,
`outcome`, `kind`, and `function`, of which at most MAX_FUNCTIONS are kept. Those with a `key` are the learner's: the
gateway has them from the newest record that the learner sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from rlx.episode import Status

Origin = Literal["service", "learner", "rewards", "envs"]
MAX_FUNCTIONS = 32


@dataclass(frozen=True)
class Series:
    """`labels`: names of its labels. `key`: where the learner's line of metrics.jsonl (of evals.jsonl for EVAL_REWARD) has
    the value; `{function}` in it is the label."""

    name: str
    help: str
    origin: Origin = "service"
    labels: tuple[str, ...] = ()
    key: str = ""

    @property
    def kind(self) -> Literal["counter", "gauge"]:
        return "counter" if self.name.endswith("_total") else "gauge"


class Reading(NamedTuple):
    """The value of a series now; `labels` in the order of the series'."""

    series: Series
    labels: tuple[str, ...]
    value: float


_WORKER = ("worker",)
_SERVICE = (
    Series("rlx_workers", "Workers in each state; those in state ready get work", labels=("state",)),
    Series("rlx_weight_version", "Version of the newest weights, in optimizer steps of the learner"),
    Series("rlx_groups_running", "Prompt groups that the service has accepted and not finished"),
    Series("rlx_groups_waiting", "Prompt groups and single requests that wait for a worker with room"),
    Series("rlx_queue_age_seconds", "How long the oldest of them has waited"),
    Series(
        "rlx_groups_total",
        "Prompt groups by how they ended: ok, failed, or cancelled by the learner",
        labels=("outcome",),
    ),
    Series("rlx_generation_seconds_total", "Time that finished groups took to generate, all episodes of each together"),
    Series("rlx_weight_updates_total", "Weight updates that were committed"),
    Series("rlx_weight_update_transfer_seconds", "Time that the bytes of the last weight update took to come"),
    Series("rlx_weight_update_commit_seconds", "Time until the last worker had the last weight update"),
    Series("rlx_weight_update_pause_seconds", "The longest that one worker did not generate for the last weight update"),
    Series("rlx_weight_update_bytes", "Bytes of the last weight update"),
    Series("rlx_service_events_total", "What happened to the workers, by kind of event", labels=("kind",)),
    Series("rlx_worker_up", "1 while the worker gets work", labels=_WORKER),
    Series("rlx_worker_weight_version", "Version of the worker's weights", labels=_WORKER),
    Series("rlx_worker_sequences_in_flight", "Sequences that the router has given the worker", labels=_WORKER),
    Series("rlx_worker_sequences_waiting", "Sequences of those that wait inside the engine", labels=_WORKER),
    Series("rlx_worker_sequences_limit", "Sequences that the router gives the worker at most", labels=_WORKER),
    Series("rlx_worker_kv_cache_usage_ratio", "Share of the key-value cache in use", labels=_WORKER),
    Series("rlx_worker_token_age_seconds", "Time since the worker last generated a token", labels=_WORKER),
    Series("rlx_worker_generated_tokens_total", "Tokens that the engine has generated", labels=_WORKER),
    Series("rlx_worker_preemptions_total", "Sequences that the engine threw out of a full cache", labels=_WORKER),
    Series("rlx_worker_busy_seconds_total", "Time in which the engine had at least one sequence", labels=_WORKER),
    Series("rlx_worker_restarts_total", "Times that the worker's process was started again", labels=_WORKER),
)  # fmt: skip
_REWARDS = (
    Series("rlx_reward_calls_total", "Groups that a reward function scored, by how the call ended", "rewards",
           ("function", "outcome")),
    Series("rlx_reward_seconds_total", "Time that the calls of a reward function took", "rewards", ("function",)),
    Series("rlx_reward_failed_completions_total", "Completions without a value because the call failed", "rewards",
           ("function",)),
    Series("rlx_scoring_seconds_total", "Time that finished groups took to be scored, waiting included", "rewards"),
)  # fmt: skip
_ENVS = (
    Series("rlx_episodes_total", "Episodes by how they ended", "envs", ("outcome",)),
    Series("rlx_episode_turns_total", "Turns of the policy in all episodes", "envs"),
    Series("rlx_episode_retries_total", "Episodes that began anew because their environment was lost", "envs"),
)


def _learner(name: str, key: str, help: str, labels: tuple[str, ...] = ()) -> Series:
    return Series(f"rlx_learner_{name}", help, "learner", labels, key)


_RATIO, _GAP = "sampling/importance_sampling_ratio", "sampling/sampling_logp_difference"
_LEARNER = (
    _learner("step", "step", "Optimizer steps done"),
    _learner("last_step_timestamp_seconds", "time", "When the last step ended, Unix time"),
    _learner("reward", "reward", "Mean weighted reward of the step's completions"),
    _learner("reward_std", "reward_std", "Its standard deviation"),
    _learner("reward_zero_std_ratio", "frac_reward_zero_std", "Share of completions whose whole group has one reward: nothing to learn"),
    _learner("reward_none_ratio", "frac_reward_none", "Share of completions without a reward"),
    _learner("function_reward", "rewards/{function}/mean", "Mean of one reward function", ("function",)),
    _learner("function_failed_completions", "rewards/{function}/failed",
             "Completions of the step for which a reward function failed", ("function",)),
    _learner("episodes_ratio", "episodes/{outcome}", "Share of the step's episodes by how they ended", ("outcome",)),
    _learner("loss", "loss", "Loss of the step"),
    _learner("grad_norm", "grad_norm", "Norm of the gradient before clipping"),
    _learner("learning_rate", "learning_rate", "Learning rate of the step"),
    _learner("entropy_nats", "entropy", "Mean entropy of the policy at the trained tokens"),
    _learner("kl_nats", "kl", "Mean KL to the reference model, with trl.beta > 0"),
    _learner("clip_low_ratio", "clip_ratio/low_mean", "Share of tokens clipped at the lower bound"),
    _learner("clip_high_ratio", "clip_ratio/high_mean", "Share of tokens clipped at the upper bound"),
    _learner("completion_tokens_mean", "completions/mean_length", "Mean length of the completions"),
    _learner("completion_tokens_max", "completions/max_length", "Length of the longest completion"),
    _learner("completions_clipped_ratio", "completions/clipped_ratio", "Share of completions cut off at their budget"),
    _learner("sampling_ratio_mean", f"{_RATIO}/mean", "Mean importance ratio of the learner's policy to the sampler's"),
    _learner("sampling_ratio_p95", f"{_RATIO}/p95", "Its 0.95-quantile"),
    _learner("sampling_ratio_max", f"{_RATIO}/max", "Its maximum"),
    _learner("sampling_ratio_truncated_ratio", f"{_RATIO}/truncated_fraction", "Share of ratios cut at the cap"),
    _learner("logprob_gap_mean_nats", f"{_GAP}/mean", "Mean |log p| difference of learner and sampler"),
    _learner("logprob_gap_p95_nats", f"{_GAP}/p95", "Its 0.95-quantile"),
    _learner("logprob_gap_max_nats", f"{_GAP}/max", "Its maximum"),
    _learner("step_seconds", "perf/step_s", "Time of the step, without evaluation"),
    _learner("rollout_wait_seconds", "perf/rollout_wait_s", "Of it, waiting for groups"),
    _learner("fwd_bwd_seconds", "perf/fwd_bwd_s", "Of it, forward, backward and optimizer"),
    _learner("weight_sync_wait_seconds", "perf/weight_sync_wait_s", "Of it, standing still for publishing"),
    _learner("weight_sync_seconds", "perf/weight_sync_s", "The publish that ended in the step, beside training or not"),
    _learner("weight_sync_snapshot_seconds", "perf/weight_sync_snapshot_s", "Before it, copying the parameters"),
    _learner("weight_sync_transfer_seconds", "perf/weight_sync_transfer_s", "Of the publish, sending"),
    _learner("weight_sync_pause_seconds", "perf/weight_sync_pause_s", "Of the publish, the longest pause of a worker"),
    _learner("group_generation_seconds", "rollout/generation_s", "Mean time that the step's groups were generated in"),
    _learner("group_reward_seconds", "rollout/reward_s", "Mean time that the step's groups were scored in"),
    _learner("generated_tokens_per_second", "rollout/generated_tok_s", "Sampled tokens that arrived, per second"),
    _learner("discarded_tokens", "rollout/discarded_tokens", "Tokens of the step that were sampled for nothing"),
    _learner("requeued_groups", "rollout/requeued_groups", "Groups of the step that were asked for again"),
    _learner("filtered_groups", "rollout/filtered_groups", "Groups of the step that were left out"),
    _learner("worker_busy_ratio", "rollout/worker_busy", "Mean share of the step in which a worker had a sequence"),
    _learner("staleness_mean_steps", "sample/staleness_mean", "Mean age of the trained samples, in weight versions"),
    _learner("staleness_max_steps", "sample/staleness_max", "The greatest"),
    _learner("age_in_flight_seconds", "sample/age_in_flight_s", "Mean time of the groups from request to arrival"),
    _learner("age_in_queue_seconds", "sample/age_in_queue_s", "Mean time of the groups from arrival to training"),
    _learner("weights_sent_bytes", "weights/bytes_sent", "Bytes that the last publish sent"),
    _learner("weights_changed_ratio", "weights/changed_fraction", "Share of the weights that changed with it"),
)  # fmt: skip
EVAL_REWARD = _learner("eval_reward", "reward", "Mean weighted reward of the last evaluation, on held-out prompts")
CATALOGUE: tuple[Series, ...] = (*_SERVICE, *_REWARDS, *_ENVS, *_LEARNER, EVAL_REWARD)
BY_NAME: Mapping[str, Series] = {series.name: series for series in CATALOGUE}


def learner_readings(record: Mapping[str, Any]) -> Iterator[Reading]:
    """What a line of metrics.jsonl says, where it has a number; of functions the first MAX_FUNCTIONS."""
    for series in _LEARNER:
        for label, key in _keys(series, record):
            if (value := _number(record.get(key))) is not None:
                yield Reading(series, label, value)


def _keys(series: Series, record: Mapping[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """Labels and key of each value that `record` may have of `series`."""
    if series.labels == ("outcome",):
        return [((status,), series.key.format(outcome=status)) for status in get_args(Status)]
    if not series.labels:
        return [((), series.key)]
    before, after = series.key.split("{function}")
    names = [key[len(before) : -len(after)] for key in record if key.startswith(before) and key.endswith(after)]
    return [((name,), f"{before}{name}{after}") for name in names[:MAX_FUNCTIONS]]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
