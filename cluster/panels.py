"""The Grafana dashboards that rlx ships, made from the catalogue of series: a panel cannot name one that is not there.

    python -m rlx.cluster.panels        writes cluster/dashboards/rlx-*.json, and docs/series.md in a checkout

Every query is of one source, the variable `$job`: `rlx`, the gateway's /metrics, or `ray`, Ray's endpoints, which have
the same series.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlx.series import BY_NAME, CATALOGUE, EVAL_REWARD

FOLDER = Path(__file__).parent / "dashboards"
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS, _HEIGHT = 3, 8
_WIDTH = 24 // _COLUMNS


@dataclass(frozen=True)
class Query:
    """PromQL with the series that it reads; `legend` in Grafana's form."""

    expression: str
    series: tuple[str, ...]
    legend: str


@dataclass(frozen=True)
class Panel:
    """`unit` is one of Grafana's names for units."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    stacked: bool = False


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    panels: tuple[Panel, ...]

    def to_json(self) -> dict[str, Any]:
        """As Grafana loads it."""
        return {
            "uid": self.uid,
            "title": self.title,
            "tags": ["rlx"],
            "schemaVersion": 38,
            "editable": True,
            "refresh": "10s",
            "time": {"from": "now-30m", "to": "now"},
            "templating": {"list": [_datasource(), _job()]},
            "panels": [_panel(panel, number) for number, panel in enumerate(self.panels)],
        }


def now(name: str, legend: str = "", total: bool = False) -> Query:
    """The value of a gauge, or its sum over all label values."""
    return _query("{}", (name,), legend, total)


def rate(name: str, legend: str = "", total: bool = False) -> Query:
    """How fast a counter grows, per second."""
    return _query("rate({}[$__rate_interval])", (name,), legend, total)


def mean(total: str, count: str, by: str = "", legend: str = "") -> Query:
    """Growth of counter `total` for each of counter `count`, by label `by`."""
    per = f" by ({by})" if by else ""
    parts = [f"sum{per} (rate({_selector(name)}[$__rate_interval]))" for name in (total, count)]
    return Query(" / ".join(parts), (total, count), legend or f"{{{{{by}}}}}")


def _query(form: str, names: tuple[str, ...], legend: str, total: bool) -> Query:
    expression = form.format(*map(_selector, names))
    labels = BY_NAME[names[0]].labels
    legend = legend or " ".join(f"{{{{{label}}}}}" for label in labels)
    return Query(f"sum({expression})" if total else expression, names, legend)


def _selector(name: str) -> str:
    return f'{BY_NAME[name].name}{{job="$job"}}'


def _of(*pairs: tuple[str, str]) -> tuple[Query, ...]:
    """Learner's gauges, each with its legend."""
    return tuple(now(f"rlx_learner_{name}", legend) for name, legend in pairs)


SERVICE = Dashboard("rlx-service", "rlx: service", (
    Panel("Generated tokens per second", "short", (
        rate("rlx_worker_generated_tokens_total", "all", total=True), rate("rlx_worker_generated_tokens_total"))),
    Panel("Sequences", "short", (
        now("rlx_worker_sequences_in_flight", "in flight", total=True),
        now("rlx_worker_sequences_waiting", "waiting inside the engines", total=True),
        now("rlx_worker_sequences_limit", "limit of the router", total=True))),
    Panel("Groups", "short", (
        now("rlx_groups_running", "running"), now("rlx_groups_waiting", "waiting for a worker"))),
    Panel("Age of the queue", "s", (now("rlx_queue_age_seconds", "the oldest in the queue"),)),
    Panel("Groups finished per second", "short", (rate("rlx_groups_total"),)),
    Panel("Busy share of each worker", "percentunit", (rate("rlx_worker_busy_seconds_total"),)),
    Panel("Key-value cache in use", "percentunit", (now("rlx_worker_kv_cache_usage_ratio"),)),
    Panel("Preemptions per second", "short", (rate("rlx_worker_preemptions_total"),)),
    Panel("Sequences in flight by worker", "short", (now("rlx_worker_sequences_in_flight"),)),
    Panel("Weight version", "none", (now("rlx_weight_version", "newest"), now("rlx_worker_weight_version"))),
    Panel("Last weight update", "s", (
        now("rlx_weight_update_transfer_seconds", "transfer"),
        now("rlx_weight_update_commit_seconds", "until the last worker had it"),
        now("rlx_weight_update_pause_seconds", "longest pause of a worker"))),
    Panel("Size of the last weight update", "bytes", (now("rlx_weight_update_bytes", "bytes"),)),
    Panel("Weight updates per second", "short", (rate("rlx_weight_updates_total", "committed"),)),
    Panel("Workers by state", "none", (now("rlx_workers"),), stacked=True),
    Panel("Worker gets work", "none", (now("rlx_worker_up"),)),
    Panel("Restarts of each worker", "none", (now("rlx_worker_restarts_total"),)),
    Panel("Events", "none", (now("rlx_service_events_total"),)),
    Panel("Since the last token", "s", (now("rlx_worker_token_age_seconds"),)),
))  # fmt: skip

