"""Weight updates of a whole service: two phases, bytes that do not fit, workers that do not take them."""

from __future__ import annotations

import asyncio
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import xxhash
from service_parts import PATIENCE_S, QUICK, LocalWorker, chunks, group, make_service, started, weights

from rlx.errors import DeadlineExceeded, WeightBaseMismatch, WeightSyncError
from rlx.rollout import delta, weights_store
from rlx.rollout.engine_worker import EngineWorker
from rlx.rollout.fake_engine import FakeEngine
from rlx.rollout.manifest import WeightManifest, check_manifest
from rlx.safetensors_layout import TensorSpec
from rlx.wire import Sampling


async def publish(service, version, data, sent=None):
    await service.weights.announce(weights(version, data))
    await service.weights.receive(version, chunks(data if sent is None else sent))
    return await service.weights.commit(version)


async def test_published_weights_reach_every_worker_and_stamp_the_next_tokens():
    workers, data = [LocalWorker("a"), LocalWorker("b")], os.urandom(10_000)
    async with started(make_service(workers)) as service:
        times = await publish(service, 3, data)
        assert [worker.committed for worker in workers] == [[data], [data]]
        assert (times.version, times.nbytes) == (3, 10_000)
        assert (await service.rollout(group())).episodes[0].rows[0].versions == ((3, 3),)
        assert {status.weight_version for status in service.workers()} == {3}
        assert await service.weights.commit(3) == times


async def test_the_weight_file_is_private_and_stays_for_those_that_catch_up(monkeypatch, tmp_path):
    monkeypatch.setattr(weights_store, "SHARED_MEMORY", tmp_path)
    modes = []

    class Looking(LocalWorker):
        async def commit(self, manifest, path):
            modes.append(Path(path).parent.stat().st_mode & 0o777)
            return await super().commit(manifest, path)

    async with started(make_service([Looking()])) as service:
        await publish(service, 1, b"abcd")
        assert modes == [0o700]
        assert [path.read_bytes() for path in tmp_path.glob("*/*")] == [b"abcd"]
        await publish(service, 2, b"efgh")
        assert [path.read_bytes() for path in tmp_path.glob("*/*")] == [b"efgh"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sent", "message"),
    [(b"abcX", "changed on the way"), (b"abc", "4 bytes were announced, 3 came"), (b"abcde", "more than the 4")],
)
async def test_wrong_bytes_are_refused_the_old_version_serves_and_the_next_publish_works(sent, message):
    worker = LocalWorker()
    async with started(make_service([worker])) as service:
        with pytest.raises(WeightSyncError, match=f"weights 1: .*{message}"):
            await publish(service, 1, b"abcd", sent)
        assert worker.committed == []
        assert (await service.rollout(group("old"))).episodes[0].rows[0].versions == ((0, 3),)
        await publish(service, 1, b"abcd")
        assert (await service.rollout(group("new"))).episodes[0].rows[0].versions == ((1, 3),)


async def test_weights_that_are_not_newer_are_refused_with_what_to_write():
    async with started(make_service([LocalWorker()])) as service:
        await publish(service, 2, b"abcd")
        with pytest.raises(WeightSyncError, match="publish them as 3 or more"):
            await service.weights.announce(weights(2, b"efgh"))


async def test_a_learner_that_crashed_before_the_commit_does_not_block_the_next(monkeypatch, tmp_path):
    monkeypatch.setattr(weights_store, "SHARED_MEMORY", tmp_path)
    worker, second_half = LocalWorker(), asyncio.Event()

    async def stalls():
        yield b"ab"
        await second_half.wait()
        yield b"cd"

    async with started(make_service([worker])) as service:
        await service.weights.announce(weights(1, b"abcd"))
        stalled = asyncio.create_task(service.weights.receive(1, stalls()))
        await asyncio.sleep(0.05)
        await publish(service, 1, b"efgh")
        second_half.set()
        with pytest.raises(WeightSyncError, match="replaced by a later announcement"):
            await stalled
        assert worker.committed == [b"efgh"]
        assert [path.read_bytes() for path in tmp_path.glob("*/*")] == [b"efgh"]
    assert list(tmp_path.iterdir()) == []


async def test_an_update_that_was_not_committed_leaves_with_the_next_or_with_the_service(monkeypatch, tmp_path):
    monkeypatch.setattr(weights_store, "SHARED_MEMORY", tmp_path)
    async with started(make_service([LocalWorker()])) as service:
        for data in (b"abcd", b"efgh"):
            await service.weights.announce(weights(1, data))
            await service.weights.receive(1, chunks(data))
            assert [path.read_bytes() for path in tmp_path.glob("*/*")] == [data]
    assert list(tmp_path.iterdir()) == []


