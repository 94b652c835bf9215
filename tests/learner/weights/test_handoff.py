"""A service on the learner's machine reads the weights in the learner's memory, which is written again once nobody does."""

from __future__ import annotations

import fcntl
import gc
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_service import TOKEN, serve
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM

from rlx.learner.weights.handoff import Buffers, buffers_for
from rlx.learner.weights.publish import Publisher
from rlx.rollout.client import RolloutClient
from rlx.rollout.manifest import Offer, WeightManifest
from rlx.rollout.weights_store import WeightFile


def tiny(folder: Path) -> torch.nn.Module:
    make_tiny_model(folder, tie=True)
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder)
    return model


def change(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1


def test_nothing_is_sent_and_workers_load_what_was_packed_out_of_a_few_buffers(tmp_path: Path) -> None:
    model, buffers = tiny(tmp_path), Buffers()
    with serve() as served, RolloutClient(f"http://127.0.0.1:{served.port}", TOKEN) as client:
        publisher, packed, sent = Publisher(client, torch.bfloat16, buffers=buffers), {}, []
        publish = client.publish
        client.publish = lambda *given: (sent.append(publish(*given)), sent[-1])[1]  # type: ignore[method-assign]
        for _ in range(6):
            snapshot = publisher.snapshot(model)
            publisher.send(snapshot)
            packed[publisher.version] = bytes(snapshot.payload)
            del snapshot
            change(model)
        assert served.worker.published == packed
        assert len(set(packed.values())) == 6
        assert all(times.taken_over for times in sent)
        assert len(buffers._buffers) <= 4


def test_memory_that_somebody_reads_is_not_written_again() -> None:
    buffers = Buffers()
    view, offer = buffers.take(8)
    view[:] = b"first---"
    buffers.open(offer)
    with open(f"/proc/{offer.pid}/fd/{offer.fd}", "rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        del view
        gc.collect()
        other, its = buffers.take(8)
        assert its.fd != offer.fd
        assert reader.read() == b"first---"
    _, again = buffers.take(8)
    assert again.fd == offer.fd, "nobody reads it any more"
    assert other.nbytes == 8


def test_memory_that_is_being_written_or_is_not_what_it_is_said_to_be_is_not_taken_over() -> None:
    buffers = Buffers()
    view, offer = buffers.take(8)
    file = WeightFile(WeightManifest(1, 8, "", ()))
    try:
        assert not file.take_over(offer), "it is being written"
        buffers.open(offer)
        wrong = [
            replace(offer, name=f"{offer.name}0"),
            replace(offer, fd=0, name="rlx-weights-0"),
            Offer(2**22, 3, offer.name),
        ]
        assert not any(file.take_over(each) for each in wrong)
        assert file.take_over(offer)
        view[:] = b"12345678"
        assert file.path.read_bytes() == b"12345678"
        longer = WeightFile(WeightManifest(1, 9, "", ()))
        assert not longer.take_over(offer)
        longer.remove()
    finally:
        file.remove()
    assert not file.path.exists()


def test_a_service_that_cannot_look_is_sent_the_bytes_and_then_differences(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(WeightFile, "take_over", lambda self, offer: False)
    model = tiny(tmp_path)
    with serve() as served, RolloutClient(f"http://127.0.0.1:{served.port}", TOKEN) as client:
        publisher = Publisher(client, torch.bfloat16, buffers=Buffers())
        first = publisher.publish(model)
        with torch.no_grad():
            model.get_input_embeddings().weight[:3] += 1
        snapshot = publisher.snapshot(model)
        second = publisher.send(snapshot)
        assert served.worker.published[2] == bytes(snapshot.payload)
        assert second.nbytes < first.nbytes / 50


@pytest.mark.parametrize(
    ("url", "near"), [("http://127.0.0.1:8000", True), ("http://localhost:1", True), ("http://[::1]:1", True),
                      ("http://10.0.0.7:8000", False), ("https://gpu-7:443", False)],
)  # fmt: skip
def test_only_a_service_at_a_loopback_address_is_offered_memory(url: str, near: bool) -> None:
    assert (buffers_for(url) is not None) == (near and hasattr(os, "memfd_create"))
