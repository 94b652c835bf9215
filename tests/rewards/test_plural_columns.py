"""The documented reward asks for `answers` where its transform makes a column `answer`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rlx.rewards.scoring import Reward, ScoreRequest, load_reward, score_group

KEY = "trl.reward_funcs[0]"
REQUEST = ScoreRequest(
    prompt="2+2=",
    completions=["4", "5", "four", ""],
    completion_ids=[[4, 0], [5, 0], [6, 7, 0], [0]],
    columns={"answer": "4", "level": 1},
)


def load(folder: Path, source: str) -> Reward:
    (folder / "rewards.py").write_text(source)
    return load_reward("rewards.f", folder, KEY)


def test_the_plural_of_a_column_is_understood_and_told_once(tmp_path, capsys):
    reward = load(
        tmp_path,
        "def f(completions, answers, levels=None, **kwargs):\n    return [float(c == a) for c, a in zip(completions, answers)]\n",
    )
    assert score_group(reward, REQUEST).tolist() == [1.0, 0.0, 0.0, 0.0]
    score_group(reward, REQUEST)
    told = capsys.readouterr().out.splitlines()
    assert told == [f"{KEY} (rewards.f): its parameter 'answers' is given the column 'answer'."], "not what is optional"


def test_a_column_of_its_own_name_goes_before_a_plural(tmp_path):
    reward = load(tmp_path, "def f(completions, answers):\n    return [float(a) for a in answers]\n")
    request = replace(REQUEST, columns={"answer": "4", "answers": "7"})
    assert score_group(reward, request).tolist() == [7.0] * 4
