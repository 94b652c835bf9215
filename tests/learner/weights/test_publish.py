"""What a publish sends: versions that only grow, all or the difference, a manifest that fits the bytes, tied heads once."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from fake_service import TOKEN, serve
from safetensors.torch import load
from tiny_models import make_tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlx.errors import ServiceUnavailable, WeightBaseMismatch, WeightSyncError
from rlx.learner.weights.publish import Publisher, pack
from rlx.rollout import delta
from rlx.rollout.client import PhaseTimes, RolloutClient
from rlx.rollout.manifest import WeightManifest, checkpoint_specs, fingerprint
from rlx.safetensors_layout import read_layout


def tiny(folder: Path, tie: bool) -> PreTrainedModel:
    make_tiny_model(folder, tie=tie)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


class Odd(nn.Module):
    """Parameters of shapes that are easy to get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.tensor(3.25))
        self.none = nn.Parameter(torch.empty(0, 4))
        self.turned = nn.Parameter(torch.arange(6.0).view(2, 3).t())
        self.long = nn.Parameter(torch.linspace(-1, 1, 5001))


class Holder:
    """A service without workers: takes what is announced, and holds the bytes of the last commit.

    `sent` lists (version, nbytes that travelled, whether as a difference, gate). `fail` is called before each commit
    and may raise; with `lose_answers` the commit happens and the answer is lost.
    """

    def __init__(self, folder: Path, version: int = 0):
        self._folder, self.version = folder, version
        self.held: bytes | None = None
        self.sent: list[tuple[int, int, bool, bool]] = []
        self.manifests: list[WeightManifest] = []
        self.fail: Callable[[], None] = lambda: None
        self.lose_answers = False

    def workers(self) -> dict[str, Any]:
        return {"weight_version": self.version, "workers": []}

    def publish(self, manifest: WeightManifest, data: bytes | memoryview) -> PhaseTimes:
        if manifest.version <= self.version:
            raise WeightSyncError(f"weights {manifest.version} are not newer than the {self.version}")
        partial = manifest.base_fingerprint is not None
        if partial and (self.held is None or fingerprint(self.held) != manifest.base_fingerprint):
            raise WeightBaseMismatch("send them whole")
        assert len(data) == manifest.travels
        self.fail()
        whole = self._with_base(data) if partial else bytes(data)
        assert (len(whole), fingerprint(whole)) == (manifest.nbytes, manifest.fingerprint)
        assert {spec for spec, _, _ in read_layout(whole).values()} == set(manifest.tensors)
        self.held, self.version = whole, manifest.version
        self.sent.append((manifest.version, len(data), partial, manifest.gate))
        self.manifests.append(manifest)
        if self.lose_answers:
            raise ServiceUnavailable("the connection was lost")
        return PhaseTimes(0.1, 0.2, 0.4, 0.3, ("worker-1: late",))

    def _with_base(self, data: bytes | memoryview) -> bytes:
        base, out = self._folder / "base", self._folder / "out"
        base.write_bytes(self.held or b"")
        delta.apply(base, data, out)
        return out.read_bytes()


def nudge(model: nn.Module, count: int = 50) -> None:
    """Change `count` weights of the largest parameter."""
    largest = max(model.parameters(), key=lambda p: p.numel())
    with torch.no_grad():
        largest.view(-1)[:count] += 1.0


@pytest.fixture
def model() -> nn.Module:
    return Odd()


@pytest.fixture
def holder(tmp_path: Path) -> Holder:
    return Holder(tmp_path)


def publisher_to(holder: Holder, **settings: Any) -> Publisher:
    return Publisher(holder, torch.bfloat16, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "code", "size"), [(torch.bfloat16, "BF16", 2), (torch.float16, "F16", 2), (torch.float32, "F32", 4)]
)
def test_a_snapshot_is_a_safetensors_file_of_the_rollout_dtype(tmp_path: Path, dtype, code: str, size: int) -> None:
    for model in (tiny(tmp_path, tie=False), Odd()):
        packed = pack(model, dtype)
        parameters = dict(model.named_parameters())
        tensors = load(bytes(packed.payload))
        assert all(torch.equal(tensors[name], p.to(dtype)) for name, p in parameters.items())
        assert {t.name: (t.dtype, t.shape) for t in packed.tensors} == {
            name: (code, tuple(p.shape)) for name, p in parameters.items()
        }
        assert packed.itemsize == size
        assert packed.fingerprint == xxhash.xxh3_128_hexdigest(packed.payload)
        assert 0 < len(packed.payload) - size * sum(p.numel() for p in parameters.values()) < 20_000
        (tmp_path / "model.safetensors").write_bytes(packed.payload)
        assert set(checkpoint_specs(tmp_path)) == set(packed.tensors)


