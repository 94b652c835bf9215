"""`rlx reward test`: what it scores, what it finds odd, and how it ends."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console
from tiny_models import make_tiny_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlx.cluster.check import check_main
from rlx.cluster.reward_cases import ANSWER, EMPTY, LONG, PROMPT, SAVED, Case, saved_cases, trivial_cases
from rlx.cluster.reward_report import Call, Scores, oddities, show
from rlx.cluster.reward_test import score_all
from rlx.config import Config, load_config
from rlx.errors import ConfigError, DatasetError
from rlx.rewards.scoring import ScoreRequest

REWARDS = """
import os, time
def good(completions, answer, **kwargs):
    return [float(text == gold) for text, gold in zip(completions, answer)]
def hangs_on_nothing(completions, **kwargs):
    while not completions[0]: time.sleep(0.01)
    return [1.0] * len(completions)
def dies_of_long(completions, completion_ids, max_completion_length, **kwargs):
    if len(completion_ids[0]) == max_completion_length: os._exit(3)
    return [1.0] * len(completions)
def fails_on_nothing(completions, **kwargs):
    return [1 / len(text) for text in completions]
def wants_gold(completions, gold):
    return [1.0] * len(completions)
def documented(model, processing_class, prompts, generation_config=None): ...
def chat_length(completions, **kwargs):
    return [float(len(messages[-1]["content"])) for messages in completions]
