"""What a learner process says of its end, and what it does not import."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec

import pytest

from rlx.learner import process
from rlx.learner.ranks import StoppedByRankZero


@pytest.fixture
def one_process(tmp_path, monkeypatch):
    path = tmp_path / "cfg.yaml"
    path.write_text(f"base_model: x\nrl: grpo\ndatasets:\n  - path: a\noutput_dir: {tmp_path / 'out'}\n")
    monkeypatch.setattr("sys.argv", ["process", "1", str(path)])
    for of_a_process_of_its_own in ("die_with_parent", "loaded"):
        monkeypatch.setattr(process, of_a_process_of_its_own, lambda: None)

    def end_with(error: BaseException) -> int:
        def train(config, num_processes):
            raise error

        monkeypatch.setattr("rlx.learner.main.train", train)
        return process.main()

    return end_with


def test_a_lost_peer_is_a_line_and_a_defect_a_traceback(one_process, capsys):
    gone = "[pair.cc:537] gloo Read error [127.0.0.1]:32166: Connection reset by peer. GLHF!"
    assert one_process(RuntimeError(gone)) == 1
    assert capsys.readouterr().err == "learner process 0 lost the connection to another one\n"
    assert one_process(RuntimeError("shapes do not fit")) == 1
    assert re.search(r"(?s)^Traceback .*RuntimeError: shapes do not fit\n$", capsys.readouterr().err)


def test_a_full_disk_is_named_after_the_traceback(one_process, capsys, tmp_path, monkeypatch):
    last = f"error: the disk that holds {tmp_path / 'out'} is full. Free some space, or name another output_dir; "
    assert one_process(OSError(28, "No space left on device")) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(last)
    (tmp_path / "out").mkdir()
    assert one_process(RuntimeError("PytorchStreamWriter failed writing file")) == 1
    assert last not in capsys.readouterr().err
    monkeypatch.setattr(process, "_NO_ROOM_BYTES", 1 << 60)
    assert one_process(RuntimeError("PytorchStreamWriter failed writing file")) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(last)


def test_ctrl_c_is_quiet(one_process, capsys):
    assert one_process(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == ""


def test_another_rank_that_failed_leaves_rank_zero_the_time_to_say_why(one_process, monkeypatch):
    slept = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(process, "write_output_to", lambda log: None)
    monkeypatch.setattr(process.time, "sleep", slept.append)
    assert one_process(RuntimeError("of this rank alone")) == 1
    assert slept == [30]
    assert one_process(StoppedByRankZero("rank 0 stopped the run")) == 1
    assert sum(slept[1:]) > 600, "its trackers may take minutes to end"


def test_peft_finds_bitsandbytes_only_where_4_bits_are_asked_for(monkeypatch):
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    with process._without_bitsandbytes():
        assert find_spec("bitsandbytes") is None
    assert find_spec("bitsandbytes") is not None
    assert "bitsandbytes" not in sys.modules
