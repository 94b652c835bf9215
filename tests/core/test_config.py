"""Bad configurations give one message with key, line and fix; the documented ones load and are solved."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlx.config import Config, load_config, make_plan, parse_overrides
from rlx.config.reference import render
from rlx.config.refusals import REFUSED
from rlx.config.source import dotted
from rlx.errors import ConfigError

ROOT = Path(__file__).parents[2]
SMALLEST = "base_model: some/model\nrl: grpo\ndatasets:\n  - path: some/data\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def problem(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), parse_overrides(list(overrides)))
    return str(caught.value)


def test_every_shipped_yaml_loads():
    files = sorted((ROOT / "examples").rglob("*.yaml"))
    assert files
    for file in files:
        assert load_config(file).rl == "grpo", file


def test_a_mistyped_key_names_its_line_and_the_nearest_key(tmp_path):
    message = problem(tmp_path, SMALLEST + "trl:\n  temprature: 0.5\n")
    assert message == f"{tmp_path}/run.yaml, line 6: unknown key 'trl.temprature'. Did you mean 'trl.temperature'?"


def test_a_key_in_the_wrong_section_is_pointed_to_the_right_one(tmp_path):
    assert "Did you mean 'trl.max_completion_length'?" in problem(tmp_path, SMALLEST + "max_completion_length: 8\n")
    assert "Did you mean 'async.max_staleness'?" in problem(tmp_path, SMALLEST + "max_staleness: 2\n")


def test_a_mistyped_key_inside_a_dataset_is_found(tmp_path):
    message = problem(tmp_path, SMALLEST + "    typ: rewards.transform\n")
    assert "line 5: unknown key 'datasets[0].typ'. Did you mean 'datasets[0].type'?" in message


def test_all_problems_are_told_at_once(tmp_path):
    message = problem(tmp_path, "rl: dpo\nlerning_rate: 1\n")
    assert len(message.splitlines()) == 4
    assert "'base_model' is missing" in message
    assert "Write `rl: grpo`" in message
    assert "Did you mean 'learning_rate'?" in message
    assert "'datasets' is missing" in message


def test_a_missing_file_lists_the_yaml_files_beside_it(tmp_path):
    write(tmp_path, SMALLEST)
    with pytest.raises(ConfigError, match=r"no such file\. In .* there is: run\.yaml"):
        load_config(tmp_path / "rum.yaml")


def test_broken_yaml_and_doubled_keys_are_told_with_their_line(tmp_path):
    assert "line 2" in problem(tmp_path, "a: [1,\nb: 2")
    assert "b: {" in problem(tmp_path, "a: [1, 2]\u2028\nb: {")  # another end of a line to YAML
    assert "'seed' is written twice (first in line 5)" in problem(tmp_path, SMALLEST + "seed: 1\nseed: 2\n")


@pytest.mark.parametrize(
    ("lines", "told", "shown"),
    [
        ("trl:\n  beta: 0.1\n   epsilon: 0.2\n", "indented otherwise", "\n       epsilon: 0.2\n              ^"),
        ("trl:\n\tbeta: 0.1\n", "Indent with spaces, not with tabs.", "\n    \tbeta: 0.1\n    ^"),
        ("trl:\n    beta: 0.1\n  epsilon: 0.2\n", "Indent this line as far as", "\n      epsilon: 0.2\n      ^"),
    ],
)
def test_a_line_that_is_indented_wrongly_is_shown_with_what_to_do(tmp_path, lines, told, shown):
    message = problem(tmp_path, SMALLEST + lines)
    assert message.startswith(f"{tmp_path}/run.yaml, line {4 + lines.count(chr(10))}: this is not valid YAML: ")
    assert told in message
    assert message.endswith(shown)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("model_name_or_path: m", "unknown key 'model_name_or_path'. Here it is 'base_model'."),
        ("trl: {kl_coef: 0.1}", "unknown key 'trl.kl_coef'. Here it is 'trl.beta'."),
        ("num_procesess: 2", "Did you mean the option --num-processes of `rlx train`"),
        ("actor_rollout_ref: {}", "docs/configuration.md lists every key."),
        ("trl: {reward_funcs: rewards.f}", "Write a list: `reward_funcs: [rewards.f]`"),
        ("test_datasets: {path: a}", "Write a list: `test_datasets: [{...}]`"),
        ("trl: {async_prefetch: true}", "how far it may run ahead is `async: {max_staleness: N}`."),
    ],
)
def test_habits_from_other_trainers_are_told_what_to_write_here(tmp_path, line, told):
    assert told in problem(tmp_path, SMALLEST + line + "\n")


def test_the_blank_keys_at_the_end_of_axolotls_examples_change_nothing(tmp_path):
    text = (
        SMALLEST + "    field_messages:\nmodel_type: AutoModelForCausalLM\ntokenizer_type: AutoTokenizer\nlocal_rank:\n"
        "debug:\nxformers_attention:\ntorch_compile: false\nearly_stopping_patience:\nfsdp:\nevals_per_epoch: 0\n"
    )
    assert load_config(write(tmp_path, text)) == load_config(write(tmp_path, SMALLEST))


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_known_but_unsupported_key_says_why_and_what_to_write(tmp_path, key):
    section, _, name = key.rpartition(".")
    value = "7.5"
    text = f"{SMALLEST}{section}:\n  {name}: {value}\n" if section else f"{SMALLEST}{name}: {value}\n"
    if section.endswith("datasets"):
        text = SMALLEST + ("" if section == "datasets" else "test_datasets:\n  - path: a\n") + f"    {name}: {value}\n"
    message = problem(tmp_path, text)
    assert key.replace("datasets.", "datasets[0].") in message
    assert REFUSED[key].why in message
    assert REFUSED[key].instead in message


def test_an_unsupported_key_that_is_switched_off_changes_nothing(tmp_path):
    text = SMALLEST + "adapter:\nload_in_8bit: false\npad_to_sequence_len: false\nwandb_project:\nspecial_tokens:\n"
    assert load_config(write(tmp_path, text)) == load_config(write(tmp_path, SMALLEST))


def test_values_that_make_no_sense_name_key_value_and_meaning(tmp_path):
    message = problem(tmp_path, SMALLEST + "vllm:\n  port: 99999\n")
    assert "line 6: vllm.port: 99999 cannot be used." in message
    assert "Port that the service listens on" in message
    assert "colocate" not in problem(tmp_path, SMALLEST + "trl:\n  loss_type: ppo\n")
    assert "Write `vllm_mode: server`" in problem(tmp_path, SMALLEST + "trl:\n  vllm_mode: colocate\n")


def test_overrides_win_and_their_mistakes_are_told_as_typed(tmp_path):
    path = write(tmp_path, SMALLEST + "trl:\n  beta: 0.5\n")
    config = load_config(path, parse_overrides(["--trl.beta", "0.01", "--vllm.port=8001", "--learning-rate", "1e-5"]))
    assert (config.trl.beta, config.vllm.port, config.learning_rate) == (0.01, 8001, 1e-5)
    assert "command line, --trl.betta: unknown key" in problem(tmp_path, SMALLEST, "--trl.betta", "1")


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    assert load_config(write(tmp_path, SMALLEST + "learning_rate: 1e-5\n")).learning_rate == 1e-5


def test_keys_that_contradict_each_other_are_refused(tmp_path):
    assert "keep one" in problem(tmp_path, SMALLEST + "save_steps: 5\nsaves_per_epoch: 2\n")
    assert "one per function" in problem(
        tmp_path, SMALLEST + "trl:\n  reward_funcs: [a.b, a.c]\n  reward_weights: [1.0]\n"
    )
    assert "raise it, or lower trl.max_prompt_length to 44" in problem(
        tmp_path, SMALLEST + "vllm:\n  max_model_len: 300\ntrl:\n  max_completion_length: 256\n"
    )


def test_zero_dot_zero_dot_zero_dot_zero_means_this_machine_to_the_learner(tmp_path):
    config = load_config(write(tmp_path, SMALLEST + "trl:\n  vllm_server_host: 0.0.0.0\n  vllm_server_port: 9000\n"))
    assert config.base_url == "http://127.0.0.1:9000"


def test_the_documented_gsm8k_batch_sizes_are_solved_not_rejected():
    config = load_config(ROOT / "examples" / "gsm8k" / "gsm8k.yaml")
    defaults = config.model_copy(update={"micro_batch_size": 1, "gradient_accumulation_steps": 1})
    plan = make_plan(defaults, 1)
    assert (plan.num_generations, plan.gradient_accumulation_steps, plan.prompts_per_batch) == (4, 4, 1)
    assert "gradient_accumulation_steps is 4 instead of 1" in plan.notes[0]


@given(
    generations=st.integers(2, 32),
    micro=st.integers(1, 64),
    accumulation=st.integers(1, 16),
    processes=st.integers(1, 8),
)
def test_a_step_always_holds_whole_groups_and_never_less_than_asked(generations, micro, accumulation, processes):
    config = Config.model_validate(
        {
            "base_model": "m",
            "rl": "grpo",
            "datasets": [{"path": "d"}],
            "micro_batch_size": micro,
            "gradient_accumulation_steps": accumulation,
            "trl": {"num_generations": generations, "reward_funcs": ["a.b"]},
        }
    )
    plan = make_plan(config, processes)
    assert plan.completions_per_step % generations == 0
    assert plan.completions_per_step == micro * processes * plan.gradient_accumulation_steps
    assert accumulation <= plan.gradient_accumulation_steps < accumulation + generations


def test_a_generation_batch_size_that_splits_a_group_names_the_nearest_that_do_not(tmp_path):
    config = load_config(write(tmp_path, SMALLEST + "trl:\n  reward_funcs: [a.b]\n  generation_batch_size: 10\n"))
    with pytest.raises(ConfigError, match="Write 8 or 16"):
        make_plan(config, 1)


@pytest.mark.parametrize(
    ("accumulation", "processes", "micro_batches", "steps", "prompts"),
    [(1, 1, 4, 4, 2), (2, 1, 4, 2, 2), (4, 1, 4, 1, 2), (1, 2, 4, 4, 4), (1, 8, 1, 1, 4), (4, 2, 8, 2, 8)],
)
def test_steps_per_generation_counts_micro_batches_as_in_trl(
    tmp_path, accumulation, processes, micro_batches, steps, prompts
):
    text = (
        f"micro_batch_size: 2\ngradient_accumulation_steps: {accumulation}\nnum_epochs: 3\ntrl:\n  num_generations: 4\n"
    )
    text += f"  reward_funcs: [a.b]\n  steps_per_generation: {micro_batches}\n  num_iterations: 3\n"
    config = load_config(write(tmp_path, SMALLEST + text))
    plan = make_plan(config, processes)
    assert (plan.steps_per_pass, plan.prompts_per_batch, plan.steps_per_batch) == (steps, prompts, 3 * steps)
    assert plan.completions_per_step == 2 * processes * accumulation
    assert plan.gradient_accumulation_steps == accumulation
    assert plan.total_steps(config, 5) == -(-15 // prompts) * 3 * steps
    assert plan.steps_per_epoch(5) == -(-5 // prompts) * 3 * steps
    assert [plan.next_batch(s) for s in (0, 1, 3 * steps)] == [0, 3 * steps, 3 * steps]


def test_passes_over_a_batch_multiply_the_steps_of_a_run(tmp_path):
    text = "trl:\n  num_generations: 4\n  generation_batch_size: 8\n  reward_funcs: [a.b]\n  num_iterations: 2\n"
    config = load_config(write(tmp_path, SMALLEST + text))
    plan = make_plan(config, 1)
    assert plan.total_steps(config, 10) == 10
    assert (
        make_plan(config.model_copy(update={"max_steps": 3}), 1).total_steps(
            config.model_copy(update={"max_steps": 3}), 10
        )
        == 3
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            "steps_per_generation: 6",
            r"steps_per_generation \(6 micro-batches of 2 completions\) must hold whole .*Write 4 or 8\.",
        ),
        ("steps_per_generation: 2", r"steps_per_generation \(2 .*Write 4\."),
        ("steps_per_generation: 4\n  generation_batch_size: 8", "both given; keep one"),
    ],
)
def test_a_generation_batch_that_parts_steps_or_groups_is_refused(tmp_path, keys, message):
    text = f"micro_batch_size: 2\ngradient_accumulation_steps: 4\ntrl:\n  num_generations: 4\n  reward_funcs: [a.b]\n  {keys}\n"
    with pytest.raises(ConfigError, match=message):
        make_plan(load_config(write(tmp_path, SMALLEST + text)), 1)


def test_the_configuration_reference_is_fresh():
    assert (ROOT / "docs" / "configuration.md").read_text() == render(), "type: make docs"


@given(st.lists(st.one_of(st.text("abc", min_size=1), st.integers(0, 3)), min_size=1, max_size=5))
def test_key_paths_print_without_loss(path):
    text = dotted(tuple(path))
    assert all(str(part) in text for part in path)


LORA = "adapter: lora\nlora_target_linear: true\n"
QLORA = LORA.replace("lora", "qlora", 1)
ALONE = LORA + "lora_sync: adapter\n"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("lora_r: 16\n", "lora_r needs `adapter: lora`; add that, or remove the key to train the whole model"),
        ("rl_adapter_ref_model: true\n", "rl_adapter_ref_model needs `adapter: lora`"),
        ("adapter: lora\n", "adapter: lora does not say which layers to update; write `lora_target_linear: true`"),
        (LORA + "lora_target_modules: q.*\n", "lora_target_linear excludes a regular expression"),
        (LORA + "trl: {beta: 0.1, sync_ref_model: true}\n", "trl.sync_ref_model excludes `adapter`"),
        (LORA + "rl_adapter_ref_model: true\n", "rl_adapter_ref_model has no effect at trl.beta: 0"),
        ("lora_sync: adapter\n", "lora_sync needs `adapter: lora`"),
        (ALONE + "peft_use_dora: true\n", "excludes peft_use_dora: vLLM loads no DoRA; write `lora_sync: merged`"),
        (ALONE + "lora_modules_to_save: [norm]\n", "excludes lora_modules_to_save: vLLM loads low-rank updates only"),
        (ALONE + "lora_target_modules: [q_proj, lm_head]\n", "excludes lora_target_modules: lm_head: only linear"),
        (ALONE + "lora_r: 513\n", "excludes lora_r: 513: vLLM takes ranks up to 512"),
        (ALONE + "lora_model_dir: sft\n", "needs lora_r, for which the workers make room; write the `r` of"),
        ("adapter: qlora\n", "adapter: qlora does not say which layers to update"),
        ("load_in_4bit: true\n", "load_in_4bit needs `adapter: qlora`; add that, or remove the key"),
        (LORA + "load_in_4bit: true\n", "load_in_4bit needs `adapter: qlora`; write that, or remove the key"),
        (LORA + "load_in_8bit: true\n", "base models are quantised to 4 bits only"),
        (QLORA + "load_in_4bit: false\n", "adapter: qlora excludes load_in_4bit: false"),
        (
            QLORA + "bnb_config_kwargs: {bnb_4bit_quant_type: int4}\n",
            "bnb_4bit_quant_type: int4 cannot be used; it may",
        ),
        (QLORA + "bnb_config_kwargs: {llm_int8_threshold: '6'}\n", "llm_int8_threshold: 6 cannot be used; it may hold"),
        (QLORA + "lora_sync: adapter\n", "excludes adapter: qlora: the workers would hold the base model as it was"),
        (LORA + "lora_r: 0\n", "lora_r: 0 cannot be used"),
        (
            LORA + "peft_layers_to_transform: [0]\n",
            "Write a regular expression for whole names in `lora_target_modules`",
        ),
        (LORA + "lora_rank: 4\n", "unknown key 'lora_rank'"),
        ("adapter: lora\nlora_target_modules: '((q'\n", "'((q' is no regular expression: missing )"),
    ],
)
def test_adapter_keys_that_cannot_work_are_refused(tmp_path, keys, message):
    assert message in problem(tmp_path, SMALLEST + keys)


def test_adapter_keys_that_are_off_need_no_adapter_and_axolotls_own_load(tmp_path):
    off = "adapter: ''\nlora_model_dir:\nlora_target_modules: []\nlora_target_linear: false\nlora_modules_to_save: []\n"
    config = load_config(write(tmp_path, SMALLEST + off))
    assert (config.adapter, config.lora_model_dir, config.lora_target_modules) == (None, None, None)
    text = (
        LORA
        + "lora_r: 32\nlora_alpha: 16\nlora_dropout: 0.05\nlora_target_modules: [gate_proj, q_proj]\nlora_qkv_kernel: false\n"
    )
    four = "bnb_config_kwargs: {bnb_4bit_quant_type: fp4, bnb_4bit_use_double_quant: false}\nload_in_4bit: true\n"
    assert load_config(write(tmp_path, SMALLEST + QLORA + four)).adapter == "qlora"
    config = load_config(write(tmp_path, SMALLEST + text))
    assert (config.lora_r, config.lora_alpha, config.lora_target_modules) == (32, 16, ["gate_proj", "q_proj"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("async: {oversample: 1.5}", "oversample (1.5) has no use at max_staleness: 1"),
        ("async: {max_staleness: -1}", "async.max_staleness: -1 cannot be used"),
        ("async: {max_stalenes: 1}", "Did you mean 'async.max_staleness'?"),
        ("service: {max_workers: 1}\nvllm: {data_parallel_size: 2}", "service.max_workers (1) is less than vllm.data_"),
        ("service: {direct: true}\nenvs: [{openenv: {url: 'http://e:1'}}]", "service.direct is for plain replies"),
    ],
)
def test_the_asynchronous_keys_have_laws_of_their_own(tmp_path, keys, message):
    assert message in problem(tmp_path, SMALLEST + keys + "\n")


def test_asynchronous_keys_are_given_on_the_command_line_too(tmp_path):
    path = write(tmp_path, SMALLEST)
    assert load_config(path).async_.max_staleness == 1
    config = load_config(path, parse_overrides(["--async.max_staleness", "0", "--async.oversample", "1.5"]))
    assert (config.async_.max_staleness, config.async_.oversample, config.async_.steps_in_flight) == (0, 1.5, 1)
    assert config.group_deadline_s == config.service.group_timeout
