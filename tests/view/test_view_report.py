"""The report: one file with everything, and nothing that runs."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import pytest

from rlx.errors import ConfigError
from rlx.view.folder import FolderRun
from rlx.view.plot import Line, plot, ticks
from rlx.view.report import report, report_main, shown

HOSTILE = "<script>alert(1)</script>\u202e\x00"


@pytest.fixture
def folder(tmp_path):
    def write(name, *records):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    (tmp_path / "run.json").write_text(
        json.dumps(
            {
                "output_dir": "/home/someone/out",
                "tokenizer": "/home/someone/model",
                "total_steps": 3,
                "started": 1_700_000_000,
                "config": {"learning_rate": 1e-5, "hub_token": "***"},
                "versions": {"torch": "2.13.0"},
                "python": "3.11.9",
            }
        )
    )
    write(
        "metrics.jsonl",
        *[{"step": s, "time": 1_700_000_000 + s, "reward": s / 4, "rewards/right/mean": s / 4} for s in (1, 2, 3)],
    )
    write(
        "evals.jsonl",
        *[
            {"step": s, "reward": 0.125 + s, "rewards": {"right": 0.5}, "pass_at_k": {"4": 0.75}, "num_prompts": 7}
            for s in (0, 3)
        ],
    )
    write(
        "samples.jsonl",
        *[
            {"step": 3, "prompt": HOSTILE, "completion": f"answer {i} {HOSTILE}", "rewards": {"right": i / 10}}
            for i in range(12)
        ],
    )
    write(
        "events.jsonl",
        {"time": 1_700_000_000, "kind": "reward_failure", "text": "it raised", "traceback": f"ValueError: {HOSTILE}"},
        *[{"time": 1_700_000_001 + i, "kind": "checkpoint", "text": f"saved {i}"} for i in range(50)],
        *[{"time": 1_700_000_001 + i, "kind": "publish", "text": f"weights {i}"} for i in range(50)],
    )
    return tmp_path


def test_it_has_what_a_colleague_asks_for(folder):
    text = report(FolderRun(folder))
    for expected in ("finished · step 3 of 3", "2023-11-14 22:13:20 UTC", "learning_rate: 1.0e-05", "2.13.0", "3.11.9", "pass@4", "3.12", "publish 50"):  # fmt: skip
        assert expected in text
    assert text.count("<svg") == 2
    assert [f"answer {i} " in text for i in range(12)] == [True] * 5 + [False] * 2 + [True] * 5
    assert text.index("answer 11 ") < text.index("answer 7 ") < text.index("answer 0 ") < text.index("answer 4 ")
    assert "saved 49" in text
    assert "saved 3<" not in text
    assert "weights 49" not in text, "one a step: only counted"
    assert "it raised" in text, "failures stay, however old"


def test_nothing_in_it_runs_or_comes_from_elsewhere(folder):
    text = report(FolderRun(folder))
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.search("[\u202e\x00]", text)
    assert not re.search(r"\b(?:src|href)=|url\(|@import", text)
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}'" in text
    assert "/home/someone" not in text


def test_a_folder_without_a_run_and_a_place_that_cannot_be_written_are_clear_errors(tmp_path, folder, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="nothing to report yet"):
        report_main(tmp_path / "empty", None)
    with pytest.raises(ConfigError, match="No such file or directory"):
        report_main(folder, tmp_path / "nowhere" / "report.html")
    assert report_main(folder, None) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")


def test_a_crashed_run_of_an_older_rlx_is_reported_as_far_as_it_came(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    text = report(FolderRun(tmp_path))
    assert "Not recorded: this folder has no run.json." in text
    assert "None were recorded." in text


def test_what_is_hidden_is_written_out():
    assert (
        shown("a\u202e<b>\x00\x01") == 'a<span class="ctl">U+202E</span>&lt;b&gt;<span class="ctl">U+0000 U+0001</span>'
    )


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [None, 1e-9, 3e7], [-5.0, None, 5.0]])
def test_any_curve_is_drawn(values):
    drawn = plot([Line("a", list(range(len(values))), values)])
    assert "nan" not in drawn
    assert drawn.startswith("<svg")
    assert plot([Line("a", [1.0], [None])]) == ""


def test_ticks_that_lie_close_have_different_numbers():
    drawn = plot([Line("a", [1.0, 2.0], [0.2421, 0.2444])])
    assert [label for label in ("0.242", "0.243", "0.244") if f">{label}<" in drawn] == ["0.242", "0.243", "0.244"]
    labels = re.findall(r'text-anchor="end">([^<]+)', drawn)
    assert len(labels) == len(set(labels))


def test_ticks_are_round_and_within():
    assert ticks(0.03, 1.0, 4) == [0.5, 1.0]
    assert ticks(-3, 3, 4) == [-2, 0, 2]
    assert ticks(0, 0.00042, 4) == [0.0, 0.0002, 0.0004]
