"""Whole runs against a real gateway over HTTP, with rollouts that are the same in every run: steps by hand, one process
and two, stopped and resumed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fake_service import EOS, Score, config_for, length_reward, lines, place, serve, write_run
from learner_process import run
from safetensors.torch import load
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlx.episode import Episode
from rlx.errors import ServiceError, UserCodeError
from rlx.learner.main import train
from rlx.wire import GroupRequest

pytestmark = pytest.mark.slow


def final(folder: Path) -> dict[str, Tensor]:
    return load((folder / "out" / "model.safetensors").read_bytes())


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def fails_from(step: int) -> Score:
    """`length_reward`, until the user's function raises in a training group of `step`."""

    def score(request: GroupRequest, episodes: list[Episode]) -> tuple[dict[str, list[float]], dict[str, float]]:
        if request.step >= step and not place(request.key).startswith("eval"):
            raise UserCodeError("trl.reward_funcs[0] (rewards.length) raised ZeroDivisionError: division by zero")
        return length_reward(request, episodes)

    return score


def test_a_step_is_one_step_of_gradient_descent_on_all_its_completions(tmp_path: Path) -> None:
    path = write_run(tmp_path, max_steps=1, optimizer="sgd", learning_rate=0.1, max_grad_norm=0.0, test_datasets=None)
    with serve() as served:
        config = config_for(path, served, trl__scale_rewards=False, trl__vllm_importance_sampling_correction=False)
        train(config, 1)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        asked = [(e[1], np.array(e[2])) for e in served.worker.events if e[0] == "generate"]
        sampling = type("S", (), {"max_tokens": 12})()
        groups = [[served.worker._completion(f"run/{p}", ids, i, sampling) for i in range(4)] for p, ids in asked]
    total = sum(c.ids.size for group in groups for c in group)
    loss = torch.zeros(())
    for (_, prompt), group in zip(asked, groups, strict=True):
        rewards = torch.tensor([c.ids.size / 10 for c in group])
        for completion, advantage in zip(group, rewards - rewards.mean(), strict=True):
            ids = torch.from_numpy(np.concatenate([prompt, completion.ids]).astype(np.int64))
            table = model(ids[None]).logits[0, :-1].log_softmax(-1)
            logprobs = table.gather(-1, ids[1:, None])[len(prompt) - 1 :, 0]
            loss = loss - advantage * logprobs.sum() / total
    loss.backward()
    by_hand = {name: (p - 0.1 * p.grad).detach() for name, p in model.named_parameters()}
    assert max((by_hand[name] - p).abs().max() for name, p in model.named_parameters()) > 1e-3
    assert_equal(final(tmp_path), by_hand, atol=2e-6)


