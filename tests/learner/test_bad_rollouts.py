"""Rollouts that teach nothing or are broken: the run goes on, counts them, and trains on the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_service import TOKEN, ScriptedWorker, config_for, length_reward, lines, place, serve, write_run
from safetensors.torch import load_file

from rlx.config import load_config
from rlx.episode import Episode
from rlx.errors import ConfigError, UserCodeError
from rlx.learner.main import train
from rlx.learner.policy.checkpoints import find_resume_point
from rlx.wire import Completion, GroupRequest, Sampling

pytestmark = pytest.mark.slow


class Broken(ScriptedWorker):
    """In the groups of the second step the first completion is empty, and two others have no usable log-probability."""

    async def generate(self, request_id: str, prompt_ids: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        completions = await super().generate(request_id, prompt_ids, n, sampling)
        if place(request_id) not in ("2", "3"):
            return completions
        nothing = np.empty(0, np.int32), np.empty(0, np.float32)
        completions[0] = replace(completions[0], ids=nothing[0], logprobs=nothing[1], versions=(), text="")
        for index, value in ((1, np.nan), (2, -np.inf)):
            logprobs = completions[index].logprobs.copy()
            logprobs[-1] = value
            completions[index] = replace(completions[index], logprobs=logprobs)
        return completions


def score(request: GroupRequest, episodes: list[Episode]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """The first step's completions are all worth the same."""
    return ({"rewards.length": [1.0] * len(episodes)}, {}) if request.step == 0 else length_reward(request, episodes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    """The folder of a run of three steps, and the fingerprints of what it published."""
    folder = tmp_path_factory.mktemp("broken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLX_TOKEN", TOKEN)
        worker = Broken()
        path = write_run(folder, max_steps=3, save_steps=1, test_datasets=None, token_budget=40, samples_per_step=100)
        with serve(score, worker=worker) as served:
            train(config_for(path, served), 1)
    return folder, {version: manifest.fingerprint for version, manifest in worker.manifests.items()}


def test_groups_whose_rewards_are_all_equal_train_nothing(trained: tuple[Path, dict[int, str]]) -> None:
    folder, published = trained
    first = lines(folder / "out" / "metrics.jsonl")[0]
    assert (first["frac_reward_zero_std"], first["loss"], first["grad_norm"]) == (1.0, 0.0, 0.0)
    assert published[1] == published[2] != published[3]


def test_empty_completions_and_unusable_log_probabilities_are_counted_and_the_rest_is_trained(
    trained: tuple[Path, dict[int, str]],
) -> None:
    folder, published = trained
    _, second, third = lines(folder / "out" / "metrics.jsonl")
    assert (second["frac_logprobs_not_finite"], "frac_logprobs_not_finite" in third) == (0.5, False)
    assert np.isfinite([second["loss"], second["grad_norm"], second["entropy"]]).all()
    assert second["grad_norm"] > 0
    assert published[3] != published[4]
    of_step = [s for s in lines(folder / "out" / "samples.jsonl") if s["step"] == 2]
    assert [s["completion"] == "" for s in of_step] == [True, False, False, False] * 2


def test_a_run_in_which_no_completion_has_a_reward_ends_with_an_error_and_the_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLX_TOKEN", TOKEN)
    path = write_run(tmp_path, max_steps=2, test_datasets=None)
    with serve(lambda request, episodes: ({"rewards.none": [np.nan] * len(episodes)}, {})) as served:
        config = config_for(path, served)
        with pytest.raises(
            UserCodeError, match=r"no completion of this run has a reward.*out holds the model as it was"
        ):
            train(config, 1)
    assert len(lines(tmp_path / "out" / "metrics.jsonl")) == 2
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "out"))
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_every_truncated_file_of_a_checkpoint_is_named_and_the_others_are_told(
    trained: tuple[Path, dict[int, str]],
) -> None:
    folder, _ = trained
    checkpoint = folder / "out" / "checkpoint-3"
    config = load_config(folder / "cfg.yaml", {("auto_resume_from_checkpoints",): ("--auto", True)})
    files = [file for file in checkpoint.rglob("*") if file.is_file()]
    assert len(files) >= 8
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(
            ConfigError, match=rf"checkpoint-3 is damaged: {file.name}.*Nothing was changed.*checkpoint-2"
        ):
            find_resume_point(config)
        file.write_bytes(whole)
    point = find_resume_point(config)
    assert point is not None
    assert point.step == 3


def test_a_group_of_one_is_refused_as_by_trl_because_it_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"trl.num_generations: 1 cannot be used. Input should be greater than or equal to 2"
    ):
        load_config(write_run(tmp_path, trl={"num_generations": 1}))
