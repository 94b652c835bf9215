"""Weight updates for tests: safetensors files with their manifests, and a model trained a few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from rlx.rollout.manifest import WeightManifest, checkpoint_specs, fingerprint
from rlx.safetensors_layout import read_layout

PROMPT = np.arange(5, 69, dtype=np.int32)


def write_update(path: Path, version: int, tensors: dict[str, torch.Tensor]) -> WeightManifest:
    """Save `tensors` to `path` and describe the file."""
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path)
    data = path.read_bytes()
    specs = tuple(spec for spec, _, _ in read_layout(data).values())
    return WeightManifest(version, len(data), fingerprint(data), specs)


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a learner sends: each parameter once, so no LM head where it is tied."""
    return dict(model.named_parameters())


def random_adapter(folder: str | Path, rank: int = 8) -> dict[str, torch.Tensor]:
    """Updates of every linear layer of the model in `folder`, under PEFT's names, that move its log-probabilities."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    for spec in checkpoint_specs(Path(folder)):
        if spec.name.endswith("_proj.weight"):
            name, (rows, columns) = f"base_model.model.{spec.name.removesuffix('.weight')}", spec.shape
            tensors[f"{name}.lora_A.weight"] = 0.1 * torch.randn(rank, columns, generator=generator)
            tensors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(rows, rank, generator=generator)
    return tensors


def train_a_little(model: torch.nn.Module, steps: int = 4, lr: float = 3e-3) -> None:
    """A few AdamW steps on fixed random tokens, enough to move every log-probability visibly."""
    generator = torch.Generator().manual_seed(7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    ids_BT = torch.randint(0, model.config.vocab_size, (4, 48), generator=generator)
    for _ in range(steps):
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def reference_logprobs(model: torch.nn.Module, ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log p(ids[t] | ids[:t]) for t = 1 … T-1 by transformers, computed in float32: ids [T] → [T-1]."""
    logits_TV = model(input_ids=ids[None]).logits[0, :-1].float() / temperature
    return torch.log_softmax(logits_TV, -1).gather(1, ids[1:, None])[:, 0]