LEARNER = Dashboard("rlx-learner", "rlx: learner", (
    Panel("Reward", "short", _of(("reward", "training prompts"), ("eval_reward", "held-out prompts"))),
    Panel("Reward functions", "short", (now("rlx_learner_function_reward"),)),
    Panel("Spread of the rewards", "short", _of(
        ("reward_std", "standard deviation"), ("reward_zero_std_ratio", "share of completions in groups without any"),
        ("reward_none_ratio", "share of completions without a reward"))),
    Panel("Entropy and KL", "short", _of(("entropy_nats", "entropy"), ("kl_nats", "KL to the reference"))),
    Panel("Lengths", "short", _of(
        ("completion_tokens_mean", "mean"), ("completion_tokens_max", "longest"))),
    Panel("Completions cut off", "percentunit", _of(("completions_clipped_ratio", "at their budget"))),
    Panel("Importance ratio", "short", _of(
        ("sampling_ratio_mean", "mean"), ("sampling_ratio_p95", "0.95-quantile"), ("sampling_ratio_max", "max"))),
    Panel("Gap of log p, learner and sampler", "short", _of(
        ("logprob_gap_mean_nats", "mean"), ("logprob_gap_p95_nats", "0.95-quantile"), ("logprob_gap_max_nats", "max"))),
    Panel("Clipped tokens", "percentunit", _of(
        ("clip_low_ratio", "low"), ("clip_high_ratio", "high"), ("sampling_ratio_truncated_ratio", "ratio capped"))),
    Panel("Where a step's time goes", "s", _of(
        ("fwd_bwd_seconds", "forward and backward"), ("rollout_wait_seconds", "waiting for groups"),
        ("weight_sync_wait_seconds", "waiting for publishing")), stacked=True),
    Panel("Time of a step", "s", _of(("step_seconds", "step"))),
    Panel("Time of a publish", "s", _of(
        ("weight_sync_snapshot_seconds", "snapshot before it"), ("weight_sync_seconds", "all"), ("weight_sync_transfer_seconds", "transfer"),
        ("weight_sync_pause_seconds", "pause of a worker"))),
    Panel("Staleness", "short", _of(("staleness_mean_steps", "mean"), ("staleness_max_steps", "max"))),
    Panel("Age of the groups", "s", _of(
        ("age_in_flight_seconds", "in flight"), ("age_in_queue_seconds", "waiting for their step"))),
    Panel("Tokens per second", "short", _of(("generated_tokens_per_second", "generated"))),
    Panel("Sampled for nothing, per step", "short", _of(
        ("discarded_tokens", "tokens discarded"), ("requeued_groups", "groups asked for again"),
        ("filtered_groups", "groups left out"))),
    Panel("Busy share of the workers", "percentunit", _of(("worker_busy_ratio", "mean"))),
    Panel("Weights sent", "bytes", _of(("weights_sent_bytes", "bytes"))),
    Panel("Weights changed", "percentunit", _of(("weights_changed_ratio", "share"))),
    Panel("Loss", "short", _of(("loss", "loss"))),
    Panel("Norm of the gradient", "short", _of(("grad_norm", "norm"))),
    Panel("Learning rate", "sci", _of(("learning_rate", "learning rate"))),
    Panel("Steps done", "none", _of(("step", "steps"))),
    Panel("Since the last step", "s", (
        Query(f"time() - {_selector('rlx_learner_last_step_timestamp_seconds')}",
              ("rlx_learner_last_step_timestamp_seconds",), "seconds"),)),
))  # fmt: skip

