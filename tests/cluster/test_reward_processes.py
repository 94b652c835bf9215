"""What ends a reward's process, and nobody else's."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlx.cluster.reward_pool import _Process
from rlx.processes import start_of


@pytest.fixture
def group_leader() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("is_another", [True, False])
def test_a_process_that_got_the_number_of_one_that_died_is_left_alone(
    tmp_path: Path, group_leader: subprocess.Popen[bytes], is_another: bool
) -> None:
    lost = _Process(0, "lost", tmp_path)
    lost.actor.runs_as(group_leader.pid)
    assert lost.actor.start == start_of(group_leader.pid)
    lost.actor.start -= is_another
    lost.kill()
    if is_another:
        assert group_leader.poll() is None
    else:
        assert group_leader.wait(20) == -9
