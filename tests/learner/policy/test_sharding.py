"""Two processes that hold half of the model each (FSDP2, over gloo) train what one process does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_service import TOKEN, config_for, lines, serve, write_run
from safetensors.torch import load, load_file

from rlx.config import load_config, make_plan
from rlx.errors import ConfigError
from rlx.learner.main import train
from rlx.learner.policy.adapters import WEIGHTS
from rlx.learner.policy.checkpoints import find_resume_point
from rlx.learner.policy.sharding import arguments, check_device, device_notes, prepare_fsdp

LIMIT_S = 800.0
RUNS: dict[str, dict[str, Any]] = {
    # Everything that has all ranks do something together: the reference and its mixing, old log-probabilities, the
    # pass for the entropies, micro-batches by tokens, publishing, checkpoints.
    "whole": {
        "token_budget": 60, "save_steps": 2,
        "trl": {"beta": 0.1, "num_iterations": 2, "sync_ref_model": True, "ref_model_sync_steps": 1,
                "top_entropy_quantile": 0.37, "entropy_coef": 0.2,
                "use_adaptive_entropy": True, "entropy_target": 10.0, "entropy_coef_delta": 0.1},
        "fsdp_config": {"fsdp_activation_checkpointing": True, "fsdp_version": 2},
    },
    "untied": {"max_steps": 2, "save_steps": 1, "fsdp": "shard_grad_op auto_wrap", "test_datasets": None,
               "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
    "adapter": {"adapter": "lora", "lora_target_linear": True, "peft_use_dora": True, "trl": {"beta": 0.1},
                "gradient_checkpointing": True, "max_steps": 2, "save_steps": 1, "fsdp": True, "test_datasets": None},
    "bf16": {"bf16": True, "learning_rate": 1e-5, "max_steps": 1, "save_steps": 1, "fsdp": True, "test_datasets": None},
    "alone": {"adapter": "lora", "lora_target_linear": True, "lora_alpha": 16, "lora_sync": "adapter", "max_steps": 1, "fsdp": True,
              "test_datasets": None},
}  # fmt: skip
RESUMED = {"whole": 2, "untied": 1, "adapter": 1}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / WEIGHTS
    return load_file(file if file.exists() else folder / "model.safetensors")


def updates(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((folder / "published").iterdir())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME/one, NAME/two and NAME/resumed are the outputs of each run by one process, by two, and by two from a
    checkpoint of those; published/VERSION is what the workers got of all of them."""
    folder = tmp_path_factory.mktemp("sharded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLX_TOKEN", TOKEN)
        patch.setenv("OMP_NUM_THREADS", "1")
        with serve() as served:
            commands = []
            for name, keys in RUNS.items():
                path = write_run(folder / name, **keys, tie=name != "untied")
                train(config_for(path, served, output_dir=str(folder / name / "one")), 1)
                start = ["--vllm.port", str(served.port), "--output_dir"]
                commands.append([str(path), *start, str(folder / name / "two")])
                if name not in RESUMED:
                    continue
                point = folder / name / "two" / f"checkpoint-{RESUMED[name]}"
                output = str(folder / name / "resumed")
                commands.append([str(path), *start, output, "--resume_from_checkpoint", str(point)])
            (folder / "runs.json").write_text(json.dumps(commands))
            rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-id=rlx"]
            launch = ["-m", "torch.distributed.run", *rendezvous, "--nproc-per-node=2"]
            script = Path(__file__).with_name("sharded_process.py")
            done = subprocess.run(
                [sys.executable, *launch, str(script), str(folder / "runs.json")],
                capture_output=True, text=True, timeout=LIMIT_S, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            (folder / "published").mkdir()
            for version, data in served.worker.published.items():
                (folder / "published" / f"{version:06}").write_bytes(data)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RESUMED))
@pytest.mark.parametrize("output", ["two", "resumed"])
def test_two_processes_with_half_of_the_model_each_train_what_one_does(folder: Path, name: str, output: str) -> None:
    found, expected = weights(folder / name / output), weights(folder / name / "one")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=0)
    first = RESUMED[name] if output == "resumed" else 0
    one = lines(folder / name / "one" / "metrics.jsonl")[first:]
    two = lines(folder / name / output / "metrics.jsonl")
    for metric in ("loss", "grad_norm", "entropy", "reward"):
        assert [r[metric] for r in two] == pytest.approx([r[metric] for r in one], rel=1e-4, abs=1e-6)
    learner_one, learner_two = (
        {
            (s["step"], s["prompt"], s["index"], row): values["learner_logprobs"]
            for s in lines(folder / name / run / "samples.jsonl")
            for row, values in enumerate(s["rows"])
            if s["step"] > first
        }
        for run in ("one", output)
    )
    assert learner_two.keys() == learner_one.keys()
    assert len(learner_two) >= 8
    for key, values in learner_one.items():
        assert learner_two[key] == pytest.approx(values, abs=1e-3)
    if name == "whole":
        assert [r["entropy_coef"] for r in two] == pytest.approx([0.3, 0.4, 0.5, 0.6][first:])
    if "trl" in RUNS[name]:
        assert [r["kl"] for r in two] == pytest.approx([r["kl"] for r in one], rel=1e-3, abs=1e-7)


