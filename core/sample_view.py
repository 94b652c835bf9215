"""`rlx samples OUT`: samples in a terminal, or as JSON lines. Reading and choosing them is `rlx.samples`.

Text from a model is data. What could steer a terminal or hide there is shown as an escape (`visible`), and every line
of it stands behind a bar, so that no text can pass for what rlx says about it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from rlx.episode import CONTEXT
from rlx.errors import DatasetError
from rlx.samples import DEFAULT_LIMIT, UNSAFE, Query, Reader, Sample, chosen, samples_files

_HEAD, _TAIL, _HEAD_LINES, _TAIL_LINES, _SLACK = 2600, 1400, 40, 20, 200
_FIRST_MESSAGES, _LAST_MESSAGES = 12, 8
_VALUE = 300
_STEP_REWARDS = 20
_NOT_ASCII = re.compile(r"[^\x20-\x7e]")


def samples_main(out: Path, query: Query, as_json: bool = False, full: bool = False) -> int:
    """Print what `query` chooses to stdout, notes to stderr. DatasetError where nothing is to be shown."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    notes = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    shown = 0
    try:
        newest, *older = samples_files(out)
        reader = Reader(newest, older)
        for sample, line in chosen(reader, query):
            shown += 1
            if as_json:
                console.file.write(json_line(line))
            else:
                show(console, sample, full)
        console.file.flush()
    except BrokenPipeError:
        console.on_broken_pipe()
    except OSError as error:
        raise DatasetError(f"{error.filename or f'reading {out} or writing'}: {error.strerror}.") from error
    for note in reader.notes(shown):
        notes.print(f"note: {note}")
    if not shown:
        raise reader.nothing(query)
    if shown == DEFAULT_LIMIT and query.counts == (None, None, None):
        notes.print(f"note: these are the newest {shown}; --limit N shows more, --limit 0 all")
    return 0


def json_line(line: bytes) -> str:
    """The record as it was saved, in ASCII: whatever is not stands within strings, and is escaped there."""
    text = line.decode().strip().replace("\r", " ").replace("\t", " ")
    return _NOT_ASCII.sub(lambda match: json.dumps(match[0])[1:-1].replace("\x7f", "\\u007f"), text) + "\n"


def visible(text: str, style: str = "") -> Text:
    """`text` for a terminal: what would steer it stands as an escape, in reverse video."""
    result, at = Text(style=style), 0
    for match in UNSAFE.finditer(text):
        result.append(text[at : match.start()])
        result.append(match[0].encode("unicode_escape").decode(), style="reverse")
        at = match.end()
    return result.append(text[at:])


def _one_line(text: str, style: str = "") -> Text:
    return visible(text.replace("\n", "\\n"), style)


def shortened(text: str, full: bool) -> Text:
    """`text` made visible; unless `full`, of a long one the beginning and the end."""
    head = "\n".join(text[:_HEAD].split("\n")[:_HEAD_LINES])
    tail = "\n".join(text[-_TAIL:].split("\n")[-_TAIL_LINES:])
    left_out = len(text) - len(head) - len(tail)
    if full or left_out <= _SLACK:
        return visible(text)
    note = f"\n[… {left_out:,} of {len(text):,} characters left out; --full shows them …]\n"
    return Text.assemble(visible(head), (note, "yellow"), visible(tail))


def show(console: Console, sample: Sample, full: bool) -> None:
    """One sample: where it is from, what it got, then prompt, conversation and error; every line of text from the run
    stands behind a bar, a thick one where the model wrote it."""
    title = f"━━ step {sample.step} · group {sample.key} · sample {sample.index} ━━"
    console.print(_one_line(title, "bold"))
    for line in _facts(sample, full):
        console.print(_one_line(line))
    _messages(console, sample.prompt, "prompt", full)
    messages = sample.messages
    if not isinstance(messages, list) or all(m.get("role") != "assistant" for m in messages):
        _block(console, "sampled", sample.completion, full, sampled=True)
    if isinstance(messages, list) or messages not in (None, sample.completion):
        _messages(
            console, messages or "", "observation" if isinstance(messages, list) else "shown to the rewards", full
        )
    for name, values in (("extra", sample.extra), ("columns", sample.columns)):
        if values:
            _block(console, name, "\n".join(f"{key}: {_value(value, full)}" for key, value in values.items()), full)
    if sample.error:
        _block(console, "error", sample.error, full, style="red")
    console.print()


