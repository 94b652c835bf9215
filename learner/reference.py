"""The reference model that follows the policy (`trl.sync_ref_model`): TR-DPO, arXiv 2404.09656.

Not here: loading the initial reference (`model.py`), and the KL term (`losses.py`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

REFERENCE_FILE = "reference.safetensors"


def mix_into(reference: nn.Module, policy: nn.Module, share: float) -> None:
    """reference ← share · policy + (1 - share) · reference, parameter by parameter."""
    with torch.no_grad():
        for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
            old.lerp_(new.to(old.dtype), share)


def save_reference(reference: nn.Module, folder: Path) -> None:
    """Beside a checkpoint: from the first mixing on the reference is no longer the base model."""
    save_file({name: p.detach().contiguous() for name, p in reference.named_parameters()}, folder / REFERENCE_FILE)


def load_reference(reference: nn.Module, folder: Path) -> None:
    """What `save_reference` left; without the file, which a run without the key leaves out, nothing changes."""
    if not (folder / REFERENCE_FILE).exists():
        return
    saved = load_file(folder / REFERENCE_FILE)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(saved[name])
