"""An untied Llama in an ordinary run: the weights arrive; and the service outlives learners that fail or are killed."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from e2e_parts import END_S, LEARNER_START_S, TOLERANCE, client_of, difference, read_rows, rlx
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlx.processes import start_of
from rlx.wire import GroupRequest, Sampling

RUN_S = LEARNER_START_S + 60


def test_workers_of_an_untied_model_have_the_trained_weights(llama, tmp_path):
    sequences = [([k], [(7 * i + k) % 250 for i in range(32)]) for k in range(4)]
    with client_of(llama.config) as client:
        first = client.workers()["weight_version"] + 1
        options = ("--num-processes", "2", "--max_steps", 5, "--output_dir", tmp_path)
        with rlx(tmp_path, "train", llama.config, *options) as learner:
            assert learner.wait(RUN_S) == 0, learner.output
        assert difference(client, tmp_path, sequences) < TOLERANCE
        assert difference(client, llama.model, sequences) > 4 * TOLERANCE  # what a skipped sync would give
        assert first < client.workers()["weight_version"] <= first + 5
    steps = read_rows(tmp_path / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    assert max(step["sample/staleness_max"] for step in steps) <= 1  # the default of async.max_staleness
    versions = [row["versions"] for s in read_rows(tmp_path / "samples.jsonl") for row in s["rows"]]
    assert all(version >= first for runs in versions for version, _ in runs)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.tie_word_embeddings is False
    assert AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"] == AutoTokenizer.from_pretrained(llama.model)("a")["input_ids"]  # fmt: skip
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_reward_that_raises_stops_the_run_with_one_message(llama, tmp_path):
    options = ("--datasets", "[{path: raises.jsonl}]", "--output_dir", tmp_path)
    with rlx(tmp_path, "train", llama.config, *options, "--num-processes", "2") as learner:
        assert learner.wait(RUN_S) == 1
        assert learner.left() == []
    assert re.match(
        r"error: trl\.reward_funcs\[1\] \(rewards\.fault\) failed for \d+ of the last \d+ completions \(\d+ exception\); "
        r".*The first failure:\ntrl\.reward_funcs\[1\] \(rewards\.fault\) raised ZeroDivisionError",
        learner.last_message,
    ), learner.last_message
    assert f'{llama.folder / "rewards.py"}", line 9, in fault' in learner.last_message
    assert "return [1.0 / len(text[:0]) for text in completions]" in learner.last_message
    assert "/rewards/scoring.py" not in learner.output
    assert learner.last_message.count("Traceback") == 1
    assert learner.output.count("error: ") == 1
    notes = [line for line in learner.output.splitlines() if line.startswith("note: ")]
    assert len([n for n in notes if "rewards.fault: exception" in n]) <= 1, "told once before the run stops, if at all"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short", "returned 1 values for 4 completions. Return one for each."),
        ("nan", "returned nan for completion 0. Return a finite number, or None if not applicable."),
    ],
)
def test_a_reward_of_the_wrong_shape_or_nan_gives_no_value_and_says_why(llama, kind, message):
    ids, sampling = np.arange(5, dtype=np.int32), Sampling(max_tokens=4)
    fine = GroupRequest(f"fine/{kind}", "say 1", ids, 4, sampling)
    request = GroupRequest(f"fault/{kind}", "say 1", ids, 4, sampling, columns={"fault": kind})
    with client_of(llama.config) as client:
        client.rollouts([fine])
        [result] = client.rollouts([request])
    lower_case, fault = result.rewards
    assert np.isfinite(lower_case.values).all()
    assert np.isnan(fault.values).all()
    assert (fault.outcome, fault.failed) == ("invalid", 4)
    assert fault.error.startswith(f"trl.reward_funcs[1] (rewards.fault) {message}")


def is_rank_1(pid: int) -> bool:
    try:
        return b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # a child of one, which has ended
        return False


def test_a_learner_that_is_killed_leaves_the_service_to_the_next_and_so_does_ctrl_c(llama, tmp_path):
    options = ("--num-processes", "2", "--output_dir", tmp_path, "--max_steps", 10_000)
    with rlx(tmp_path, "train", llama.config, *options) as learner:
        learner.wait_for("step 2/", RUN_S)
        ranks = [pid for pid, line in learner.processes().items() if "rlx.learner.process" in line]
        [rank_1, *_] = sorted((pid for pid in ranks if is_rank_1(pid)), key=lambda pid: start_of(pid) or 2**63)
        os.kill(rank_1, signal.SIGKILL)
        assert learner.wait(END_S) == 137
        assert learner.left() == []
    assert learner.last_message.startswith("error: learner process 1 was killed by signal 9, SIGKILL")
    assert learner.output.splitlines()[-1].startswith("no checkpoint had been written (save_steps"), learner.output
    with rlx(tmp_path, "train", llama.config, *options) as learner:
        learner.wait_for("step 2/", RUN_S)
        learner.ctrl_c()
        assert learner.wait(END_S) == 130
        assert learner.left() == []
    assert learner.output.splitlines()[-1].startswith("stopped by Ctrl-C; "), learner.output
    with client_of(llama.config) as client:
        assert client.health()["status"] == "ok"
