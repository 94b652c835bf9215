"""Which devices the rollout engines get, and which are left to the learner. No Ray and no torch in here.

The service takes the last N = tensor_parallel_size × data_parallel_size GPUs, the learner the first ones. Without
GPUs each engine takes tensor_parallel_size CPU slots.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from rlx.config import Config
from rlx.errors import ConfigError

_NVIDIA_SMI_TIMEOUT_S = 20


@dataclass(frozen=True)
class Inventory:
    """`gpus` as CUDA_VISIBLE_DEVICES names them; `place` is what messages call the owner of the devices."""

    gpus: tuple[str, ...]
    cpus: int
    place: str = "this machine"


@dataclass(frozen=True)
class Layout:
    """`num_engines` engines with `devices_per_engine` of `resource` (GPU or CPU) each."""

    resource: str
    num_engines: int
    devices_per_engine: int
    service_gpus: tuple[str, ...]
    learner_gpus: tuple[str, ...]

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray reserves for one engine."""
        return {self.resource: float(self.devices_per_engine)}

    def describe(self) -> str:
        each = f"{self.devices_per_engine} {self.resource}{'s' if self.devices_per_engine > 1 else ''} each"
        return f"{self.num_engines} vLLM engine{'s' if self.num_engines > 1 else ''}, {each}"


def this_machine() -> Inventory:
    """The GPUs that this process may use, and the CPU cores."""
    return Inventory(_visible_gpus(_installed_gpus()), len(os.sched_getaffinity(0)))


def plan_layout(inventory: Inventory, config: Config, num_learners: int = 0) -> Layout:
    """Divide the devices. `num_learners` are the learner's processes on the same machine, one GPU each; 0: elsewhere.

    Raises ConfigError when there are too few devices.
    """
    per_engine, engines = config.vllm.tensor_parallel_size, config.vllm.data_parallel_size
    resource = "GPU" if inventory.gpus else "CPU"
    have = len(inventory.gpus) if inventory.gpus else inventory.cpus
    need = per_engine * engines
    if need > have:
        raise too_few_devices(config, resource, have, inventory.place)
    if resource == "CPU":
        return Layout(resource, engines, per_engine, (), ())
    learner, service = inventory.gpus[: have - need], inventory.gpus[have - need :]
    if num_learners > len(learner):
        raise ConfigError(
            f"{num_learners} learner process{'es' if num_learners > 1 else ''} (--num-processes) and {need} GPU"
            f"{'s' if need > 1 else ''} for vLLM (vllm.tensor_parallel_size × vllm.data_parallel_size = {per_engine} × "
            f"{engines}) need {num_learners + need} GPUs, and {inventory.place} has {have}. "
            + (f"Write `--num-processes {len(learner)}`." if learner else _smaller(per_engine, have - num_learners))
        )
    return Layout(resource, engines, per_engine, service, learner)


def too_few_devices(config: Config, resource: str, have: int, place: str) -> ConfigError:
    """The error for more devices asked than there are at `place`."""
    per_engine, engines = config.vllm.tensor_parallel_size, config.vllm.data_parallel_size
    kind = "GPUs" if resource == "GPU" else "CPU cores (there is no GPU)"
    return ConfigError(
        f"{config.path}: vllm.tensor_parallel_size × vllm.data_parallel_size asks for {per_engine} × {engines} = "
        f"{per_engine * engines} {kind}, and {place} has {have}. {_smaller(per_engine, have)}"
    )


def _smaller(per_engine: int, have: int) -> str:
    """What to write when `have` devices are to be had."""
    if have < 1:
        return "Use a machine with more GPUs."
    if per_engine <= have:
        return f"Write `vllm.data_parallel_size: {have // per_engine}`."
    return f"Write `vllm.tensor_parallel_size: {have}` and `vllm.data_parallel_size: 1`."


def _installed_gpus() -> int:
    listed = Path("/proc/driver/nvidia/gpus")
    if listed.is_dir():
        return sum(1 for _ in listed.iterdir())
    if shutil.which("nvidia-smi") is None:
        return 0
    answer = subprocess.run(
        ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=False
    )
    return sum(line.startswith("GPU ") for line in answer.stdout.splitlines())


def _visible_gpus(installed: int) -> tuple[str, ...]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or installed == 0:
        return tuple(str(index) for index in range(installed))
    names = [name.strip() for name in chosen.split(",")]
    return tuple(name for name in names if name and name != "-1")
