"""`rlx run`: everything in one terminal, and nothing left when it ends, also by Ctrl-C."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_parts import (
    END_S,
    LEARNER_START_S,
    SERVICE_START_S,
    Rlx,
    evaluations_shown,
    read_rows,
    rlx,
    steps_shown,
    url_of,
    write_config,
    write_rows,
)
from PIL import Image
from tiny_models import make_tiny_model

from rlx.processes import is_free

RUN_S = 2 * SERVICE_START_S


def write_project(folder: Path) -> Path:
    folder.mkdir()
    write_rows(folder / "prompts.jsonl", [{"prompt": f"count to {number}"} for number in range(20)])
    return write_config(
        folder / "run.yaml",
        base_model=str(make_tiny_model(folder / "model", tie=True)),
        datasets=[{"path": "prompts.jsonl"}],
        val_set_size=4,
        trl={"reward_funcs": ["rlx.rewards.length"]},
        save_steps=2,
        save_total_limit=1,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rlx, Rlx]]:
    """Two at once on one machine, a short one and a long one, each with its own Ray and port."""
    short = write_project(tmp_path_factory.getbasetemp() / "short")
    with rlx(short.parent, "run", short, "--num-processes", "2", "--max_steps", 3) as first:
        first.wait_for("starting Ray", LEARNER_START_S)  # its port is taken now
        long = write_project(tmp_path_factory.getbasetemp() / "long")
        with rlx(long.parent, "run", long, "--num-processes", "2", "--max_steps", 10_000) as second:
            yield first, second


def test_a_run_in_one_terminal_trains_and_leaves_nothing(runs):
    run, _ = runs
    assert run.wait(RUN_S) == 0, run.output
    assert run.left() == []
    assert not answers(run)
    lines = run.output.splitlines()
    assert lines[0].startswith("service: starting Ray")
    assert any(line.startswith("service: ready: ") for line in lines)
    assert steps_shown(run.output) == [1, 2, 3]
    assert len(evaluations_shown(run.output, "length")) == 2
    assert "before (step 0)" in run.output
    assert "after (step 3)" in run.output
    assert "Traceback" not in run.output
    with Image.open(run.folder / "out" / "learning_curve.png") as curve:
        assert curve.format == "PNG"
        curve.verify()
    samples = read_rows(run.folder / "out" / "samples.jsonl")
    assert {s["step"] for s in samples} == {1, 2, 3}
    assert all(s["prompt"].startswith("count to ") and isinstance(s["completion"], str) for s in samples)


def test_ctrl_c_in_training_ends_everything(runs):
    _, run = runs
    run.wait_for("step 3/", RUN_S)  # the checkpoint of the second is whole
    assert answers(run)
    run.ctrl_c()
    assert run.wait(END_S) == 130
    assert run.left() == []
    assert not answers(run)
    kept = r"stopped by Ctrl-C; .+/checkpoint-\d+ is kept\. To go on: rlx run run\.yaml --num-processes 2 "
    assert re.match(kept, run.output.splitlines()[-1]), run.output


def answers(run: Rlx) -> bool:
    """Whether somebody listens on the port of the run."""
    return not is_free("127.0.0.1", int(url_of(run.folder / "run.yaml").rpartition(":")[2]))