def test_a_snapshot_keeps_what_the_model_was_and_cannot_be_written_to(model: Odd) -> None:
    packed = pack(model, torch.float32)
    nudge(model)
    assert load(bytes(packed.payload))["long"][0] == -1
    assert packed.payload.readonly


def test_a_tied_head_travels_once_and_an_untied_one_of_its_own(tmp_path: Path) -> None:
    for tie in (True, False):
        names = [t.name for t in pack(tiny(tmp_path / str(tie), tie), torch.bfloat16).tensors]
        assert names.count("model.embed_tokens.weight") == 1
        assert ("lm_head.weight" in names) is not tie


def test_the_first_update_is_whole_and_gated_and_the_next_only_the_difference(model: Odd, holder: Holder) -> None:
    publisher = publisher_to(holder)
    first = publisher.publish(model)
    nudge(model)
    second = publisher.publish(model)
    whole = len(pack(model, torch.bfloat16).payload)
    assert holder.sent == [(1, whole, False, True), (2, second.nbytes, True, False)]
    assert second.nbytes < whole / 20
    assert holder.held == bytes(pack(model, torch.bfloat16).payload)
    assert (first.nbytes, first.transfer_s, first.pause_s, first.behind) == (whole, 0.2, 0.3, ("worker-1: late",))
    assert math.isnan(first.changed_fraction)
    assert first.metrics() == {"weights/bytes_sent": whole}
    assert second.metrics() == {
        "weights/bytes_sent": second.nbytes,
        "weights/changed_fraction": pytest.approx(50 / (whole / 2), rel=0.01),
    }


def test_everything_is_sent_where_most_changed_or_the_yaml_says_so(model: Odd, holder: Holder) -> None:
    publisher = publisher_to(holder)
    publisher.publish(model)
    nudge(model, 5001)
    most = publisher.publish(model)
    publisher = publisher_to(holder, transfer="full")
    publisher.publish(model)
    nudge(model)
    full = publisher.publish(model)
    assert [(partial, gate) for _, _, partial, gate in holder.sent] == [(False, True), (False, False)] * 2
    assert most.changed_fraction > 0.9
    assert math.isnan(full.changed_fraction)


def test_a_service_with_another_base_gets_everything_under_the_same_version(model: Odd, holder: Holder) -> None:
    publisher = publisher_to(holder)
    publisher.publish(model)
    holder.held = b"something else"
    nudge(model)
    times = publisher.publish(model)
    assert [(version, partial) for version, _, partial, _ in holder.sent] == [(1, False), (2, False)]
    assert times.nbytes == len(pack(model, torch.bfloat16).payload)
    nudge(model, 10)
    publisher.publish(model)
    assert holder.sent[-1][2], "the base is known again"


def test_a_service_that_was_started_anew_gets_the_same_version_back_whole_and_gated(
    model: Odd, tmp_path: Path, holder: Holder
) -> None:
    publisher = publisher_to(holder)
    publisher.publish(model)
    nudge(model)
    packed = publisher.snapshot(model)
    publisher.send(packed)
    holder.held, holder.version = None, 0
    publisher.forget()
    publisher.send(packed)
    assert publisher.version == holder.version == 2
    assert holder.sent[-1] == (2, len(packed.payload), False, True)
    nudge(model, 10)
    publisher.publish(model)
    assert [(version, partial, gate) for version, _, partial, gate in holder.sent][2:] == [
        (2, False, True), (3, True, False),
    ]  # fmt: skip
    holder.version = 8
    publisher.forget()
    publisher.send(packed)
    assert publisher.version == 9, "it had newer ones"