"""


def config_with(
    folder: Path, rewards: str, rows: list[dict] | None = None, more: str = "", rollout: str = ""
) -> Config:
    (folder / "mine.py").write_text(REWARDS)
    rows = rows or [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": "3"}]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    make_tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text('{"model_type": "qwen2"}')
    (folder / "run.yaml").write_text(
        f"base_model: model\nrl: grpo\ntrl: {{reward_funcs: [{rewards}], max_completion_length: 32{rollout and ', rollout_func: ' + rollout}}}\n"
        f"datasets: [{{path: rows.jsonl}}]\noutput_dir: {folder / 'out'}\n{more}"
    )
    return load_config(folder / "run.yaml")


# --- what is scored


def test_every_row_is_tried_with_nothing_the_prompt_the_answer_and_a_long_text(tmp_path):
    cases = trivial_cases(config_with(tmp_path, "mine.good"), 4, None)
    assert [case.kind for case in cases] == [EMPTY, PROMPT, ANSWER, LONG] * 2
    assert [case.request.completions[0] for case in cases[:3]] == ["", "1+1=", "2"]
    assert [len(case.request.completion_ids[0]) for case in cases[:4]] == [0, 4, 1, 32]
    assert cases[0].request.columns == {"answer": "2"}
    assert cases[0].request.max_completion_length == 32
    assert len(trivial_cases(config_with(tmp_path, "mine.good"), 1, None)) == 4


def test_the_completions_of_a_chat_prompt_are_messages_and_other_answers_than_text_are_json(tmp_path):
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1="}]
    cases = trivial_cases(config_with(tmp_path, "mine.good", [{"prompt": prompt, "target": [2]}]), 4, None)
    replies = [case.request.completions[0] for case in cases]
    assert replies[1:3] == [[{"role": "assistant", "content": "1+1="}], [{"role": "assistant", "content": "[2]"}]]


def test_the_completions_are_texts_where_the_rollout_function_gives_the_rewards_texts(tmp_path):
    prompt = [{"role": "user", "content": "1+1="}]
    config = config_with(tmp_path, "mine.good", [{"prompt": prompt, "answer": "2"}], rollout="mine.documented")
    assert [case.request.completions[0] for case in trivial_cases(config, 1, None)][:3] == ["", "1+1=", "2"]


def test_the_column_of_the_answer_can_be_named_and_must_be_there(tmp_path):
    config = config_with(tmp_path, "mine.good", [{"prompt": "p", "best": "b"}])
    assert [case.kind for case in trivial_cases(config, 4, None)] == [EMPTY, PROMPT, LONG]
    assert trivial_cases(config, 4, "best")[2].request.completions[0] == "b"
    with pytest.raises(ConfigError, match=r"--answer-column bets: there is no such column. There are: prompt, best"):
        trivial_cases(config, 4, "bets")


def sample(**fields) -> dict:
    rows = [{"ids": [5, 6, 7, 8], "versions": [[3, 1], [-1, 2], [4, 1]]}]
    return {"step": 3, "key": "k", "prompt": "1+1=", "completion": "2", "status": "ok", "rows": rows,
            "rewards": {"mine.good": 1.0}, "columns": {"answer": "2"}, "extra": {"moves": 1}, **fields}  # fmt: skip


def write(path: Path, *records: dict) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_saved_samples_come_back_as_the_groups_they_were(tmp_path):
    config = config_with(tmp_path, "mine.good")
    path = write(
        tmp_path / "samples.jsonl",
        sample(),
        sample(completion="3", rewards={"mine.good": math.nan}),
        sample(status="timeout"),
        sample(key="other", prompt=[{"role": "user", "content": "hi"}], rewards={"mine.good": None}),
        sample(key="third", messages=[{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}]),
    )
    first, second, third = saved_cases(config, path)
    assert first.request == ScoreRequest(
        "1+1=", ["2", "3"], [[5, 8], [5, 8]], {"answer": "2"}, 32, 3, {"moves": [1, 1]}
    )
    assert first.recorded[0] == {"mine.good": 1.0}
    assert math.isnan(first.recorded[1]["mine.good"])
    assert second.request.completions == [[{"role": "assistant", "content": "2"}]]
    assert math.isnan(second.recorded[0]["mine.good"])
    assert third.request.completions[0][1] == {"role": "tool", "content": "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such file"),
        ("", "holds no episode"),
        (json.dumps(sample()) + "\n{", "line 2: not a saved sample"),
        ('{"step": 1}', "line 1: not a saved sample: KeyError"),
        ("[1]", "line 1: not a saved sample"),
        (json.dumps(sample(status="aborted")), "holds no episode"),
    ],
)
def test_samples_that_cannot_be_used_are_told(tmp_path, text, message):
    path = tmp_path / "samples.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DatasetError, match=message):
        saved_cases(config_with(tmp_path, "mine.good"), path)


# --- what is odd


def scored(**means: float) -> Scores:
    kinds = {"nothing": EMPTY, "prompt": PROMPT, "answer": ANSWER, "long": LONG}
    cases = {name: Case(kinds[name], ScoreRequest("p", ["c"], [[0]])) for name in means}
    return Scores("mine", [Call(cases[name], [value], 0.1, "ok", "") for name, value in means.items()])


def test_a_reward_that_pays_for_nothing_or_does_not_tell_apart_is_flagged():
    assert oddities(scored(nothing=0.0, prompt=0.0, answer=1.0, long=-1.0)) == []
    assert oddities(scored(nothing=1.0, prompt=0.5, answer=1.0, long=0.0)) == [
        "pays for nothing: 1 for an empty completion, at most 1 for another"
    ]
    assert oddities(scored(nothing=0.25, prompt=0.25, answer=1.0)) == [
        "pays for nothing: 0.25 for an empty completion, at most 1 for another"
    ]
    assert oddities(scored(nothing=0.0, prompt=0.5, answer=0.5, long=1.0)) == [
        "pays 0.5 for the prompt, and 0.5 for the answer",
        "pays 1 for a long text, and 0.5 for the answer",
    ]
    assert oddities(scored(nothing=0.0, prompt=-0.5, answer=-0.5))[0].startswith("pays for nothing: 0 ")
    assert oddities(scored(nothing=0.0, prompt=0.0, answer=0.0, long=-1.0)) == [], "a penalty of length"
    assert oddities(scored(nothing=0.5, prompt=0.5, answer=0.5)) == ["gives 0.5 for everything"]
    assert oddities(scored(nothing=0.0, prompt=0.0)) == [
        "gives 0 for everything; name the column of the right answer with --answer-column"
    ]
    assert oddities(scored(nothing=math.nan, prompt=math.nan)) == ["gives no value for anything"]


def test_saved_and_new_rewards_stand_side_by_side():
    request = ScoreRequest("p", ["first", "second", "third"], [[0]] * 3, step=5)
    recorded = [{"mine": 1.0}, {"mine": 0.25}, {"mine": math.nan}]
    scores = Scores("mine", [Call(Case(SAVED, request, recorded), [1.0, 0.75, math.nan], 0.1, "ok", "")])
    text = shown([scores], saved=True)
    row = next(line for line in text.splitlines() if "mine" in line and "ok" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["mine", "3", "0.625", "0.875", "1", "0.10", "1 ok"]
    row = next(line for line in text.splitlines() if "'second'" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["5", "mine", "'second'", "0.25", "0.75"]
    assert "first" not in text.replace("the first", "")


def shown(scores: list[Scores], saved: bool = False) -> str:
    out = io.StringIO()
    show(Console(file=out, width=200, highlight=False), scores, saved)
    return out.getvalue()


def test_a_check_loads_no_model_and_calls_nobody_but_tells_what_cannot_be_one(tmp_path, capsys):
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text("{}")
    config = config_with(tmp_path, "./judge, 'http://127.0.0.1:9/score', ./jugde")
    assert check_main(config, 1) == 1
    text = capsys.readouterr().out
    assert "note  not checked: reward ./judge, a model, is not loaded; `rlx reward test` does" in text
    assert "note  not checked: reward http://127.0.0.1:9/score, another process, is not called" in text
    assert "error trl.reward_funcs[2] (./jugde): there is no folder './jugde' next to the YAML" in text


# --- in real processes


@pytest.mark.usefixtures("runtime")
async def test_every_reward_is_scored_to_the_end_whatever_the_others_do(tmp_path):
    names = ("good", "hangs_on_nothing", "dies_of_long", "fails_on_nothing", "wants_gold", "missing")
    limits = "rewards: {timeout: 60, functions: {mine.hangs_on_nothing: {timeout: 6}}}\n"
    config = config_with(tmp_path, ", ".join(f"mine.{name}" for name in names), more=limits)
    scores = dict(zip(names, await score_all(config, trivial_cases(config, 2, None)), strict=True))
    assert scores["good"].values(ANSWER) == [1.0] * 4
    assert scores["good"].values(EMPTY) == scores["good"].values(LONG) == [0.0] * 4
    assert not scores["good"].failed
    assert [call.outcome for call in scores["hangs_on_nothing"].of(EMPTY)] == ["timeout"]
    assert scores["hangs_on_nothing"].values(PROMPT) == [1.0] * 4
    assert [call.outcome for call in scores["dies_of_long"].of(LONG)] == ["crash"]
    assert [call.outcome for call in scores["fails_on_nothing"].of(EMPTY)] == ["exception"] * 2
    assert [call.outcome for call in scores["wants_gold"].calls] == ["refused"]
    config = config_with(tmp_path, "mine.wants_gold", rollout="mine.documented")
    [untried] = await score_all(config, trivial_cases(config, 1, None))
    assert not untried.failed
    assert (
        "note  trl.reward_funcs[0] (mine.wants_gold) asks for 'gold', which is no column of the data set: "
        "the rollout function or environment must give it. `--samples`"
    ) in shown([untried])
    [saved] = await score_all(config, saved_cases(config, write(tmp_path / "samples.jsonl", sample())))
    assert [call.outcome for call in saved.calls] == ["refused"], "no episode has brought it"
    assert "has no attribute 'missing'" in scores["missing"].broken
    text = shown(list(scores.values()))
    assert "note  mine.hangs_on_nothing blocks (timeout) for nothing\n" in text
    assert "note  mine.dies_of_long ends its process (crash) for a long text\n" in text
    assert "ZeroDivisionError" in text
    assert "asks for 'gold'" in text
    assert "not loaded" in text


class _Scorer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps([float(len(text)) for text in body["completions"]]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.slow
@pytest.mark.usefixtures("runtime")
async def test_a_model_and_an_address_score_in_processes_of_their_own(tmp_path):
    judge = AutoConfig.for_model(
        "llama", vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(judge).save_pretrained(tmp_path / "judge")
    make_tiny_tokenizer().save_pretrained(tmp_path / "judge")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Scorer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        config = config_with(tmp_path, f"judge, 'http://127.0.0.1:{server.server_port}/score', rlx.rewards.code")
        rows = [
            {"prompt": "Write double.", "tests": ["assert double(2) == 4"], "answer": "def double(x): return 2 * x"}
        ]
        (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]))
        model, remote, code = await score_all(config, trivial_cases(config, 1, None))
        server.shutdown()
        thread.join(5)
    assert not model.failed, model.broken or model.failures[0].error
    assert len({round(value, 6) for kind in (EMPTY, PROMPT, ANSWER, LONG) for value in model.values(kind)}) == 4
    assert remote.values(ANSWER) == [27.0] * 2
    assert code.values(ANSWER) == [1.0] * 2
    assert code.values(EMPTY) == [0.0] * 2


@pytest.mark.slow
def test_the_command_ends_with_one_when_a_reward_failed_and_leaves_nothing(tmp_path):
    config_with(tmp_path, "mine.good, mine.fails_on_nothing")
    done = rlx(tmp_path, "run.yaml")
    assert done.returncode == 1, done.stderr
    assert "error trl.reward_funcs[1] (mine.fails_on_nothing) raised ZeroDivisionError." in done.stdout
    path = write(tmp_path / "samples.jsonl", sample(), sample(completion="3"))
    done = rlx(tmp_path, "run.yaml", "--samples", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "what differs" in done.stdout
    path = write(tmp_path / "samples.jsonl", sample(rewards={"another": 1.0}))
    done = rlx(tmp_path, "run.yaml", "--samples", str(path))
    assert "nothing to compare with" in done.stdout


def rlx(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlx.cli", "reward", "test", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
