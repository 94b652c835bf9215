"""The reference model that follows the policy (`trl.sync_ref_model`): TR-DPO, arXiv 2404.09656.

Not here: loading the initial reference (`model.py`), and the KL term (`objective/losses.py`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from rlx.learner.policy.sharding import give_back, load_whole, whole_state

REFERENCE_FILE = "reference.safetensors"


def mix_into(reference: nn.Module, policy: nn.Module, share: float) -> None:
    """reference ← share · policy + (1 - share) · reference, parameter by parameter."""
    for model in (reference, policy):
        give_back(model)
    with torch.no_grad():
        for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
            old.lerp_(new.to(old.dtype), share)


def save_reference(reference: nn.Module, folder: Path, is_first: bool) -> None:
    """Beside a checkpoint: from the first mixing on the reference is no longer the base model. All ranks call this, and
    the first writes."""
    state = whole_state(reference, None, keep=is_first)
    if is_first:
        names = [name for name, _ in reference.named_parameters()]
        save_file({name: state[name].contiguous() for name in names}, folder / REFERENCE_FILE)


def load_reference(reference: nn.Module, folder: Path) -> None:
    """What `save_reference` left; without the file, which a run without the key leaves out, nothing changes."""
    if not (folder / REFERENCE_FILE).exists():
        return
    load_whole(dict(reference.named_parameters()), [folder / REFERENCE_FILE])
