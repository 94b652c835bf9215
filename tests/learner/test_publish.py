"""What a publish sends: versions that only grow, a manifest that fits the bytes, tied heads once, the rollout type."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import xxhash
from fake_service import TOKEN, serve
from safetensors.torch import load
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlx.errors import WeightSyncError
from rlx.learner.publish import Publisher, pack
from rlx.rollout.client import RolloutClient


def tiny(folder: Path, tie: bool) -> PreTrainedModel:
    make_tiny_model(folder, tie=tie)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("dtype", "code", "size"), [(torch.bfloat16, "BF16", 2), (torch.float16, "F16", 2), (torch.float32, "F32", 4)]
)
def test_the_manifest_tells_names_shapes_type_and_fingerprint_of_the_bytes(tmp_path, dtype, code, size) -> None:
    model = tiny(tmp_path, tie=False)
    manifest, payload = pack(model, dtype, 7)
    tensors = load(payload)
    parameters = dict(model.named_parameters())
    assert (manifest.version, manifest.nbytes) == (7, len(payload))
    assert manifest.fingerprint == xxhash.xxh3_128_hexdigest(payload)
    assert {t.name: (t.dtype, t.shape) for t in manifest.tensors} == {
        name: (code, tuple(p.shape)) for name, p in parameters.items()
    }
    assert all(torch.equal(tensors[name], p.to(dtype)) for name, p in parameters.items())
    assert 0 < len(payload) - size * sum(p.numel() for p in parameters.values()) < 20_000


def test_a_tied_head_travels_once_and_an_untied_one_of_its_own(tmp_path: Path) -> None:
    for tie in (True, False):
        manifest, _ = pack(tiny(tmp_path / str(tie), tie), torch.bfloat16, 1)
        names = [t.name for t in manifest.tensors]
        assert names.count("model.embed_tokens.weight") == 1
        assert ("lm_head.weight" in names) is not tie


@pytest.mark.parametrize(("of_service", "of_checkpoint", "first"), [(0, 0, 1), (12, 3, 13), (2, 9, 10)])
def test_versions_start_above_service_and_checkpoint_and_grow_by_one(
    tmp_path: Path, of_service: int, of_checkpoint: int, first: int
) -> None:
    model = tiny(tmp_path, tie=True)
    with serve(version=of_service) as served, RolloutClient(f"http://127.0.0.1:{served.port}", TOKEN) as client:
        publisher = Publisher(client, torch.bfloat16, of_checkpoint)
        assert publisher.version is None
        for version in (first, first + 1):
            times = publisher.publish(model)
            assert publisher.version == version == served.worker.version
            assert 0 < times.pause_s < times.total_s
            with torch.no_grad():
                model.get_input_embeddings().weight += 1
        sent = [load(served.worker.published[v])["model.embed_tokens.weight"] for v in (first, first + 1)]
        assert (sent[1] - sent[0]).float().mean().item() == pytest.approx(1, abs=0.01)


def test_a_second_learner_on_the_service_is_an_error_that_names_the_versions(tmp_path: Path) -> None:
    model = tiny(tmp_path, tie=True)
    with serve() as served, RolloutClient(f"http://127.0.0.1:{served.port}", TOKEN) as client:
        one, other = (Publisher(client, torch.bfloat16) for _ in range(2))
        one.publish(model)
        other.publish(model)
        with pytest.raises(WeightSyncError, match="weights 2 are not newer than the 2"):
            one.publish(model)
        assert one.version == 1
