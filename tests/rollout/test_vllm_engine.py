"""What only real vLLM has: start-up failures with their cause, the death of the host, refusals, versions, NCCL's steps."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from vllm_parts import tiny_model, vllm_options

from rlx.errors import ModelError, ServiceError
from rlx.processes import alive, descendants
from rlx.rollout.manifest import WeightManifest
from rlx.rollout.vllm_engine import VllmEngine
from rlx.rollout.vllm_update import join_nccl, update_over_nccl
from rlx.rollout.vllm_versions import TokenVersions
from rlx.safetensors_layout import TensorSpec
from rlx.wire import Sampling

HOST = """
import asyncio, sys
from rlx.rollout.vllm_engine import VllmEngine
from rlx.rollout.vllm_params import VllmOptions

async def main():
    engine = VllmEngine(VllmOptions(model=sys.argv[1], max_model_len=256, kv_cache_gib=0.1))
    await engine.start()
    print("started", flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_a_sequence_that_saw_no_swap_has_one_version() -> None:
    assert TokenVersions(3).runs(0, 7) == ((3, 7),)
    assert TokenVersions(3).runs(0, 0) == ()


def test_a_sequence_over_two_swaps_has_three_runs_and_empty_ones_vanish() -> None:
    versions = TokenVersions(3)
    versions.mark(0, 2, 4)
    versions.mark(0, 5, 5)
    versions.mark(1, 0, 5)
    assert versions.runs(0, 9) == ((3, 2), (4, 3), (5, 4))
    assert versions.runs(0, 5) == ((3, 2), (4, 3))
    assert versions.runs(1, 9) == ((5, 9),)
    assert versions.runs(2, 9) == ((3, 9),)


@pytest.mark.slow
async def test_nccl_follows_the_steps_of_vllms_protocol() -> None:
    calls: list = []

    class Client:
        def __getattr__(self, name: str):
            async def call(request=None, **_) -> None:
                calls.append((name, request and vars(request)))

            return call

    manifest = WeightManifest(4, 12, "", (TensorSpec("w", "BF16", (2, 3)),))
    await join_nccl(Client(), {"master_address": "10.0.0.1"})
    await update_over_nccl(Client(), manifest)
    assert calls == [
        ("init_weight_transfer_engine", {"init_info": {"master_address": "10.0.0.1"}}),
        ("start_weight_update", None),
        ("update_weights", {"update_info": {"names": ["w"], "dtype_names": ["bfloat16"], "shapes": [[2, 3]]}}),
        ("finish_weight_update", None),
    ]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="session")
async def test_requests_vllm_cannot_serve_are_refused_and_the_engine_lives_on(tied_qwen2) -> None:
    engine, _ = tied_qwen2
    with pytest.raises(ServiceError, match="1024"):
        await engine.generate("long", np.ones(2000, np.int32), 1, Sampling(max_tokens=4))
    with pytest.raises(ServiceError, match="sampling parameters"):
        await engine.generate("odd", np.ones(4, np.int32), 1, Sampling(max_tokens=4, extra={"tempreature": 1}))
    with pytest.raises(ServiceError, match="seed"):
        await engine.generate("seed", np.ones(4, np.int32), 1, Sampling(max_tokens=4, extra={"seed": 1}))
    seeded = await engine.openai("completions", {"model": "tiny", "prompt": "a", "seed": 1})
    assert seeded["error"]["code"] == 400
    assert "seed" in seeded["error"]["message"]
    long = await engine.openai("completions", {"model": "tiny", "prompt": "a" * 3000})
    assert long["error"]["code"] == 400
    assert "1024" in long["error"]["message"]
    [c] = await engine.generate("ok", np.ones(4, np.int32), 1, Sampling(max_tokens=4, extra={"ignore_eos": True}))
    assert c.ids.size == 4


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.asyncio(loop_scope="session")
async def test_stop_strings_and_regex_shape_the_text(tied_qwen2) -> None:
    engine, _ = tied_qwen2
    group = await engine.generate("r", np.ones(4, np.int32), 8, Sampling(max_tokens=300, stop=("a",)))
    stopped = [c for c in group if c.finish_reason == "stop"]
    assert stopped
    assert all("a" not in c.text for c in stopped)
    assert all(c.logprobs.size == c.ids.size for c in group)
    [c] = await engine.generate("r", np.ones(4, np.int32), 1, Sampling(max_tokens=8, regex="[0-9]{5}"))
    assert c.text.isdigit()
    assert len(c.text) == 5


@pytest.mark.vllm
@pytest.mark.slow
async def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchForCausalLM"]}))
    with pytest.raises(ModelError, match="NoSuchForCausalLM"):
        await VllmEngine(vllm_options(str(tmp_path))).start()


@pytest.mark.vllm
@pytest.mark.slow
async def test_a_failure_inside_the_engine_core_arrives_with_its_cause(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    options = replace(vllm_options(str(tmp_path)), max_model_len=2048, kv_cache_gib=0.0005)
    with pytest.raises(ModelError, match=r"ValueError: .*KV cache"):
        await VllmEngine(options).start()


@pytest.mark.vllm
@pytest.mark.slow
def test_no_process_of_vllm_survives_the_sigkill_of_its_host(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    script = tmp_path / "host.py"
    script.write_text(HOST)
    host = subprocess.Popen(
        [sys.executable, script, tmp_path / "model"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert host.stdout.readline() == "started\n"
        below = descendants(host.pid)
        assert len(below) >= 2
    finally:
        host.send_signal(signal.SIGKILL)
        host.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(alive(*process) for process in below.items()):
        time.sleep(0.05)
    assert [process for process in below.items() if alive(*process)] == []
