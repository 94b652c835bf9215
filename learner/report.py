"""What a run leaves to read: metrics.jsonl, samples.jsonl, evals.jsonl, learning_curve.png, and the terminal's lines.

Files are append-only, one JSON object a line; a resumed run goes on in them after dropping what lies behind its
checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlx.learner.data import Prompt
from rlx.learner.evaluation import Evaluation
from rlx.learner.stream import StepBatch
from rlx.wire import GroupResult, row_json


class RunFiles:
    """The files of one run in `output_dir`, which is created here. `first_step`: where this run begins. Each of
    `listeners` is told every record that is written: the name of its file (metrics, samples, evals) and what it has."""

    def __init__(self, output_dir: Path, first_step: int):
        output_dir.mkdir(parents=True, exist_ok=True)
        self.output_dir = output_dir
        self.listeners: list[Callable[[str, dict[str, Any]], None]] = []
        for name in ("metrics", "samples"):
            _keep_to(self._path(name), first_step)
        _keep_to(self._path("evals"), first_step - 1)  # that of `first_step` is taken after its checkpoint, again

    def metrics(self, step: int, values: Mapping[str, float | str]) -> None:
        self._append("metrics", {"step": step, "time": time.time(), **values})

    def samples(self, batch: StepBatch, count: int) -> None:
        """The first `count` episodes of a step, spread over its groups."""
        advantages = batch.advantages.advantages.tolist()
        size = len(batch.groups[0].episodes)
        order = sorted(range(len(advantages)), key=lambda i: (i % size, i // size))[:count]
        for place in sorted(order):
            group = batch.groups[place // size]
            record = _sample(batch.step + 1, batch.prompts[place // size], group, place % size)
            self._append("samples", {**record, "advantage": advantages[place]})

    def evaluation(self, result: Evaluation) -> None:
        self._append("evals", asdict(result))

    def evaluations(self) -> list[dict[str, Any]]:
        """The records of evals.jsonl: this run's, and those of the run that it resumed."""
        return _read(self._path("evals"))

    def learning_curve(self) -> Path:
        """Mean reward per step and held-out reward, as a PNG."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        rows, evals = _read(self._path("metrics")), self.evaluations()
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

    def _path(self, name: str) -> Path:
        return self.output_dir / f"{name}.jsonl"

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with self._path(name).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(_without_nan(record), ensure_ascii=False, allow_nan=False) + "\n")
        for listener in self.listeners:
            listener(name, record)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]  # of bytes: text has more kinds of line ends


def _without_nan(value: Any) -> Any:
    """`value` as strict JSON has it: None for what is not a finite number."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _keep_to(path: Path, last_step: int) -> None:
    """Drop the records after `last_step`, and a last line that a crash cut off."""
    kept = []
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # no JSON, or cut within a character
                break
            if record["step"] <= last_step:
                kept.append(line)
    path.write_bytes(b"".join(line + b"\n" for line in kept))


def _sample(step: int, prompt: Prompt, group: GroupResult, index: int) -> dict[str, Any]:
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
        "rows": [row_json(row) for row in e.rows],
        "rewards": {r.name: float(r.values[index]) for r in group.rewards},
        "step_rewards": [asdict(step) for step in e.step_rewards],
        "extra": {**e.extra, **{column: values[index] for r in group.rewards for column, values in r.extra.items()}},
        "error": e.error,
        "columns": dict(prompt.columns),
        "worker": group.worker,
    }


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
