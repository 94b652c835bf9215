"""Frames from rank 0 arrive on every rank as they are, over real gloo processes."""

from __future__ import annotations

import multiprocessing
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rlx.learner.ranks import Ranks, StoppedByRankZero

FRAMES: list[list[bytes]] = [
    [b"one", b"", np.random.default_rng(0).bytes(300_001)],
    [],
    [b"", b""],
    [b""],
    [bytes(range(256))],
]


def call_twice(ranks: Ranks) -> list[bytes]:
    ranks.call(1)
    ranks.call(0)
    return [b"after both"]


def broadcast_all(rank: int, size: int, folder: str) -> None:
    """What this rank got, into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=size)
    ranks = Ranks(200)
    got: list[object] = [ranks.broadcast(frames if rank == 0 else []) for frames in FRAMES]
    got.append(ranks.from_first(lambda: [b"made on", str(rank).encode()]))
    got.append(ranks.sum_(torch.tensor([1.0, rank])).tolist() + ranks.max_(torch.tensor([rank])).tolist())

    helped: list[int] = []
    ranks.jobs = [lambda: helped.append(0), lambda: helped.append(1)]

    got.append([*ranks.from_first(partial(call_twice, ranks)), helped])

    def fail() -> list[bytes]:
        raise OSError("the service went away")

    try:
        ranks.from_first(fail)
    except (OSError, StoppedByRankZero) as error:
        got.append(type(error).__name__)
    Path(folder, f"{rank}.got").write_bytes(pickle.dumps(got))
    dist.barrier()
    del ranks
    dist.destroy_process_group()


@pytest.mark.slow
def test_every_rank_gets_the_bytes_of_rank_zero_and_leaves_when_it_fails(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=broadcast_all, args=(rank, 2, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    expected = [*FRAMES, [b"made on", b"0"], [2.0, 1.0, 1]]
    for rank, (helped, error) in enumerate([([], "OSError"), ([1, 0], "StoppedByRankZero")]):
        found = pickle.loads((tmp_path / f"{rank}.got").read_bytes())
        assert found == [*expected, [b"after both", helped], error]


def test_one_process_alone_broadcasts_to_itself_and_raises_its_own_errors() -> None:
    ranks = Ranks(1)
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.from_first(lambda: [b"x", b""]) == [b"x", b""]
    with pytest.raises(OSError, match="disk"):
        ranks.from_first(lambda: (_ for _ in ()).throw(OSError("disk")))


def test_what_ended_rank_zero_is_told_also_when_the_others_are_gone() -> None:
    class Alone(Ranks):
        def broadcast(self, frames: list[bytes] | None) -> list[bytes]:
            raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")

    with pytest.raises(OSError, match="disk"):
        Alone(1).from_first(lambda: (_ for _ in ()).throw(OSError("disk")))
