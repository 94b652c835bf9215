"""The terminal: a progress bar on a TTY, otherwise two lines per log: the step, and what bounded it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from rlx.learner.report import RunFiles
from rlx.wire import GroupResult


class ProgressReport(TrainerCallback):
    """Shows and records what the trainer logs; on rank 0 only."""

    def __init__(self, console: Console, files: RunFiles):
        self._console, self._files = console, files
        self._bar: Progress | None = None
        self._began, self._began_at = time.perf_counter(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began, self._began_at = time.perf_counter(), state.global_step
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
                TimeRemainingColumn(), TextColumn("{task.fields[line]}"), console=self._console,
            )  # fmt: skip
            self._bar.add_task("training", total=state.max_steps, completed=state.global_step, line="")
            self._bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self._files.metrics(state.global_step, {k: v for k, v in logs.items() if k != "bottleneck_line"})
        line = summary(logs)
        if self._bar is not None:
            line = f"{line}  {logs['bottleneck']}"
            self._bar.update(self._bar.task_ids[0], completed=state.global_step, line=line)
        else:
            done = state.global_step - self._began_at
            left = (time.perf_counter() - self._began) / max(done, 1) * (state.max_steps - state.global_step)
            self._console.print(
                f"step {state.global_step}/{state.max_steps}  {line}  left {_clock(left)}\n    {logs['bottleneck_line']}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back; also called when training fails."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


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
    reward, unscored = logs["reward"], logs["frac_reward_none"]
    parts = ["reward none, nothing to learn from" if math.isnan(reward) else f"reward {reward:.3f}"]
    if 0 < unscored < 1:
        parts.append(f"({unscored:.0%} without)")
    parts.append(f"len {logs['completions/mean_length']:.1f}")
    if "kl" in logs:
        parts.append(f"kl {logs['kl']:.4f}")
    parts.append(
        f"{logs['perf/step_s']:.2f} s = rollouts {logs['perf/rollout_wait_s']:.2f} + train {logs['perf/fwd_bwd_s']:.2f}"
        f" + publish {logs['perf/weight_sync_wait_s']:.2f}"
    )
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