async def test_bytes_that_do_not_come_in_time_are_given_up():
    settings = QUICK.model_copy(update={"publish_timeout": 0.2})

    async def stalls():
        yield b"ab"
        await asyncio.Event().wait()

    async with started(make_service([LocalWorker()], settings=settings)) as service:
        await service.weights.announce(weights(1, b"abcd"))
        with pytest.raises(DeadlineExceeded, match=r"did not send weights 1 within 0\.2 s"):
            await service.weights.receive(1, stalls())
        service.weights._timeout = PATIENCE_S
        await publish(service, 1, b"abcd")


async def test_a_commit_without_announcement_or_bytes_is_refused():
    async with started(make_service([LocalWorker()])) as service:
        with pytest.raises(WeightSyncError, match="not announced"):
            await service.weights.commit(1)
        await service.weights.announce(weights(1, b"abcd"))
        with pytest.raises(WeightSyncError, match="have not come yet"):
            await service.weights.commit(1)


def test_leftover_folders_go_when_nobody_holds_them(monkeypatch, tmp_path):
    monkeypatch.setattr(weights_store, "SHARED_MEMORY", tmp_path)
    held = weights_store.WeightFile(weights(1, b"abcd"))
    (tmp_path / "rlx-weights-leftover").mkdir()
    (tmp_path / "of-somebody-else").mkdir()
    weights_store.remove_leftovers()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([held.path.parent.name, "of-somebody-else"])
    held.remove()


async def test_tokens_in_flight_during_an_update_carry_both_versions():
    array = np.arange(8, dtype=np.float32)
    data = safetensors.numpy.save({"w": array})
    specs = (TensorSpec("w", "F32", (8,)),)
    is_slow = True
    engines = [FakeEngine(specs, decode_s=lambda batch: 0.02 if is_slow else 0.0, seed=seed) for seed in (1, 2)]
    service = make_service([EngineWorker(f"w-{i}", engine) for i, engine in enumerate(engines)])
    async with started(service):
        long = replace(group(n=8), sampling=Sampling(max_tokens=400))
        running = asyncio.create_task(service.rollout(long))
        while not any(engine.load().generated_tokens for engine in engines):
            await asyncio.sleep(0.001)
            assert not running.done()
        manifest = WeightManifest(1, len(data), xxhash.xxh3_128_hexdigest(data), specs)
        await service.weights.announce(manifest)
        await service.weights.receive(1, chunks(data))
        await service.weights.commit(1)
        is_slow = False
        seen = [tuple(version for version, _ in e.rows[0].versions) for e in (await running).episodes]
        assert (0, 1) in seen
        assert set(seen) <= {(0,), (0, 1)}
        after = await service.rollout(group("after"))
        assert {e.rows[0].versions[0][0] for e in after.episodes} == {1}


# --- differences, and the file that stays ---


def blocks(seed, changed=()):
    values = np.random.default_rng(0).integers(0, 2**16, 5000, dtype=np.uint16)
    values[list(changed)] += 1 + seed
    return values.tobytes()


def difference_to(base, version, data):
    difference = delta.encode(base, data).data
    return replace(
        weights(version, data), base_fingerprint=xxhash.xxh3_128_hexdigest(base), transfer_nbytes=len(difference)
    ), difference


async def publish_difference(service, manifest, difference):
    await service.weights.announce(manifest)
    await service.weights.receive(manifest.version, chunks(difference, 100))
    return await service.weights.commit(manifest.version)


async def test_a_difference_to_the_last_update_makes_the_whole_of_the_next_bit_by_bit():
    worker = LocalWorker()
    async with started(make_service([worker])) as service:
        old = blocks(0)
        await publish(service, 1, old)
        for version in (2, 3):
            new = blocks(version, changed=range(version, 5000, 500))
            manifest, difference = difference_to(old, version, new)
            times = await publish_difference(service, manifest, difference)
            assert worker.committed[-1] == new
            assert times.nbytes == len(difference) < len(new) / 30
            old = new


@pytest.mark.parametrize("committed", [[], [b"abcd"]])
async def test_a_difference_to_other_weights_is_refused_at_the_announcement_and_the_whole_is_taken(committed):
    async with started(make_service([LocalWorker()])) as service:
        for version, data in enumerate(committed, 1):
            await publish(service, version, data)
        manifest, _ = difference_to(blocks(0), 5, blocks(1, changed=[7]))
        with pytest.raises(WeightBaseMismatch, match=r"weights 5 are a difference .* send them whole"):
            await service.weights.announce(manifest)
        assert (await publish(service, 5, blocks(1, changed=[7]))).version == 5


async def test_an_announced_update_is_not_a_base_before_it_was_committed():
    async with started(make_service([LocalWorker()])) as service:
        await publish(service, 1, b"abcd")
        await service.weights.announce(weights(2, blocks(0)))
        await service.weights.receive(2, chunks(blocks(0)))
        with pytest.raises(WeightBaseMismatch):
            await service.weights.announce(difference_to(blocks(0), 3, blocks(1, changed=[7]))[0])


