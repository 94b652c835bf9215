"""The examples of rollout functions, as their first lines say to run them, for fewer steps where that is enough."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from e2e_parts import SERVICE_START_S, Rlx, evaluations_shown, read_rows, rlx

from rlx.processes import free_port

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN_S = 2 * SERVICE_START_S


@contextmanager
def example(tmp_path: Path, name: str, *overrides: Any) -> Iterator[Rlx]:
    """`rlx run` of an example that writes to `tmp_path`."""
    config = EXAMPLES / name / f"{name}.yaml"
    port = ["--vllm.port", free_port("127.0.0.1", 18500), "--cluster.dashboard", "false"]
    with rlx(tmp_path, "run", config, "--output_dir", tmp_path / "out", *port, *overrides) as run:
        yield run


IN_TURN = ("--async.max_staleness", 0)
"""So that the version of each step is known."""


@pytest.mark.usefixtures("quickstart")
def test_the_conversation_learns_and_trains_what_was_sampled(tmp_path: Path) -> None:
    fewer = ("--max_steps", 24, "--eval_steps", 24, "--samples_per_step", 64, "--trl.num_generations_eval", 8, *IN_TURN)
    with example(tmp_path, "multi_turn", *fewer) as run:
        assert run.wait(RUN_S) == 0, run.output
        assert run.left() == []
    first, last = evaluations_shown(run.output, "episode")
    assert last > first + 0.1, run.output
    samples = read_rows(tmp_path / "out" / "samples.jsonl")
    assert {s["status"] for s in samples} == {"ok"}
    assert {1, 3} <= {s["turns"] for s in samples} <= {1, 2, 3}
    for s in samples:
        [row] = s["rows"]
        assert [v for v, _ in row["versions"]] == [s["step"], -1] * (s["turns"] - 1) + [s["step"]]
        assert [m["role"] for m in s["messages"]][: 2 * s["turns"] - 1 : 2] == ["assistant"] * s["turns"]
        assert [x is None for x in row["logprobs"]] == [v == -1 for v, n in row["versions"] for _ in range(n)]
        solved = s["messages"][2 * s["turns"] - 2]["content"] == s["columns"]["answer"]
        assert s["rewards"]["episode"] == (0.5 ** (s["turns"] - 1) if solved else 0.0)


@pytest.mark.usefixtures("quickstart")
@pytest.mark.parametrize("name", ["documented_rollout", "openai_agent"])
def test_functions_and_agents_written_for_others_are_trained(tmp_path: Path, name: str) -> None:
    with example(tmp_path, name, "--max_steps", 3, "--samples_per_step", 64, *IN_TURN) as run:
        assert run.wait(RUN_S) == 0, run.output
        assert run.left() == []
    samples = read_rows(tmp_path / "out" / "samples.jsonl")
    assert {(s["status"], s["exact"]) for s in samples} == {("ok", True)}
    assert len({r for s in samples for r in s["rewards"].values()}) > 1, "some are right and some are wrong"
    for s in samples:
        assert {v for row in s["rows"] for v, _ in row["versions"]} - {-1} == {s["step"]}


@pytest.mark.usefixtures("quickstart")
def test_an_openenv_environment_is_played_and_its_server_ends_with_the_run(tmp_path: Path) -> None:
    with example(tmp_path, "openenv_counter", "--max_steps", 3, "--samples_per_step", 64) as run:
        assert run.wait(RUN_S) == 0, run.output
        assert run.left() == []
    samples = read_rows(tmp_path / "out" / "samples.jsonl")
    assert {s["status"] for s in samples} == {"ok"}
    for s in samples:
        steps = s["step_rewards"]
        assert [(r["name"], r["turn"]) for r in steps] == [("counter", turn) for turn in range(s["turns"])]
        assert s["rewards"]["episode"] == sum(r["value"] for r in steps)


@pytest.mark.usefixtures("quickstart")
def test_one_episode_is_shown_token_by_token(tmp_path: Path) -> None:
    config = EXAMPLES / "multi_turn" / "multi_turn.yaml"
    port = ["--vllm.port", free_port("127.0.0.1", 18500), "--cluster.dashboard", "false"]
    with rlx(tmp_path, "rollout", "test", config, "--row", "3", "--output_dir", tmp_path / "out", *port) as shown:
        assert shown.wait(RUN_S) == 0, shown.output
        assert shown.left() == []
    lines = shown.output.splitlines()
    begin = next(i for i, line in enumerate(lines) if "training row 1 of 1" in line)
    assert lines[begin + 1] == "<|im_start|>user"
    assert lines[begin + 4].startswith("«")
    assert "<|im_end|>»[v0]" in lines[begin + 4]
    facts = dict(re.findall(r"│ (\S.*?) +│ (\S.*?) +│", shown.output))
    assert {"status", "turns", "tokens", "exact", "reward episode"} <= facts.keys()
    solved = float(facts["reward episode"]) > 0
    assert facts.get("sums/turns_to_solve") == (facts["turns"] if solved else None)
