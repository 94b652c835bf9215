"""What a run leaves to read: metrics, samples, evals, events and spans as NAME.jsonl, learning_curve.png, and the
terminal's lines.

A resumed run goes on in the files after dropping what lies behind its checkpoint; only its events all stay, as they
happened. Not here: writing them (`records.py`), what the events and spans are (`journal.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlx.episode import Row
from rlx.learner.incoming.data import Prompt
from rlx.learner.incoming.evaluation import Evaluation
from rlx.learner.incoming.stream import StepBatch
from rlx.learner.watch.records import DEFAULT_MAX_BYTES, Make, Record, RecordFiles
from rlx.wire import GroupResult, row_json

_FLUSH_S = 10.0
_UNTRAINED = np.empty(0, np.float32)


class RunFiles:
    """The files of one run in `output_dir`, which is created here. `first_step`: where this run begins. Every record is
    written by a thread (`records.py`): calls return at once, and none raises because of a disk. Each of `listeners` is
    told every record, in that thread: its file (metrics, samples, evals, events, spans) and what it has."""

    def __init__(
        self,
        output_dir: Path,
        first_step: int,
        max_bytes: int = DEFAULT_MAX_BYTES,
        say: Callable[[str], None] = lambda _: None,
    ):
        output_dir.mkdir(parents=True, exist_ok=True)
        self.output_dir, self.records = output_dir, RecordFiles(output_dir, max_bytes, say)
        self.listeners = self.records.listeners
        for name in ("metrics", "samples", "spans"):
            self.records.keep_to(name, first_step)
        self.records.keep_to("evals", first_step - 1)  # that of `first_step` is taken after its checkpoint, again
        self.records.keep_to("events", None if first_step else -1)

    def metrics(self, step: int, values: Mapping[str, float | str]) -> None:
        record = {"step": step, "time": time.time(), **values}
        self.records.put("metrics", lambda: [record])

    def samples(self, batch: StepBatch, count: int, logprobs: Mapping[int, list[np.ndarray]]) -> None:
        """The first `count` episodes of a step, spread over its groups; `logprobs` as of `sample_records`."""
        self.records.put("samples", lambda: sample_records(batch, count, logprobs))

    def evaluation(self, result: Evaluation) -> None:
        self.records.put("evals", lambda: [asdict(result)])

    def event(self, record: Record) -> None:
        self.records.put("events", lambda: [record])

    def service_events(self, records: list[Record]) -> None:
        self.records.put("events", lambda: records)

    def events(self) -> list[Record]:
        """The records of events.jsonl."""
        return self._read("events")

    def spans(self, make: Make) -> None:
        self.records.put("spans", make)

    def flush(self) -> None:
        """Have all that was put on the disk, as before a checkpoint counts; goes on without that where it takes long."""
        self.records.flush(_FLUSH_S)

    def close(self) -> None:
        self.records.close(_FLUSH_S)

    def evaluations(self) -> list[Record]:
        """The records of evals.jsonl: this run's, and those of the run that it resumed."""
        return self._read("evals")

    def learning_curve(self) -> Path:
        """Mean reward per step and held-out reward, as a PNG."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        rows, evals = self._read("metrics"), self.evaluations()
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        axes.plot(
            [r["step"] for r in rows],
            [_number(r["reward"]) for r in rows],
            label="training prompts",
            color="#4878a8",
            alpha=0.8,
        )
        if evals:
            axes.plot(
                [e["step"] for e in evals],
                [_number(e["reward"]) for e in evals],
                "o-",
                label="held-out prompts",
                color="#c8553d",
            )
        axes.set(xlabel="optimizer step", ylabel="mean reward", title=self.output_dir.name)
        axes.grid(alpha=0.3)
        axes.legend()
        path = self.output_dir / "learning_curve.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        return path

    def _read(self, name: str) -> list[Record]:
        self.flush()
        return list(self.records.read(name))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def sample_records(batch: StepBatch, count: int, logprobs: Mapping[int, list[np.ndarray]]) -> list[Record]:
    """The first `count` episodes of a step, spread over its groups, in the order of those. `logprobs`: the learner's, as
    `RolloutStream.shown_logprobs` gives them; empty where the step was not trained."""
    advantages = batch.advantages.advantages.tolist()
    size = len(batch.groups[0].episodes)
    return [
        _sample(
            batch.step + 1,
            batch.prompts[place // size],
            batch.groups[place // size],
            place % size,
            logprobs.get(place, []),
        )
        | {"advantage": advantages[place]}
        for place in batch.shown(count)
    ]


def _sample(step: int, prompt: Prompt, group: GroupResult, index: int, logprobs: list[np.ndarray]) -> Record:
    e = group.episodes[index]
    conversation = {} if e.completion is None else {"messages": e.completion}
    return {
        "step": step,
        "key": group.key,
        "index": index,
        "prompt": prompt.prompt,
        "completion": e.text,
        **conversation,
        "status": e.status,
        "turns": e.turns,
        "exact": e.exact,
        "rows": [_row(row, own) for row, own in zip(e.rows, chain(logprobs, repeat(_UNTRAINED)), strict=False)],
        "rewards": {r.name: float(r.values[index]) for r in group.rewards},
        "step_rewards": [asdict(step) for step in e.step_rewards],
        "extra": {**e.extra, **{column: values[index] for r in group.rewards for column, values in r.extra.items()}},
        "error": e.error,
        "columns": dict(prompt.columns),
        "worker": group.worker,
        **_times(group),
    }


def _row(row: Row, logprobs: np.ndarray) -> Record:
    """With the learner's log-probabilities beside the worker's, None for context too, where the row was trained."""
    if not len(logprobs):
        return row_json(row)
    own = (round(value, 6) for value in logprobs.tolist())
    return row_json(row) | {"learner_logprobs": [next(own) if sampled else None for sampled in row.mask]}


def _times(group: GroupResult) -> Record:
    """Seconds of each part, and when it was over by the service's clock."""
    timings = {"generation_s": round(group.generation_s, 4), "reward_s": round(group.reward_s, 4)}
    if (times := group.times) is None:
        return {"timings": timings}
    return {"timings": {"queued_s": round(times.placed - times.received, 4)} | timings, "group_times": asdict(times)}