async def test_a_difference_that_makes_other_weights_than_announced_is_refused_and_the_old_serve():
    worker = LocalWorker()
    async with started(make_service([worker])) as service:
        await publish(service, 1, blocks(0))
        _, difference = difference_to(blocks(0), 2, blocks(1, changed=[7]))
        manifest, other = difference_to(blocks(0), 2, blocks(1, changed=[8]))
        manifest = replace(manifest, transfer_nbytes=len(difference))
        with pytest.raises(WeightSyncError, match="made for another update"):
            await publish_difference(service, manifest, difference)
        damaged = bytearray(other)
        damaged[-1] ^= 1
        with pytest.raises(WeightSyncError, match="damaged"):
            await publish_difference(service, replace(manifest, transfer_nbytes=len(other)), damaged)
        with pytest.raises(WeightSyncError, match="were announced, 20 came"):
            await publish_difference(service, manifest, difference[:20])
        assert len(worker.committed) == 1
        await publish_difference(service, replace(manifest, transfer_nbytes=len(other)), other)
        assert worker.committed[-1] == blocks(1, changed=[8])


async def test_memory_holds_the_current_update_and_at_most_the_one_that_comes(monkeypatch, tmp_path):
    monkeypatch.setattr(weights_store, "SHARED_MEMORY", tmp_path)
    most = []

    class Looking(LocalWorker):
        async def announce(self, manifest):
            most.append(len(list(tmp_path.iterdir())))

        async def commit(self, manifest, path):
            most.append(len(list(tmp_path.iterdir())))
            return await super().commit(manifest, path)

    async with started(make_service([Looking()])) as service:
        for version in range(1, 6):
            await service.weights.announce(weights(version, b"dead"))
            await service.weights.receive(version, chunks(b"dead"))
            assert len(list(tmp_path.iterdir())) == (1 if version == 1 else 2)
            await publish(service, version, b"%04d" % version)
            assert [path.read_bytes() for path in tmp_path.glob("*/*")] == [b"%04d" % version]
    assert max(most) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_cleared_away_before_it_was_locked_is_made_anew(monkeypatch, tmp_path):
    monkeypatch.setattr(weights_store, "SHARED_MEMORY", tmp_path)
    make, made = tempfile.mkdtemp, []

    def make_and_lose(**options):
        made.append(make(**options))
        if len(made) == 1:
            weights_store.remove_leftovers()
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_lose)
    file = weights_store.WeightFile(weights(1, b"abcd"))
    weights_store.remove_leftovers()
    assert [str(path) for path in tmp_path.iterdir()] == made[1:] == [str(file.path.parent)]
    file.remove()


def test_a_file_that_somebody_reads_stays_until_he_has_done(monkeypatch, tmp_path):
    monkeypatch.setattr(weights_store, "SHARED_MEMORY", tmp_path)
    file = weights_store.WeightFile(weights(1, b"abcd"))
    with file.held(), file.held() as path:
        file.remove()
        assert path.parent.is_dir()
    assert list(tmp_path.iterdir()) == []
    file.remove()


async def test_an_update_that_a_session_discards_while_it_comes_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(weights_store, "SHARED_MEMORY", tmp_path)
    begun = asyncio.Event()

    async def stalls():
        yield b"ab"
        begun.set()
        await asyncio.sleep(0.01)
        yield b"cd"

    async with started(make_service([LocalWorker()])) as service:
        await service.weights.announce(weights(1, b"abcd"))
        coming = asyncio.create_task(service.weights.receive(1, stalls()))
        await begun.wait()
        service.weights.discard()
        with pytest.raises(WeightSyncError, match="weights 1 were replaced"):
            await coming
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(WeightSyncError, match="not announced"):
            await service.weights.commit(1)


async def test_the_outcome_tells_every_workers_version_and_the_longest_pause():
    slow, quick = LocalWorker("slow"), LocalWorker("quick")
    async with started(make_service([slow, quick])) as service:
        await service.weights.announce(weights(1, b"abcd"))
        await service.weights.receive(1, chunks(b"abcd"))
        slow.pause_s, quick.pause_s = 0.4, 0.1
        body = (await service.weights.commit(1)).to_json()
        assert body["workers"] == {"slow": 1, "quick": 1}
        assert body["behind"] == []
        assert body["pause_s"] == 0.4


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ((), "1 tensors of this model are missing, the first is 'layer'"),
        (
            (TensorSpec("layer", "F32", (2,)), TensorSpec("more", "F32", (2,))),
            "are not in this model, the first is 'more'",
        ),
        ((TensorSpec("layer", "F32", (3,)),), r"has the shape \(3,\), this model needs \(2,\)"),
    ],
)
def test_weights_of_another_model_say_that_the_two_commands_had_different_models(tensors, told):
    manifest = replace(weights(1, b""), tensors=tensors)
    with pytest.raises(
        WeightSyncError, match=f"{told}; start the service from the YAML of the run, with the same base_model"
    ):
        check_manifest(manifest, [TensorSpec("layer", "F32", (2,))], False, 0)
