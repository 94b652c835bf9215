"""The terminal: the live view on a TTY, otherwise two lines per log: the step, and what bounded it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from rlx.learner.watch.live import SERVICE_LOG, LiveView
from rlx.learner.watch.pace import Pace, clock
from rlx.learner.watch.report import RunFiles
from rlx.wire import GroupResult

_NEWS = ("checkpoint", "service_lost", "service_back", "run_failed")
"""Events that the live view shows, with all that begin with `worker_`; the others are printed, or come at every step."""


class ProgressReport(TrainerCallback):
    """Shows and records what the trainer logs; on rank 0 only. `workers`: see `LiveView`."""

    def __init__(
        self, console: Console, files: RunFiles, workers: Callable[[], Sequence[Mapping[str, Any]]] | None = None
    ):
        self._console, self._files, self._workers = console, files, workers
        self._pace = Pace(0, 0)
        self._live: LiveView | None = None
        files.listeners.append(self._tell)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pace = Pace(state.global_step, state.max_steps)
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            log = os.environ.get(SERVICE_LOG)
            self._live = LiveView(self._console, self._pace, self._workers, Path(log) if log else None)
            self._live.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pace.reached(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self._files.metrics(state.global_step, {k: v for k, v in logs.items() if k != "bottleneck_line"})
        if self._live is not None:
            self._live.step(logs["reward"], measures(logs), time_split(logs), logs["bottleneck"])
        else:
            self._console.print(
                f"step {state.global_step}/{state.max_steps}  {summary(logs)}  left {clock(self._pace.left_s or 0)}"
                f"\n    {logs['bottleneck_line']}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back; also called when training fails."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _tell(self, kind: str, record: Mapping[str, Any]) -> None:
        live = self._live  # which `stop` may take away meanwhile
        if live is not None and kind == "events" and record["kind"].startswith(("worker_", *_NEWS)):
            live.tell(record["text"], "checkpoint" if record["kind"] == "checkpoint" else "")


_NOT_EXACT = "The rollout function returned other tokens or text than it sampled (docs/guides/rollouts.md)."


class FailureNotes:
    """Says the first failure of each reward function and each way that an episode can fail, once, with its cause."""

    def __init__(self, console: Console):
        self._console = console
        self._said: set[str] = set()

    def look(self, groups: list[GroupResult]) -> None:
        for group in groups:
            for reward in group.rewards:
                if reward.outcome != "ok":
                    self._say(
                        f"{reward.name}: {reward.outcome}", f"{reward.failed} completions have no reward", reward.error
                    )
            for episode in group.episodes:
                if not episode.scorable:
                    self._say(f"episode {episode.status}", "it is left out of its group", episode.error)
                elif not episode.exact:
                    self._say("episode not exact", "what was sampled is trained, whatever was returned", _NOT_EXACT)

    def _say(self, what: str, consequence: str, cause: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._console.print(
                f"note: {what}; {consequence}; said once, counted in metrics.jsonl. {cause}",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip


def summary(logs: Mapping[str, Any]) -> str:
    """reward, KL, length, and what training waited for in the step's time, in one line."""
    reward = logs["reward"]
    shown = "reward none, nothing to learn from" if math.isnan(reward) else f"reward {reward:.3f}"
    return f"{shown}  {measures(logs)}  {time_split(logs)}"


def measures(logs: Mapping[str, Any]) -> str:
    """What else is known of the step's completions."""
    unscored = logs["frac_reward_none"]
    parts = [f"({unscored:.0%} without)"] if 0 < unscored < 1 else []
    parts.append(f"len {logs['completions/mean_length']:.1f}")
    if "kl" in logs:
        parts.append(f"kl {logs['kl']:.4f}")
    return "  ".join(parts)


def time_split(logs: Mapping[str, Any]) -> str:
    return (
        f"{logs['perf/step_s']:.2f} s = rollouts {logs['perf/rollout_wait_s']:.2f} + train {logs['perf/fwd_bwd_s']:.2f}"
        f" + publish {logs['perf/weight_sync_wait_s']:.2f}"
    )
