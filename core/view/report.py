"""`rlx report OUT`: one HTML file about a run, to hand to someone: no script, nothing from outside, ready to print."""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment
from markupsafe import Markup, escape
from pydantic import ValidationError

from rlx.errors import ConfigError
from rlx.samples import UNSAFE, Sample
from rlx.view.choose import Wanted, choose, texts_of
from rlx.view.curves import Point
from rlx.view.folder import FolderRun
from rlx.view.plot import Line, legend, number, plot
from rlx.view.state import History, Seen

_SAMPLES = 5
_EVENTS = 40
_LONGEST_TEXT = 3_000
_INDEX_S = 5.0
_FAILURES = ("reward_failure", "episode_failure", "run_failed", "worker_down", "service_lost")
_SUMMARY = {
    "reward": "reward", "kl": "KL", "entropy": "entropy", "completions/mean_length": "tokens per completion",
    "perf/step_s": "seconds a step", "rollout/generated_tok_s": "tokens generated a second",
}  # fmt: skip
_CURVES: dict[str, dict[str, str]] = {
    "Completion length": {"completions/mean_length": "mean", "completions/max_length": "longest"},
    "KL to the reference": {"kl": "KL"},
    "Entropy": {"entropy": "entropy"},
    "Loss": {"loss": "loss"},
    "Learning rate": {"learning_rate": "rate"},
    "Step time, s": {"perf/step_s": "step", "perf/rollout_wait_s": "waits for rollouts", "perf/fwd_bwd_s": "trains"},
    "Staleness, versions": {"sample/staleness_mean": "mean", "sample/staleness_max": "oldest"},
}
_FROM_ZERO = ("Completion length", "Learning rate", "Step time, s", "Staleness, versions")
_EXACT = ("Completion length", "Learning rate", "Staleness, versions")


def report_main(folder: Path, out: Path | None) -> int:
    """Write the report to `out`, default report.html in `folder`. ConfigError where there is nothing to report, or the
    file cannot be written."""
    run = FolderRun(folder)
    target = out or folder / "report.html"
    text = report(run)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        raise ConfigError(f"--out {target}: {error.strerror}. Name a file in a folder that can be written.") from error
    print(target)
    return 0


def report(run: FolderRun) -> str:
    """The HTML. ConfigError where the folder has nothing of a run."""
    standing = run.since(Seen())["run"]
    history, record = run.history(), run.run_record()
    if not history.curves.count and not history.evaluations and not record:
        raise ConfigError(f"{run.folder} has no metrics.jsonl with a whole record: there is nothing to report yet.")
    points = history.curves.points()
    style = Markup(_part("report.css"))
    return (
        _environment()
        .from_string(_part("report.html"))
        .render(
            name=run.name,
            run=standing,
            record=record,
            started=record.get("started"),
            summary=_summary(points),
            evaluation=_evaluation(history.evaluations),
            charts=list(_charts(points, history)),
            best=_samples(run, "best"),
            worst=_samples(run, "worst"),
            counts=Counter(str(event.get("kind", "event")) for event in history.events).most_common(),
            events=_telling(history.events),
            config=yaml.safe_dump(record["config"], sort_keys=False, allow_unicode=True)
            if record.get("config")
            else "",
            environment=list(_environment_of(record)),
            style=style,
            style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        )
    )


def shown(text: Any) -> Markup:
    """`text` as HTML, with what could hide or turn text around written out, such as U+202E."""
    parts, at, text = [], 0, str(text)
    for match in UNSAFE.finditer(text):
        codes = " ".join(f"U+{ord(character):04X}" for character in match[0][:20])
        parts += [escape(text[at : match.start()]), Markup('<span class="ctl">{}</span>').format(codes)]
        at = match.end()
    return Markup().join([*parts, escape(text[at:])])


def _environment() -> Environment:
    environment = Environment(autoescape=True)
    environment.filters |= {
        "shown": shown,
        "cut": _cut,
        "plain": _plain,
        "number": number,
        "moment": _moment,
        "asked": _asked,
    }
    return environment


def _part(name: str) -> str:
    return files("rlx.view").joinpath(name).read_text(encoding="utf-8")


def _plain(text: str) -> str:
    return UNSAFE.sub("\ufffd", text)


def _cut(text: Any) -> Markup:
    """Of a long text the beginning and the end."""
    text = str(text or "")
    if len(text) <= _LONGEST_TEXT:
        return shown(text) if text else Markup('<span class="soft">(nothing)</span>')
    half = _LONGEST_TEXT // 2
    left_out = Markup('<span class="soft">[… {} characters left out …]</span>').format(f"{len(text) - 2 * half:,}")
    return Markup("\n").join([shown(text[:half]), left_out, shown(text[-half:])])