def test_a_lost_answer_is_made_good_by_sending_again(model: Odd, holder: Holder) -> None:
    publisher = publisher_to(holder)
    publisher.publish(model)
    nudge(model)
    packed = publisher.snapshot(model)
    holder.lose_answers = True
    with pytest.raises(ServiceUnavailable):
        publisher.send(packed)
    assert publisher.version == 1
    holder.lose_answers = False
    publisher.send(packed)
    assert [(version, partial) for version, _, partial, _ in holder.sent] == [(1, False), (2, True), (3, False)]
    assert publisher.version == 3


def test_a_failed_first_update_is_gated_when_it_is_sent_again(model: Odd, holder: Holder) -> None:
    def refuse() -> None:
        raise WeightSyncError("refused")

    publisher, holder.fail = publisher_to(holder), refuse
    with pytest.raises(WeightSyncError, match="refused"):
        publisher.publish(model)
    assert publisher.version is None
    holder.fail = lambda: None
    publisher.publish(model)
    assert holder.sent[-1][3], "nobody verified it"


def test_one_update_is_on_its_way_at_a_time_and_forgetting_does_not_wait(model: Odd, holder: Holder) -> None:
    publisher = publisher_to(holder)
    publisher.publish(model)
    begun, go_on, order = threading.Event(), threading.Event(), []

    def slow() -> None:
        order.append("begins")
        begun.set()
        assert go_on.wait(60)
        order.append("ends")

    holder.fail = slow
    packed = publisher.snapshot(model)
    threads = [threading.Thread(target=publisher.send, args=(packed,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    publisher.forget()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert order == ["begins", "ends"] * 2
    assert [(version, gate) for version, _, _, gate in holder.sent] == [(1, True), (2, False), (3, True)]


def test_the_probe_travels_with_every_update(tmp_path: Path, holder: Holder) -> None:
    model = tiny(tmp_path / "model", tie=True)
    publisher = publisher_to(holder, probe_ids=((1, 2, 3), (4, 5)))
    publisher.publish(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[1] += 1
    publisher.publish(model)
    first, second = (manifest.probe for manifest in holder.manifests)
    assert first is not None
    assert second is not None
    assert first.ids == second.ids == ((1, 2, 3), (4, 5))
    assert not np.allclose(first.logprobs[0], second.logprobs[0])


@pytest.mark.parametrize(("of_service", "of_checkpoint", "first"), [(0, 0, 1), (12, 3, 13), (2, 9, 10)])
def test_versions_start_above_service_and_checkpoint_and_grow_by_one(
    model: Odd, holder: Holder, of_service: int, of_checkpoint: int, first: int
) -> None:
    holder.version = of_service
    publisher = publisher_to(holder, last_version=of_checkpoint)
    assert publisher.version is None
    for version in (first, first + 1):
        publisher.publish(model)
        assert publisher.version == version == holder.version


def test_workers_load_what_was_sent_whole_and_as_a_difference(tmp_path: Path) -> None:
    model = tiny(tmp_path, tie=True)
    with serve() as served, RolloutClient(f"http://127.0.0.1:{served.port}", TOKEN) as client:
        publisher = Publisher(client, torch.bfloat16)
        all_times, packs = [], []
        for _ in range(3):
            packs.append(publisher.snapshot(model))
            all_times.append(publisher.send(packs[-1]))
            with torch.no_grad():
                model.get_input_embeddings().weight[:9] += 1
        assert [served.worker.published[v] for v in (1, 2, 3)] == [bytes(packed.payload) for packed in packs]
        assert all(0 < times.pause_s < times.total_s and times.behind == () for times in all_times)
        assert all_times[0].nbytes > 50 * all_times[1].nbytes


def test_a_second_learner_on_the_service_is_an_error_that_names_the_versions(tmp_path: Path) -> None:
    model = tiny(tmp_path, tie=True)
    with serve() as served, RolloutClient(f"http://127.0.0.1:{served.port}", TOKEN) as client:
        one, other = (Publisher(client, torch.bfloat16) for _ in range(2))
        one.publish(model)
        other.publish(model)
        with pytest.raises(WeightSyncError, match="weights 2 are not newer than the 2"):
            one.publish(model)
        assert one.version == 1
