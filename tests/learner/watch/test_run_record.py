"""run.json: what a run was started with."""

from __future__ import annotations

import json
import socket

from rlx.config import load_config
from rlx.config.shown import without_secrets
from rlx.learner.watch.run_record import write_run_record

YAML = """
rl: grpo
base_model: some/model
datasets: [{path: data.jsonl}]
trl: {reward_funcs: [rewards.r], num_generations: 4, max_completion_length: 8}
max_steps: 5
output_dir: out
"""


def test_a_resumed_run_keeps_its_first_start_and_host_names_stay_out(tmp_path):
    (tmp_path / "cfg.yaml").write_text(YAML)
    config = load_config(str(tmp_path / "cfg.yaml"), {})
    write_run_record(tmp_path, config, 5, 1, None)
    first = json.loads((tmp_path / "run.json").read_text())
    write_run_record(tmp_path, config, 5, 2, 3)
    second = json.loads((tmp_path / "run.json").read_text())
    assert (first["name"], first["total_steps"], first["resumes"]) == ("cfg", 5, [])
    assert first["config"]["trl"]["num_generations"] == 4
    assert "loss_type" not in first["config"]["trl"], "only what was given"
    assert first["versions"]["torch"]
    assert second["started"] == first["started"]
    assert [resume["step"] for resume in second["resumes"]] == [3]
    assert socket.gethostname() not in json.dumps({**second, "output_dir": "", "tokenizer": ""})


def test_values_of_secret_keys_are_hidden_at_any_depth():
    given = {"a": [{"wandb_api_key": "x", "hub_token": "y", "max_tokens": 3}], "Authorization": "z"}
    assert without_secrets(given) == {
        "a": [{"wandb_api_key": "***", "hub_token": "***", "max_tokens": 3}],
        "Authorization": "***",
    }
