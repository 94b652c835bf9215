"""Several optimizer steps on one generation batch: by hand, in the feed's books, and beside asynchronous generation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fake_service import config_for, lines, serve, write_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlx.learner.incoming.ledger import Ledger, Rules
from rlx.learner.main import train

pytestmark = pytest.mark.slow

EPSILON, RATE = 0.02, 0.5


def test_the_second_step_on_a_batch_clips_its_ratio_to_the_policy_before_the_first(tmp_path: Path) -> None:
    keys = {
        "num_iterations": 2,
        "epsilon": EPSILON,
        "scale_rewards": False,
        "vllm_importance_sampling_correction": False,
    }
    path = write_run(
        tmp_path, max_steps=2, optimizer="sgd", lr_scheduler="constant", learning_rate=RATE, max_grad_norm=0.0,
        test_datasets=None, trl=keys,
    )  # fmt: skip
    with serve() as served:
        train(config_for(path, served), 1)
        asked = [(e[1], np.array(e[2])) for e in served.worker.events if e[0] == "generate"]
        assert len(asked) == 2, "one batch of two prompts"
        assert {e[1] for e in served.worker.events if e[0] == "publish"} >= {1, 2}
        sampling = type("S", (), {"max_tokens": 12})()
        groups = [[served.worker._completion(f"run/{p}", ids, i, sampling) for i in range(4)] for p, ids in asked]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    total, old = sum(c.ids.size for group in groups for c in group), []
    clipped = [0, 0]
    for step in range(2):
        loss, place = torch.zeros(()), 0
        for (_, prompt), group in zip(asked, groups, strict=True):
            rewards = torch.tensor([c.ids.size / 10 for c in group])
            for completion, advantage in zip(group, rewards - rewards.mean(), strict=True):
                ids = torch.from_numpy(np.concatenate([prompt, completion.ids]).astype(np.int64))
                table = model(ids[None]).logits[0, :-1].log_softmax(-1)
                logprobs = table.gather(-1, ids[1:, None])[len(prompt) - 1 :, 0]
                if step == 0:
                    old.append(logprobs.detach())
                ratio = (logprobs - old[place]).exp()
                bounded = ratio.clamp(1 - EPSILON, 1 + EPSILON)
                loss = loss - torch.min(ratio * advantage, bounded * advantage).sum() / total
                clipped[step] += int((ratio * advantage > bounded * advantage).sum())
                place += 1
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
                parameter.grad = None
    assert clipped[0] == 0
    assert 0 < clipped[1] < total
    rows = lines(tmp_path / "out" / "metrics.jsonl")
    assert [row["clip_ratio/region_mean"] for row in rows] == pytest.approx([0, clipped[1] / total], abs=2 / total)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 5])
@pytest.mark.parametrize("steps_per_batch", [1, 2, 3])
def test_the_books_of_a_batch_for_several_steps(max_staleness: int, steps_per_batch: int) -> None:
    """Groups arrive at once; the policy of every step is served before the next. Nothing is sampled that would be too
    old at its first use, and as far ahead as allowed."""
    rules = Rules(2, 7, max_staleness=max_staleness, steps_per_batch=steps_per_batch)
    ledger, taken, sampled_by, ahead = Ledger(rules), [], {}, 0
    for step in range(7):
        ledger.serve(step)
        for ticket in ledger.dispatch():
            sampled_by[ticket.number] = step
            assert ledger.arrived(ticket.number, ticket.attempt, step) == "kept"
        if step % steps_per_batch == 0:
            batch = ledger.take()
            assert batch is not None
            assert not batch.dropped
            assert batch.step == step
            ages = [step - sampled_by[number] for number in batch.consumed]
            assert max(ages) <= max_staleness
            ahead = max(ahead, *ages)
            taken += batch.consumed
    assert taken == list(range(2 * -(-7 // steps_per_batch)))
    assert ledger.count("ready", "in_flight", "pending", "spare") == 0
    assert ahead == max_staleness


def test_beside_asynchronous_generation_each_prompt_is_trained_as_often_as_asked(tmp_path: Path) -> None:
    keys = {"num_iterations": 2, "steps_per_generation": 8, "generation_batch_size": None}
    path = write_run(
        tmp_path, max_steps=19, gradient_accumulation_steps=4, eval_steps=3, trl=keys,
        async_={"max_staleness": 2},
    )  # fmt: skip
    with serve() as served:
        train(config_for(path, served), 1)
        tickets = {int(place) for place, _ in served.generated()}
    rows, evals = (lines(tmp_path / "out" / f"{name}.jsonl") for name in ("metrics", "evals"))
    assert tickets == set(range(20)), "5 batches of 4 prompts, the last not used up"
    assert [row["step"] for row in rows] == list(range(1, 20))
    assert all(row["sample/staleness_max"] <= 2 for row in rows)
    assert [row["step"] for row in evals] == [0, 3, 6, 9, 12, 15, 18, 19]
    assert {row["step"] for row in lines(tmp_path / "out" / "samples.jsonl")} == {1, 5, 9, 13, 17}


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_live_run_goes_on_in_the_middle_of_a_batch(tmp_path: Path, max_staleness: int) -> None:
    path = write_run(
        tmp_path, max_steps=5, save_steps=1, trl={"num_iterations": 2}, test_datasets=None,
        async_={"max_staleness": max_staleness},
    )  # fmt: skip
    with serve() as served:
        train(config_for(path, served), 1)
        everything = served.generated()
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    with serve() as served:
        train(config_for(path, served, resume_from_checkpoint=checkpoint, output_dir=str(tmp_path / "resumed")), 1)
        assert served.generated() == everything[4:], "the last batch alone; the second is in the checkpoint"
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