@pytest.mark.slow
def test_a_checkpoint_of_a_cut_model_holds_it_whole_and_the_workers_got_it_whole(folder: Path) -> None:
    checkpoint = folder / "whole" / "two" / "checkpoint-4"
    saved, final = load_file(checkpoint / "model.safetensors"), weights(folder / "whole" / "two")
    assert saved.keys() == final.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in final.items())
    best = load_file(folder / "whole" / "two" / "best" / "model.safetensors")
    assert {n: t.shape for n, t in best.items()} == {n: t.shape for n, t in final.items()}
    base = load_file(folder / "adapter" / "model" / "model.safetensors")
    assert [load(update).keys() == base.keys() for update in updates(folder)].count(True) > 10


@pytest.mark.slow
def test_of_a_cut_model_the_workers_get_the_adapter_alone_and_whole(folder: Path) -> None:
    last, trained = load(updates(folder)[-1]), weights(folder / "alone" / "two")
    assert last.keys() == trained.keys()
    for name, tensor in trained.items():
        scale = 2.0 if "lora_B" in name else 1.0  # lora_alpha 16 over lora_r 8
        torch.testing.assert_close(last[name].float(), tensor.float() * scale, rtol=2**-8, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["one", "two"])
def test_bfloat16_is_computed_in_and_weights_and_optimizer_states_stay_float32(folder: Path, output: str) -> None:
    """A step of 1e-5 changes float32 weights, and hardly any of them would change in bfloat16."""
    base = load_file(folder / "bf16" / "model" / "model.safetensors")
    moved = {name: tensor - base[name] for name, tensor in weights(folder / "bf16" / output).items()}
    assert {tensor.dtype for tensor in moved.values()} == {torch.float32}
    norm = moved["model.norm.weight"]  # of ones, whose next value in bfloat16 is 0.0039 away
    assert 0 < norm.abs().max() < 1e-4
    file = next((folder / "bf16" / output / "checkpoint-1").glob("optimizer.*"))
    states = torch.load(file, weights_only=True)["state"].values()
    assert {state["exp_avg"].dtype for state in states} == {torch.float32}
    one, two = (lines(folder / "bf16" / name / "metrics.jsonl")[0] for name in ("one", "two"))
    exact = lines(folder / "adapter" / "one" / "metrics.jsonl")[0]["entropy"]  # the same model and rollouts
    assert 1e-6 < abs(one["entropy"] - exact) < 1e-2
    assert one["entropy"] == pytest.approx(two["entropy"], abs=1e-2)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=0.05)


@pytest.mark.slow
def test_a_checkpoint_that_was_cut_another_way_is_refused(folder: Path) -> None:
    def asking(name: str, output: str, step: int, **keys: Any) -> Any:
        start = {"resume_from_checkpoint": str(folder / name / output / f"checkpoint-{step}")}
        return load_config(write_run(folder / "asking", **RUNS[name] | start | keys))

    assert find_resume_point(asking("whole", "two", 2), 2)
    with pytest.raises(
        ConfigError, match=r"checkpoint-2 was written with fsdp .*FULL_STATE_DICT, and this run is one w"
    ):
        find_resume_point(asking("whole", "two", 2), 1)
    with pytest.raises(ConfigError, match=r"checkpoint-2 was written without `fsdp`.*Nothing was changed"):
        find_resume_point(asking("whole", "one", 2), 2)
    with pytest.raises(ConfigError, match=r"checkpoint-1 was written with fsdp .*SHARDED_STATE_DICT"):
        find_resume_point(asking("untied", "two", 1, fsdp_config={}), 2)


@pytest.mark.parametrize(("precision", "compute"), [("bf16", torch.bfloat16), ("no", None)])
def test_what_a_cut_model_returns_is_not_rounded_and_gradients_are_summed_in_float32(precision: str, compute) -> None:
    plugin = SimpleNamespace(mixed_precision_policy="of accelerate, which rounds log-probabilities to bfloat16")
    state = SimpleNamespace(distributed_type="a GPU's", fsdp_plugin=plugin)
    accelerator: Any = SimpleNamespace(state=state, mixed_precision=precision)
    assert prepare_fsdp(accelerator, SimpleNamespace(fsdp_plugin_args={}))  # type: ignore[arg-type]
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (compute, torch.float32, None)
    assert not prepare_fsdp(accelerator, SimpleNamespace(fsdp_plugin_args=None))  # type: ignore[arg-type]


