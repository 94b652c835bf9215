"""`rlx samples`: the right samples, in the right order, from whole and broken files; and nothing steers the terminal."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tracemalloc
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlx import samples as samples_module
from rlx.errors import ConfigError, DatasetError
from rlx.sample_view import json_line, samples_main, show, visible
from rlx.samples import Query, Reader, Sample, chosen, lines_backwards, parse_steps


def record(step: int = 1, **changes: Any) -> dict[str, Any]:
    """As `rlx.learner.watch.report` writes it."""
    return {
        "step": step,
        "key": f"run/{step}/0",
        "index": 0,
        "prompt": [{"role": "user", "content": "17+37="}],
        "completion": "54",
        "status": "ok",
        "turns": 1,
        "exact": True,
        "rows": [{"ids": [5, 4, 2], "logprobs": [-0.5, -0.1, 0.0], "versions": [[step, 3]]}],
        "rewards": {"right": 1.0},
        "step_rewards": [],
        "extra": {},
        "error": "",
        "columns": {"answer": "54"},
        "worker": "rlx-rollout-0",
        "advantage": 0.5,
        **changes,
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def written(*records: dict[str, Any] | str) -> Path:
        lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) + "\n" for r in records]
        (tmp_path / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
        return tmp_path

    return written


def steps_of(folder: Path, **query: Any) -> list[int]:
    return [sample.step for sample, _ in chosen(Reader(folder / "samples.jsonl"), Query(**query))]


def shown(sample: dict[str, Any], full: bool = False, terminal: bool = False) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream, highlight=False, markup=False, emoji=False, soft_wrap=True,
        force_terminal=terminal, color_system="standard" if terminal else None,
    )  # fmt: skip
    show(console, Sample.model_validate(sample), full)
    return stream.getvalue()


def test_lines_come_backwards_whatever_the_blocks_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file"
    for text in (b"", b"\n", b"one", b"one\ntwo\n", b"\n\none\n\nlonger than a block\nthree", "é\n€€€\n".encode()):
        path.write_bytes(text)
        for block in (1, 2, 3, 7, 100):
            monkeypatch.setattr(samples_module, "_BLOCK", block)
            assert list(lines_backwards(path)) == text.split(b"\n")[::-1]


def test_a_line_beyond_the_limit_is_no_sample_and_takes_no_memory(
    tmp_path: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(samples_module, "_BLOCK", 1 << 14)
    monkeypatch.setattr(samples_module, "_LONGEST_LINE", 1 << 16)
    folder = write(record(1), record(2, completion="x" * (4 << 20)), record(3))
    reader = Reader(folder / "samples.jsonl")
    tracemalloc.start()
    found = [sample.step for sample, _ in chosen(reader, Query())]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found, reader.broken) == ([3, 1], 1)
    assert peak < 1 << 20


def test_the_newest_come_first_and_ten_of_them(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]):
    folder = write(*(record(step) for step in range(1, 15)))
    assert steps_of(folder) == list(range(14, 4, -1))
    assert steps_of(folder, limit=2) == [14, 13]
    assert steps_of(folder, limit=0) == list(range(14, 0, -1))
    assert samples_main(folder, Query()) == 0
    assert "the newest 10; --limit N shows more" in capsys.readouterr().err
    assert samples_main(folder, Query(limit=10)) == 0
    assert capsys.readouterr().err == ""


def test_the_newest_of_a_long_file_are_found_without_reading_the_rest(write: Callable[..., Path]):
    folder = write("no sample, never read\n", *(record(step, completion="x" * 10_000) for step in range(300)))
    reader = Reader(folder / "samples.jsonl")
    assert len(list(chosen(reader, Query()))) == 10
    assert (reader.samples, reader.broken) == (10, 0)


def test_filters_choose_by_step_status_group_and_versions(write: Callable[..., Path]):
    mixed = [{"ids": [1, 2], "logprobs": [0, 0], "versions": [[3, 1], [-1, 4], [4, 1]]}]
    apart = [{"ids": [1], "logprobs": [0], "versions": [[v, 1]]} for v in (6, 7)]
    folder = write(
        record(1), record(2, status="aborted", rewards={}), record(3), record(4, rows=mixed), record(5, key="other"),
        record(7, rows=apart), record(8, rows=[{"ids": [1], "logprobs": [0], "versions": [[-1, 1], [8, 1]]}]),
    )  # fmt: skip
    assert steps_of(folder, steps=parse_steps("3")) == [3]
    assert steps_of(folder, steps=parse_steps("2:4")) == [4, 3, 2]
    assert steps_of(folder, steps=parse_steps("5:")) == [8, 7, 5]
    assert steps_of(folder, steps=parse_steps(":2")) == [2, 1]
    assert steps_of(folder, status="aborted") == [2]
    assert steps_of(folder, group="other") == [5]
    assert steps_of(folder, diff_versions=True) == [7, 4]
    assert steps_of(folder, diff_versions=True, steps=parse_steps("1:5")) == [4]


def test_best_and_worst_go_by_the_sum_or_by_one_reward(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]):
    folder = write(
        record(1, rewards={"right": 1.0, "short": 0.0}),
        record(2, rewards={"right": 0.0, "short": 3.0}),
        record(3, rewards={"right": None, "short": 2.0}),
        record(4, rewards={"right": None, "short": None}),
        record(5, rewards={"right": 0.5, "short": -4.0}),
    )
    assert steps_of(folder, best=2) == [2, 3]
    assert steps_of(folder, best=9) == [2, 3, 1, 5]
    assert steps_of(folder, worst=2) == [5, 1]
    assert steps_of(folder, best=2, by="right") == [1, 5]
    assert steps_of(folder, worst=1, by="short") == [5]
    assert samples_main(folder, Query(best=9, by="right")) == 0
    assert "2 of those that match left out: they have no reward" in capsys.readouterr().err
    with pytest.raises(DatasetError, match=r"no sample has a reward 'rigth'\. There is right, short"):
        samples_main(folder, Query(best=1, by="rigth"))
    with pytest.raises(DatasetError, match="no sample that matches has a reward, of the 5"):
        samples_main(folder, Query(best=1, steps=parse_steps("4")))


def test_of_equal_rewards_the_newest_is_shown(write: Callable[..., Path]):
    assert steps_of(write(record(1), record(2), record(3)), best=1) == [3]


@pytest.mark.parametrize("text", ["", ":", "a", "1:2:3", "-1", "1.5", "٣"])
def test_a_step_that_is_none_says_how_to_write_one(text: str):
    with pytest.raises(ConfigError, match="Write --step 12, --step 3:8"):
        parse_steps(text)


def test_contradictions_in_the_options_are_refused():
    with pytest.raises(ConfigError, match="Write --step 3:8"):
        parse_steps("8:3")
    with pytest.raises(ConfigError, match="give one of them"):
        Query(best=1, worst=1)
    with pytest.raises(ConfigError, match="give one of them"):
        Query(best=1, limit=3)
    with pytest.raises(ConfigError, match="--best or --worst goes by"):
        Query(by="right")
    with pytest.raises(ConfigError, match="'fine': there is ok, truncated, timeout, env_lost, aborted"):
        Query(status="fine")


def test_what_is_not_there_is_one_line(tmp_path: Path):
    with pytest.raises(ConfigError, match="nope: there is no such folder"):
        samples_main(tmp_path / "nope", Query())
    with pytest.raises(DatasetError, match=r"has no samples.jsonl; it holds nothing"):
        samples_main(tmp_path, Query())
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "bad\x1b[31mname").touch()
    with pytest.raises(DatasetError, match=r"it holds 'bad\\x1b\[31mname', model.safetensors\. A run writes"):
        samples_main(tmp_path, Query())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples.jsonl").touch()
    with pytest.raises(DatasetError, match="but its folders are: run"):
        samples_main(tmp_path, Query())
    with pytest.raises(DatasetError, match=r"is empty: .* samples_per_step: 0"):
        samples_main(tmp_path / "run", Query())
    with pytest.raises(ConfigError, match="not a file that can be read from its end"):
        samples_main(Path("/dev/null"), Query())


def test_older_parts_are_read_after_the_newest(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]):
    folder = write(*[record(step) for step in (1, 2)])
    (folder / "samples.jsonl").rename(folder / "samples.2.jsonl")
    write(record(3))
    (folder / "samples.jsonl").rename(folder / "samples.1.jsonl")
    write(record(4))
    for newest in (4, 3):  # at last just after a rotation
        assert samples_main(folder, Query(), as_json=True) == 0
        shown = [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()]
        assert shown == list(range(newest, 0, -1))
        (folder / "samples.jsonl").write_text("")


def test_the_file_can_be_named_itself(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]):
    assert samples_main(write(record(3)) / "samples.jsonl", Query()) == 0
    assert "step 3" in capsys.readouterr().out


def test_a_last_line_that_is_cut_off_is_left_out_and_noted(
    write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    folder = write(record(1), record(2), json.dumps(record(3))[:-40])
    assert samples_main(folder, Query()) == 0
    output = capsys.readouterr()
    assert "step 2" in output.out
    assert "step 3" not in output.out
    assert output.err == (
        "note: the last line is cut off and left out: the run was killed there, or is writing it now\n"
    )


def test_a_whole_last_line_without_newline_is_a_sample(write: Callable[..., Path]):
    assert steps_of(write(record(1), json.dumps(record(2)))) == [2, 1]


def test_lines_that_are_no_samples_are_counted(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]):
    folder = write(
        record(1), "not json\n", "\0\0\0\0\n", "[1, 2]\n", '{"step": "x"}\n', "\n", "[" * 5000 + "\n", record(2),
        record(3, rows=7), record(4, rewards=[1.0]),
    )  # fmt: skip
    with (folder / "samples.jsonl").open("ab") as stream:
        stream.write(b"\xff\xfe\n")
    assert steps_of(folder) == [2, 1]
    assert samples_main(folder, Query()) == 0
    assert capsys.readouterr().err == "note: 8 of the 10 lines read are no sample and left out\n"


def test_a_file_without_a_whole_sample_says_so(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]):
    folder = write("garbage\n", json.dumps(record(1))[:50])
    with pytest.raises(DatasetError, match="holds no whole sample"):
        samples_main(folder, Query())
    assert "1 of the 1 lines read is no sample" in capsys.readouterr().err


def test_no_match_says_how_many_were_looked_at_and_what_there_is(write: Callable[..., Path]):
    folder = write(record(4), record(5, status="timeout"), record(9))
    with pytest.raises(DatasetError, match=r"none of the 3 samples of .* steps 4 to 9, with status ok, timeout\."):
        samples_main(folder, Query(steps=parse_steps("6")))


def test_a_sample_shows_conversation_rewards_versions_and_error():
    text = shown(
        record(
            12, key="abc/11/7", index=3, turns=2, status="truncated", exact=False, error="it broke\nthere",
            messages=[
                {"role": "assistant", "content": "44", "tool_calls": [{"name": "add"}]},
                {"role": "tool", "content": "wrong"},
                {"role": "assistant", "content": [{"type": "text", "text": "54"}]},
            ],
            rows=[{"ids": [], "logprobs": [], "versions": [[11, 3], [-1, 9], [12, 2]]}],
            rewards={"right": 1.0, "short": None}, extra={"tries": 2},
            step_rewards=[{"value": 0.5, "name": "env", "turn": 1}],
        )
    )  # fmt: skip
    assert text == (
        "━━ step 12 · group abc/11/7 · sample 3 ━━\n"
        "truncated, 2 turns, reward 1, advantage 0.5, rlx-rollout-0\n"
        "tokens: sampled 3 of version 11, 2 of version 12; context after the prompt 9\n"
        "not exact: the rollout function hides which tokens it sampled\n"
        "rewards: right 1, short none\n"
        "step rewards: env 0.5 (turn 1)\n"
        "prompt: user\n│ 17+37=\n"
        'sampled, turn 1\n┃ 44\n┃ tool_calls: [{"name": "add"}]\n'
        "observation: tool\n│ wrong\n"
        "sampled, turn 2\n┃ 54\n"
        "extra\n│ tries: 2\n"
        'columns\n│ answer: "54"\n'
        "error\n│ it broke\n│ there\n\n"
    )


def test_what_was_sampled_is_shown_when_the_rewards_saw_something_else():
    assert "sampled\n┃ 54\nshown to the rewards\n│ fifty-four\n" in shown(record(messages="fifty-four"))
    assert "shown to the rewards" not in shown(record(messages="54"))
    assert "sampled\n┃ 54\nobservation: user\n│ hm\n" in shown(record(messages=[{"role": "user", "content": "hm"}]))
    assert "sampled\n┃ (nothing)\n" in shown(record(completion=""))


def test_a_reply_within_the_prompt_is_not_called_sampled():
    prompt = [{"role": "assistant", "content": "an example"}, {"role": "user", "content": "17+37="}]
    assert "prompt: assistant\n│ an example\nprompt: user\n│ 17+37=\nsampled\n┃ 54\n" in shown(record(prompt=prompt))
    assert "prompt\n│ 17+37=\nsampled\n┃ 54\n" in shown(record(prompt="17+37="))


def test_every_control_and_format_character_is_escaped():
    kept = {"\n", "\t", "\u200c", "\u200d"}
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp") and chr(code) not in kept:
            assert visible(chr(code)).plain.startswith("\\"), hex(code)
    assert visible("plain, Привет, שלום, 👩‍🚀, a\\b").plain == "plain, Привет, שלום, 👩‍🚀, a\\b"


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_that_a_model_writes_steers_the_terminal(terminal: bool):
    evil = "a\x1b[2Jb\x1b]0;t\x07c\x9bd\re\u202ef\x08g\u2028h[red]markup[/red] :smile:"
    found = shown(
        record(
            completion=evil, prompt=evil, error=evil, status=evil, key=evil + "\nforged", worker=evil,
            rewards={evil: 1.0}, extra={evil: evil}, columns={evil: evil},
            step_rewards=[{"value": 1.0, "name": evil}],
            messages=[{"role": evil, "content": evil, evil: evil}, {"role": "assistant", "content": [evil, {evil: evil}]}],
        ),
        terminal=terminal,
    )  # fmt: skip
    assert terminal == (len(found.split("\x1b[")) > 1)
    own_colours = set("0123456789;[m")
    rest = found.split("\x1b")
    assert all(piece.split("m")[0][:1] == "[" and set(piece.split("m")[0]) <= own_colours for piece in rest[1:])
    assert terminal or len(rest) == 1
    assert not any(ch in found for ch in "\x07\x9b\r\u202e\x08\u2028")
    assert "[red]markup[/red] :smile:" in found.replace("\n", "")
    assert "\nforged" not in found
    if not terminal:
        assert "a\\x1b[2Jb\\x1b]0;t\\x07c\\x9bd\\re\\u202ef\\x08g\\u2028h" in found


def test_text_cannot_pass_for_the_frame_around_it():
    fake = "x\n━━ step 99 · group g · sample 0 ━━\n" + "y" * 300 + "\nerror"
    assert "\n┃ ━━ step 99" in shown(record(completion=fake))
    wrapped = Console(file=io.StringIO(), force_terminal=True, width=40, color_system=None, soft_wrap=True)
    show(wrapped, Sample.model_validate(record(completion=fake)), full=False)
    assert isinstance(wrapped.file, io.StringIO)
    text = wrapped.file.getvalue()
    assert all(
        "y" not in line or line.startswith(("┃ ", "rewards", "ok")) for line in text.splitlines() if "yyy" in line
    )
    assert max(len(line) for line in text.splitlines() if "yyy" in line) <= 40


def test_a_long_text_is_shortened_in_its_middle_unless_full():
    long = "begin " + "word " * 100_000 + "end"
    brief = shown(record(completion=long))
    assert len(brief) < 6000
    assert "496,009 of 500,009 characters left out; --full shows them" in brief
    assert "┃ begin word" in brief
    assert "word end\n" in brief
    assert long in shown(record(completion=long), full=True)
    lines = shown(record(completion="\n" * 100_000))
    assert lines.count("\n") < 100
    assert "characters left out" in lines
    assert "left out" not in shown(record(completion="x" * 4100))
    assert "left out" not in shown(record(completion="x\n" * 60))


def test_a_long_conversation_and_long_columns_are_shortened_too():
    turns = [{"role": "assistant" if i % 2 == 0 else "user", "content": f"<{i}>"} for i in range(1000)]
    changes = {"messages": turns, "columns": {"answer": "z" * 5000}, "step_rewards": [{"value": 1.0}] * 1000}
    brief, full = shown(record(**changes)), shown(record(**changes), full=True)
    assert "[… 980 of 1,000 messages left out; --full shows them …]" in brief
    assert "sampled, turn 6\n┃ <10>" in brief
    assert "<12>" not in brief
    assert "sampled, turn 500\n┃ <998>" in brief
    assert "4,702 more characters" in brief
    assert "… and 980 more" in brief
    assert "<500>" in full
    assert "z" * 5000 in full
    assert "left out" not in full


def test_json_is_the_record_as_saved_in_ascii(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]):
    saved = [record(1, completion='é 👩‍🚀 \x1b\x7f\x9b\u202e \\u0041 " \\'), record(2)]
    assert samples_main(write(*saved), Query(), as_json=True) == 0
    output = capsys.readouterr().out
    assert set(output) <= {"\n", *map(chr, range(0x20, 0x7F))}
    assert [json.loads(line) for line in output.splitlines()] == saved[::-1]
    assert json.loads(json_line(b'{"a":\t1}\r')) == {"a": 1}


def test_a_closed_pipe_ends_quietly(write: Callable[..., Path]):
    folder = write(*(record(step, completion="x" * 3000) for step in range(300)))
    for more in ([], ["--json"]):
        command = [sys.executable, "-m", "rlx.cli", "samples", str(folder), "--limit", "0", *more]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert "step" in process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == ""
            assert process.wait(60) == 1


def test_an_output_that_cannot_show_a_character_gets_its_escape(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert samples_main(write(record(completion="é")), Query()) == 0
    assert b"\\xe9" in raw.getvalue()