def _moment(unix: Any) -> str:
    if not isinstance(unix, int | float) or not 0 <= unix < 1e11:
        return ""
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _asked(sample: Sample) -> list[tuple[str, str]]:
    if isinstance(sample.prompt, str):
        return [("prompt", sample.prompt)]
    return [(str(message.get("role", "prompt")), "\n".join(texts_of([message]))) for message in sample.prompt[-3:]]


def _summary(points: Sequence[Point]) -> list[tuple[str, float, float]]:
    """The first and the last value of what matters."""
    rows = []
    for key, label in _SUMMARY.items():
        if values := [point[key] for point in points if key in point]:
            rows.append((label, values[0], values[-1]))
    return rows


def _evaluation(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not evaluations:
        return None
    first, last = evaluations[0], evaluations[-1]
    rows = [("reward", first.get("reward"), last.get("reward"))]
    for part, label in (("rewards", "{}"), ("pass_at_k", "pass@{}")):
        known = last.get(part) if isinstance(last.get(part), dict) else {}
        before = first.get(part) if isinstance(first.get(part), dict) else {}
        rows += [(label.format(name), (before or {}).get(name), value) for name, value in (known or {}).items()]
    rows.append(("tokens per completion", first.get("mean_length"), last.get("mean_length")))
    return {
        "prompts": last.get("num_prompts"),
        "generations": last.get("num_generations"),
        "first_step": first.get("step"),
        "last_step": last.get("step"),
        "rows": [(name, _finite(a), _finite(b)) for name, a, b in rows],
    }


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _charts(points: Sequence[Point], history: History) -> Iterator[tuple[str, Markup, Markup]]:
    """Title, legend and drawing of every curve that there is."""
    told = history.evaluations
    rewards = [_line(points, "reward", "training prompts")]
    if told:
        steps = [_finite(record.get("step")) or 0.0 for record in told]
        rewards.append(Line("held-out prompts", steps, [_finite(record.get("reward")) for record in told], dots=True))
    functions = [
        key
        for key in dict.fromkeys(key for point in points for key in point)
        if key.startswith("rewards/") and key.endswith("/mean")
    ]
    all_lines = {
        "Reward": rewards,
        "Reward by function": [_line(points, key, key[len("rewards/") : -len("/mean")]) for key in functions],
        **{title: [_line(points, key, name) for key, name in names.items()] for title, names in _CURVES.items()},
    }
    for title, lines in all_lines.items():
        lines = [Line(_plain(line.name), line.xs, line.ys, line.dots) for line in lines]
        if drawing := plot(lines, title in _FROM_ZERO, title not in _EXACT):
            yield title, legend(lines), drawing


def _line(points: Sequence[Point], key: str, name: str) -> Line:
    return Line(name, [point["step"] for point in points], [point.get(key) for point in points])


def _samples(run: FolderRun, order: Any) -> list[Sample]:
    page = choose(run.samples, Wanted(order=order, limit=_SAMPLES), _INDEX_S)
    while page["indexed"] < 1:
        page = choose(run.samples, Wanted(order=order, limit=_SAMPLES), _INDEX_S)
    records = (run.samples.record(int(found["id"])) for found in page["samples"])
    return list(_valid(record for record in records if record is not None))


def _valid(records: Iterable[Mapping[str, Any]]) -> Iterator[Sample]:
    for record in records:
        try:
            yield Sample.model_validate(record)
        except ValidationError:  # a field that another program wrote
            continue


def _telling(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Failures first of all, and the newest of the others but publishes, in order of time."""
    known = [event for event in events if event.get("kind") != "publish"]
    failures = [event for event in known if event.get("kind") in _FAILURES][:_EVENTS]
    others = (
        [event for event in known if event.get("kind") not in _FAILURES][-(_EVENTS - len(failures)) :]
        if len(failures) < _EVENTS
        else []
    )
    return sorted([*failures, *others], key=lambda event: _finite(event.get("time")) or 0.0)


def _environment_of(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for label, key in (("Python", "python"), ("platform", "platform"), ("learner processes", "num_processes")):
        if record.get(key):
            yield label, str(record[key])
    versions = record.get("versions")
    yield from ((str(name), str(version)) for name, version in (versions.items() if isinstance(versions, dict) else ()))