def test_the_keys_of_axolotl_become_those_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    layers = "Qwen2DecoderLayer"
    config = load_config(
        write_run(tmp_path, fsdp=["shard_grad_op", "auto_wrap"],
                  fsdp_config={"fsdp_transformer_layer_cls_to_wrap": layers, "fsdp_state_dict_type": "sharded_state_dict"})
    )  # fmt: skip
    settings = arguments(config, 2)["fsdp_config"]
    assert (settings["reshard_after_forward"], settings["transformer_layer_cls_to_wrap"]) == (False, [layers])
    assert settings["state_dict_type"] == "SHARDED_STATE_DICT"
    assert arguments(config, 1) == {}, "one process has all of it"
    assert arguments(load_config(write_run(tmp_path, fsdp_config={"reshard_after_forward": True})), 2)["fsdp"] is True
    assert arguments(load_config(write_run(tmp_path, fsdp_config={}, deepspeed="")), 2) == {}
    zero = arguments(load_config(write_run(tmp_path, deepspeed="ds.json")), 2)
    assert zero == {"deepspeed": {"zero_optimization": {"stage": 2}}}


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"fsdp": ["hybrid_shard"]}, r"fsdp: 'hybrid_shard' is not of FSDP2; write `fsdp: true`"),
        ({"fsdp_version": 1}, r"fsdp_version: FSDP1 leaves transformers soon"),
        ({"fsdp": True, "deepspeed": {"zero_optimization": {}}}, r"fsdp and deepspeed are both given; keep one"),
        ({"fsdp": False, "fsdp_config": {"offload_params": True}}, r"fsdp: false and fsdp_config are both given"),
        ({"fsdp_config": {"fsdp_shard": 1}}, r"unknown key 'fsdp_config.fsdp_shard'"),
        ({"fsdp_config": {"fsdp_mixed_precision_policy": "bf16"}}, r"fsdp_config.*Write `bf16: true`"),
        ({"gradient_checkpointing": True, "fsdp_config": {"activation_checkpointing": True}}, r"are the same; keep one"),
        ({"adapter": "lora", "lora_target_linear": True, "fsdp_config": {"activation_checkpointing": True}},
         r"hides an adapter from PEFT; write `gradient_checkpointing: true`"),
        ({"adapter": "lora", "lora_target_linear": True, "deepspeed": {"zero_optimization": {}}}, r"deepspeed excludes `adapter`"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, r"no effect without gradient_checkpointing: true"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"reentrant": False}},
         r"torch knows no 'reentrant'; write of .*use_reentrant"),
        ({"fsdp": True, "trl": {"cast_lm_head_to_fp32": True}}, r"cast_lm_head_to_fp32 excludes fsdp and deepspeed"),
        ({"adapter": "qlora", "lora_target_linear": True, "fsdp": True}, r"adapter: qlora excludes fsdp"),
        ({"trl": {"use_liger_loss": True}}, r"Liger's fused GRPO loss has some of the losses only"),
        ({"bf16": "full"}, r"weights in bfloat16 would lose updates"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined_is_refused_with_its_reason(tmp_path: Path, keys: dict[str, Any], problem: str) -> None:
    path = write_run(tmp_path, **keys)
    with pytest.raises(ConfigError, match=problem):
        load_config(path)


def test_a_missing_package_or_file_is_one_error_before_anything_starts(tmp_path: Path) -> None:
    for keys, problem in (
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, r"deepspeed: the package deepspeed is not installed"),
        ({"deepspeed": "nowhere.json"}, r"deepspeed: there is no file nowhere.json"),
        ({"deepspeed": "cfg.yaml"}, r"deepspeed: .*cfg.yaml is not JSON"),
        ({"use_liger_kernel": True}, r"use_liger_kernel: the package liger-kernel is not installed"),
    ):
        config = load_config(write_run(tmp_path, **keys))
        with pytest.raises(ConfigError, match=problem):
            make_plan(config, 2)
    with pytest.raises(ConfigError, match=r"Liger's kernels run on GPUs, and none is here"):
        check_device(load_config(write_run(tmp_path, use_liger_kernel=True)))


def test_what_changes_nothing_is_said(tmp_path: Path) -> None:
    keys = {"fsdp_config": {"fsdp_use_orig_params": True, "cpu_ram_efficient_loading": True}}
    plan = make_plan(load_config(write_run(tmp_path, **keys)), 1)
    assert plan.notes[:2] == (
        "fsdp: one process has the whole model; start more with --num-processes N",
        "fsdp_config: cpu_ram_efficient_loading, use_orig_params changes nothing (docs/configuration.md)",
    )
    alone = make_plan(load_config(write_run(tmp_path, fsdp_version=2)), 2)
    assert alone.notes[0].startswith("fsdp_version alone changes nothing; write `fsdp: true`")
    offload = load_config(write_run(tmp_path, gradient_checkpointing="offload"))
    assert (offload.gradient_checkpointing, offload.activation_offloading) == (True, True)
    assert device_notes(offload) == ["activation_offloading: without a GPU activations are in main memory already"]