REWARDS = Dashboard("rlx-rewards", "rlx: rewards and environments", (
    Panel("Calls of reward functions per second", "short", (rate("rlx_reward_calls_total"),)),
    Panel("Time of a call", "s", (
        mean("rlx_reward_seconds_total", "rlx_reward_calls_total", by="function"),)),
    Panel("Completions without a value, per second", "short", (rate("rlx_reward_failed_completions_total"),)),
    Panel("Time to score a group, waiting included", "s", (
        Query(f"sum(rate({_selector('rlx_scoring_seconds_total')}[$__rate_interval])) / "
              f'sum(rate(rlx_groups_total{{job="$job", outcome="ok"}}[$__rate_interval]))',
              ("rlx_scoring_seconds_total", "rlx_groups_total"), "mean"),
        *_of(("group_reward_seconds", "as the learner saw it")))),
    Panel("Time to generate a group", "s", (
        Query(f"sum(rate({_selector('rlx_generation_seconds_total')}[$__rate_interval])) / "
              f'sum(rate(rlx_groups_total{{job="$job", outcome="ok"}}[$__rate_interval]))',
              ("rlx_generation_seconds_total", "rlx_groups_total"), "mean"),
        *_of(("group_generation_seconds", "as the learner saw it")))),
    Panel("Completions of the last step without a value", "none", (
        now("rlx_learner_function_failed_completions"),)),
    Panel("Episodes per second by how they ended", "short", (rate("rlx_episodes_total"),), stacked=True),
    Panel("Episodes of the last step", "percentunit", (now("rlx_learner_episodes_ratio"),), stacked=True),
    Panel("Turns of an episode", "short", (
        mean("rlx_episode_turns_total", "rlx_episodes_total", legend="mean"),)),
    Panel("Episodes begun anew, per second", "short", (rate("rlx_episode_retries_total", "retries"),)),
))  # fmt: skip

DASHBOARDS = (SERVICE, LEARNER, REWARDS)


def files() -> Mapping[str, str]:
    """Content by name, of every shipped dashboard."""
    return {f"{board.uid}.json": json.dumps(board.to_json(), indent=1) + "\n" for board in DASHBOARDS}


def series_page() -> str:
    """docs/series.md."""
    lines = [
        "# Series", "",
        "What `GET /metrics` of the gateway and, with `ray_` before the name, Ray's endpoints export: see",
        "[monitoring](guides/monitoring.md). Generated from `core/series.py` by `python -m rlx.cluster.panels`.",
    ]  # fmt: skip
    titles = {
        "service": "Service", "rewards": "Rewards", "envs": "Episodes and environments",
        "learner": "Learner: its newest step, once it has sent one",
    }  # fmt: skip
    for origin, title in titles.items():
        found = [series for series in CATALOGUE if series.origin == origin]
        columns = ["series", "labels", "what", *(["key of metrics.jsonl"] if origin == "learner" else [])]
        lines += ["", f"## {title}", "", _row(columns), _row(["---"] * len(columns))]
        for series in found:
            key = "`reward` of evals.jsonl" if series == EVAL_REWARD else f"`{series.key}`"
            cells = [f"`{series.name}`", ", ".join(f"`{label}`" for label in series.labels), series.help, key]
            lines.append(_row(cells[: len(columns)]))
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _panel(panel: Panel, number: int) -> dict[str, Any]:
    row, column = divmod(number, _COLUMNS)
    custom: dict[str, Any] = {"lineWidth": 1, "fillOpacity": 30 if panel.stacked else 0, "showPoints": "auto"}
    if panel.stacked:
        custom["stacking"] = {"mode": "normal"}
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": " ".join(f"{BY_NAME[name].help}." for name in dict.fromkeys(_names(panel))),
        "datasource": _SOURCE,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": query.expression, "legendFormat": query.legend}
            for index, query in enumerate(panel.queries)
        ],
    }  # fmt: skip


def _names(panel: Panel) -> list[str]:
    return [name for query in panel.queries for name in query.series]


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Source", "type": "datasource", "query": "prometheus", "refresh": 1}


def _job() -> dict[str, Any]:
    query = "label_values(rlx_weight_version, job)"
    return {
        "name": "job", "label": "Scraped from", "type": "query", "datasource": _SOURCE, "definition": query,
        "query": {"query": query, "refId": "jobs"}, "refresh": 2, "sort": 2,
        "current": {"text": "rlx", "value": "rlx"},
    }  # fmt: skip


if __name__ == "__main__":
    for name, content in files().items():
        (FOLDER / name).write_text(content)
    (FOLDER.parents[1] / "docs" / "series.md").write_text(series_page())
