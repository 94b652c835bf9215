"""The keys of trackers, and what of a configuration they are shown."""

from __future__ import annotations

import pytest

from rlx.config import Config, load_config
from rlx.config.shown import shown_values
from rlx.config.trackers import check_trackers
from rlx.errors import ConfigError

SMALLEST = "base_model: x\nrl: grpo\ndatasets:\n  - path: a.jsonl\n"


def load(tmp_path, text: str) -> Config:
    path = tmp_path / "cfg.yaml"
    path.write_text(SMALLEST + text)
    return load_config(path)


@pytest.mark.parametrize(
    ("text", "trackers"),
    [
        ("", ()),
        ("wandb_project: p\n", ("wandb",)),
        ("use_wandb: true\n", ("wandb",)),
        ("wandb_project: p\nwandb_mode: disabled\n", ()),
        ("wandb_project: p\nuse_wandb: false\n", ()),
        ('wandb_project: ""\nwandb_name: ""\nwandb_watch: "false"\nwandb_log_model: false\n', ()),
        ("mlflow_experiment_name: e\nuse_tensorboard: true\nuse_trackio: true\n", ("mlflow", "tensorboard", "trackio")),
        ("mlflow_tracking_uri: sqlite:///m.db\ntrackio_project_name: p\n", ("mlflow", "trackio")),
    ],
)
def test_a_tracker_is_on_where_its_switch_or_project_is_given(tmp_path, text, trackers):
    assert load(tmp_path, text).trackers == trackers


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("wandb_name: n\n", "wandb_name has no effect without wandb_project or `use_wandb: true`"),
        ("trackio_space_id: me/x\n", "trackio_space_id has no effect without trackio_project_name"),
        ("hf_mlflow_log_artifacts: true\n", "hf_mlflow_log_artifacts has no effect without mlflow_experiment_name"),
        ("wandb_projct: p\n", "Did you mean 'wandb_project'?"),
        ("report_to: wandb\n", "Write `wandb_project: NAME`"),
        ("use_comet: true\n", "rlx logs to wandb, mlflow, tensorboard and trackio"),
    ],
)
def test_a_key_that_would_do_nothing_is_an_error_that_says_what_to_write(tmp_path, text, says):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert says in str(error.value)


def test_a_tracker_whose_package_is_missing_is_told_before_anything_starts(tmp_path, monkeypatch):
    config = load(tmp_path, "wandb_project: p\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"wandb_project: the package wandb is not installed here. Type `pip install wandb`"
    ):
        check_trackers(config, config.path)
    check_trackers(load(tmp_path, ""), config.path)


def test_what_is_shown_of_a_configuration_has_no_secrets(tmp_path):
    config = load(
        tmp_path,
        "trl:\n  reward_funcs: ['https://me:word@judge/score?key=k3y']\n  generation_kwargs: {api_key: k3y, stop: [a]}\n"
        "mlflow_tracking_uri: http://me:word@host:5000/x\ntokenizer_config: some/model\n",
    )
    shown = shown_values(config)
    assert shown["trl.reward_funcs"] == '["https://***@judge/score?***"]'
    assert shown["trl.generation_kwargs.api_key"] == "***"
    assert shown["mlflow_tracking_uri"] == "http://***@host:5000/x"
    assert (shown["tokenizer_config"], shown["async.max_staleness"]) == ("some/model", 1)
    assert not any("k3y" in str(value) or "word" in str(value) for value in shown.values())