def _facts(sample: Sample, full: bool) -> Iterator[str]:
    versions = sample.versions()
    context = versions.pop(CONTEXT, 0)
    by_version = ", ".join(f"{n} of version {version}" for version, n in sorted(versions.items()))
    yield (
        f"{sample.status}, {sample.turns} turn{'s' * (sample.turns != 1)}, reward {_number(sample.reward())}, "
        f"advantage {_number(sample.advantage)}, {sample.worker or 'unknown worker'}"
    )
    yield f"tokens: sampled {by_version or 'none'}; context after the prompt {context}" + (
        f"; {len(sample.rows)} training rows" if len(sample.rows) > 1 else ""
    )
    if not sample.exact:
        yield "not exact: the rollout function hides which tokens it sampled"
    if sample.rewards:
        yield "rewards: " + ", ".join(f"{name} {_number(value)}" for name, value in sample.rewards.items())
    if sample.step_rewards:
        given = [
            f"{s.name} {_number(s.value)}" + f" (turn {s.turn})" * (s.turn is not None) for s in sample.step_rewards
        ]
        left_out = 0 if full else max(0, len(given) - _STEP_REWARDS)
        more = f" … and {left_out:,} more" if left_out else ""
        yield "step rewards: " + ", ".join(given[: len(given) - left_out]) + more


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"


def _value(value: Any, full: bool) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if full or len(text) <= _VALUE else f"{text[:_VALUE]} … {len(text) - _VALUE:,} more characters"


def _messages(console: Console, messages: str | Sequence[Mapping[str, Any]], label: str, full: bool) -> None:
    """Prompt or conversation, message by message. In a conversation the assistant's were sampled."""
    if isinstance(messages, str):
        return _block(console, label, messages, full)
    left_out = 0 if full else max(0, len(messages) - _FIRST_MESSAGES - _LAST_MESSAGES)
    turn = 0
    for place, message in enumerate(messages):
        role = str(message.get("role", "no role"))
        sampled = label != "prompt" and role == "assistant"
        turn += sampled
        if 0 <= place - _FIRST_MESSAGES < left_out:
            if place == _FIRST_MESSAGES:
                console.print(
                    f"[… {left_out:,} of {len(messages):,} messages left out; --full shows them …]", style="yellow"
                )
            continue
        _block(console, f"sampled, turn {turn}" if sampled else f"{label}: {role}", _content(message), full, sampled)


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    parts = content if isinstance(content, list) else [] if content is None else [content]
    texts = [part.get("text", part) if isinstance(part, dict) else part for part in parts]
    lines = [text if isinstance(text, str) else json.dumps(text, ensure_ascii=False) for text in texts]
    others = {name: value for name, value in message.items() if name not in ("role", "content") and value is not None}
    return "\n".join([*lines, *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in others.items())])


def _block(console: Console, label: str, content: str, full: bool, sampled: bool = False, style: str = "dim") -> None:
    text = shortened(content, full) if content else Text("(nothing)", "italic")
    lines = (
        text.wrap(console, max(20, console.width - 2)) if console.is_terminal else text.split("\n", allow_blank=True)
    )
    style = "green" if sampled else style
    bar = Text("┃ " if sampled else "│ ", style)
    console.print(_one_line(label, f"bold {style}"))
    console.print(Text("\n").join(bar + line for line in lines))