def evaluation_line(result: Evaluation) -> str:
    """Mean rewards and pass@k in one line."""
    rewards = "  ".join(f"{name} {value:.3f}" for name, value in result.rewards.items())
    passed = "  ".join(f"pass@{k} {value:.3f}" for k, value in result.pass_at_k.items())
    without = f", {result.num_unscored} completions without reward" if result.num_unscored else ""
    return (
        f"evaluation after step {result.step}: {rewards}  {passed}  ({result.num_prompts} held-out prompts × "
        f"{result.num_generations}, weight version {result.weight_version}, {result.seconds:.1f} s{without})"
    )


def evaluation_table(evaluations: list[dict[str, Any]]) -> Table:
    """First against last evaluation, of the records of evals.jsonl: a row for each reward function."""
    first, last = evaluations[0], evaluations[-1]
    table = Table(title=f"held-out prompts: {last['num_prompts']} × {last['num_generations']}")
    for column in ("", f"before (step {first['step']})", f"after (step {last['step']})", "change"):
        table.add_column(column, justify="left" if not column else "right")
    rows = [(name, first["rewards"].get(name), value) for name, value in last["rewards"].items()]
    if len(rows) > 1:
        rows.append(("reward, weighted", first["reward"], last["reward"]))
    passed = first.get("pass_at_k", {})  # a file of an older version has none
    rows += [(f"pass@{k}", passed.get(k), value) for k, value in last.get("pass_at_k", {}).items()]
    rows.append(("tokens per completion", first["mean_length"], last["mean_length"]))
    for name, *values in rows:
        before, after = map(_number, values)
        table.add_row(name, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    return table


def print_samples(console: Console, batch: StepBatch, count: int) -> None:
    """A few completions as text, each with its reward."""
    for place in range(min(count, len(batch.groups))):
        group, prompt = batch.groups[place], batch.prompts[place].prompt
        asked = prompt if isinstance(prompt, str) else prompt[-1].get("content", "")
        rewards = "  ".join(f"{r.name} {r.values[0]:.3g}" for r in group.rewards)
        console.print(
            f"    {asked!r:.200} → {group.episodes[0].text!r:.400}   {rewards}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