def test_two_processes_train_to_the_same_parameters_as_one(tmp_path: Path) -> None:
    """The reference's KL is in the loss: it is 0 before the first step and grows. The entropy of the first step is above
    its target, that of the second below, so that the third has a bonus; that of one rank alone would always be below."""
    adaptive = {"use_adaptive_entropy": True, "entropy_target": 5.355, "entropy_coef_delta": 0.1, "entropy_coef": 0.2}
    path = write_run(tmp_path, max_steps=3, trl={"beta": 0.1, **adaptive})
    with serve() as served:
        train(config_for(path, served, output_dir=str(tmp_path / "one" / "out")), 1)
        status, out, err = run(path, served, 2)
    assert (status, err) == (0, "")
    assert "step 3/3" in out
    assert out.count("note:") <= 1
    one, two = (lines(folder / "out" / "metrics.jsonl") for folder in (tmp_path / "one", tmp_path))
    for name in ("loss", "kl", "reward", "grad_norm", "entropy", "completions/mean_length", "learning_rate"):
        assert [r[name] for r in two] == pytest.approx([r[name] for r in one], rel=1e-4, abs=1e-6)
    assert [r["entropy_coef"] for r in one] == pytest.approx([0.1, 0.2, 0.3])
    assert [r["entropy_coef"] for r in two] == [r["entropy_coef"] for r in one]
    assert one[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert all(r["kl"] > 1e-3 for r in one[1:])
    assert_equal(final(tmp_path), final(tmp_path / "one"), atol=1e-5)
    base = load((tmp_path / "model" / "model.safetensors").read_bytes())
    assert max((final(tmp_path)[n] - base[n]).abs().max() for n in base) > 1e-3


def test_a_run_that_a_reward_ended_is_resumed_to_the_parameters_of_an_uninterrupted_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, save_steps=2, eval_steps=2, trl={"beta": 0.1})
    with serve() as served:
        train(config_for(path, served, output_dir=str(tmp_path / "whole" / "out")), 1)
        expected_prompts = served.generated()
    with serve(fails_from(2)) as served:
        status, _, err = run(path, served, 2)
        last_version = served.worker.version
    assert status == 1
    assert err == "error: trl.reward_funcs[0] (rewards.length) raised ZeroDivisionError: division by zero\n"
    assert not (tmp_path / "out" / "model.safetensors").exists()

    with serve() as served:
        config = config_for(path, served, auto_resume_from_checkpoints=True)
        train(config, 1)
        assert f"going on after step 2, from {tmp_path / 'out' / 'checkpoint-2'}\n" in capsys.readouterr().out
        events = served.worker.events
        assert events[0] == ("publish", last_version), "the checkpoint was written with the version before"
        assert [e[1] for e in events if e[0] == "publish"] == [last_version + n for n in (0, 1, 2)]
        assert served.generated() == expected_prompts[4:], "two steps of two prompts were trained"
    assert_equal(final(tmp_path), final(tmp_path / "whole"), atol=1e-5)
    for name in ("metrics", "evals", "samples"):
        whole, resumed = (lines(f / "out" / f"{name}.jsonl") for f in (tmp_path / "whole", tmp_path))
        assert [r["step"] for r in resumed] == [r["step"] for r in whole]
        assert [r.get("reward") for r in resumed] == [r.get("reward") for r in whole]
    assert [r["step"] for r in lines(tmp_path / "out" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [r["step"] for r in lines(tmp_path / "out" / "evals.jsonl")] == [0, 2, 4]


def test_resuming_publishes_above_the_versions_of_checkpoint_and_service(tmp_path: Path) -> None:
    path = write_run(tmp_path, max_steps=2, save_steps=1, test_datasets=None)
    first = {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-1")}
    with serve() as served:
        train(config_for(path, served), 1)
        train(config_for(path, served), 1)
        train(config_for(path, served, **first), 1)
        assert [e[1] for e in served.worker.events if e[0] == "publish"] == [1, 2, 3, 4, 5, 6, 7, 8]
    with serve() as served:
        train(config_for(path, served, **first), 1)
        assert [e[1] for e in served.worker.events if e[0] == "publish"] == [5, 6]


def test_resuming_a_finished_run_trains_nothing_and_leaves_the_same(tmp_path: Path, capsys) -> None:
    path = write_run(tmp_path, max_steps=2)
    with serve() as served:
        train(config_for(path, served), 1)
        parameters, evals = final(tmp_path), lines(tmp_path / "out" / "evals.jsonl")
        before = served.generated()
        train(config_for(path, served, auto_resume_from_checkpoints=True), 1)
        assert served.generated() == before
    assert_equal(final(tmp_path), parameters, atol=0)
    assert [(e["step"], e["reward"]) for e in lines(tmp_path / "out" / "evals.jsonl")] == [
        (e["step"], e["reward"]) for e in evals
    ]
    assert [r["step"] for r in lines(tmp_path / "out" / "metrics.jsonl")] == [1, 2]


def test_the_model_is_saved_whole_in_the_type_of_the_base_and_is_what_was_evaluated(tmp_path: Path) -> None:
    path = write_run(tmp_path, dtype=torch.bfloat16, max_steps=1)
    with serve() as served:
        train(config_for(path, served), 1)
        published = load(served.worker.published[2])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.use_cache
    assert_equal(dict(model.named_parameters()), published, atol=0)
    saved, base = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("out", "model"))
    chat = [{"role": "user", "content": "1 + 1 ="}]
    assert saved.apply_chat_template(chat, tokenize=False) == base.apply_chat_template(chat, tokenize=False)
    assert saved("1 + 1 =")["input_ids"] == base("1 + 1 =")["input_ids"]
    assert saved.eos_token_id == EOS
    assert not (tmp_path / "out" / ".final").exists()


def test_a_service_that_lies_about_versions_ends_the_run(tmp_path: Path) -> None:
    path = write_run(tmp_path, test_datasets=None)
    with serve() as served:
        served.worker.lie = 1
        with pytest.raises(ServiceError, match=r"sampled .*/\d\.0 with weight versions \(2,\), but 1 was published"):
            train(config_for(path, served), 1)


def test_a_model_that_was_trained_is_kept_when_the_last_evaluation_fails(tmp_path: Path) -> None:
    def score(request: GroupRequest, episodes: list[Episode]) -> tuple[dict[str, list[float]], dict[str, float]]:
        if place(request.key).startswith("eval1/"):
            raise UserCodeError("trl.reward_funcs[0] gave 3 values for 1 completions")
        return length_reward(request, episodes)

    path = write_run(tmp_path, max_steps=1)
    with serve(score) as served, pytest.raises(UserCodeError, match="3 values"):
        train(config_for(path, served), 1)
    assert final(tmp_path)
