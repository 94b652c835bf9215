from __future__ import annotations

import pytest
from fakes import write_config

from rlx.cluster.layout import Inventory, plan_layout, this_machine
from rlx.errors import ConfigError

CPU_ONLY = Inventory((), 4)
FOUR_GPUS = Inventory(("0", "2", "5", "GPU-aa"), 64)


def test_the_service_takes_the_last_gpus_and_the_learner_the_first(tmp_path):
    layout = plan_layout(FOUR_GPUS, write_config(tmp_path, data_parallel_size=2), num_learners=2)
    assert (layout.learner_gpus, layout.service_gpus) == (("0", "2"), ("5", "GPU-aa"))
    assert (layout.num_engines, layout.bundle) == (2, {"GPU": 1.0})


def test_an_engine_of_two_gpus_is_one_bundle(tmp_path):
    layout = plan_layout(FOUR_GPUS, write_config(tmp_path, tensor_parallel_size=2))
    assert (layout.num_engines, layout.bundle, layout.learner_gpus) == (1, {"GPU": 2.0}, ("0", "2"))


def test_without_gpus_the_engines_take_cpu_slots(tmp_path):
    layout = plan_layout(CPU_ONLY, write_config(tmp_path, data_parallel_size=3), num_learners=2)
    assert (layout.num_engines, layout.bundle) == (3, {"CPU": 1.0})
    assert layout.service_gpus == layout.learner_gpus == ()


@pytest.mark.parametrize(
    ("inventory", "sizes", "needed", "written"),
    [
        (FOUR_GPUS, {"data_parallel_size": 5}, "1 × 5 = 5 GPUs, and this machine has 4", "data_parallel_size: 4`"),
        (FOUR_GPUS, {"tensor_parallel_size": 2, "data_parallel_size": 3}, "2 × 3 = 6 GPUs", "data_parallel_size: 2`"),
        (FOUR_GPUS, {"tensor_parallel_size": 8}, "8 × 1 = 8 GPUs", "tensor_parallel_size: 4` and"),
        (CPU_ONLY, {"data_parallel_size": 5}, "5 CPU cores (there is no GPU), and this machine has 4", "size: 4`"),
    ],
)
def test_more_devices_than_there_are_is_an_error_that_says_what_to_write(tmp_path, inventory, sizes, needed, written):
    with pytest.raises(ConfigError) as caught:
        plan_layout(inventory, write_config(tmp_path, **sizes))
    message = str(caught.value)
    assert "vllm.tensor_parallel_size × vllm.data_parallel_size" in message
    assert needed in message
    assert written in message


def test_learner_processes_without_a_gpu_of_their_own_are_an_error(tmp_path):
    config = write_config(tmp_path, data_parallel_size=3)
    assert plan_layout(FOUR_GPUS, config, num_learners=1).learner_gpus == ("0",)
    with pytest.raises(ConfigError, match=r"2 learner processes .* need 5 GPUs, and this machine has 4.*processes 1`"):
        plan_layout(FOUR_GPUS, config, num_learners=2)


def test_cuda_visible_devices_chooses_among_the_installed_gpus(monkeypatch):
    monkeypatch.setattr("rlx.cluster.layout._installed_gpus", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert this_machine().gpus == ("0", "1", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-aa")
    assert this_machine().gpus == ("2", "GPU-aa")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert this_machine().gpus == ()
