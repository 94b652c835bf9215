"""`rlx check`: everything that can be known before a model is loaded, and the plan in numbers."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlx.cluster.layout import plan_layout, this_machine
from rlx.cluster.reward_cases import completion_for, rewards_get_text
from rlx.config import Config, make_plan
from rlx.config.plan import count_parameters, estimate_memory
from rlx.config.trackers import check_trackers
from rlx.errors import ConfigError, DatasetError, ModelError, RlxError, UserCodeError

_IMPORT_S = 30.0
_VLLM_S = 120.0


@dataclass
class _Findings:
    """`lines`: what was checked and found good; `unchecked`: what could not be; `errors`: what is wrong."""

    lines: list[str]
    unchecked: list[str]
    errors: list[RlxError]


def check_main(config: Config, num_processes: int) -> int:
    """Print the findings and the plan; 0 when nothing is wrong, else the first error's exit code."""
    console = Console(highlight=False)
    found = _Findings([f"{config.path.name}: every key is known and every value fits"], [], [])
    plan = make_plan(config, num_processes)
    machine = this_machine()
    layout = plan_layout(machine, config, num_processes)
    if config.use_liger_kernel and not machine.gpus:
        raise ConfigError(
            f"{config.path}: use_liger_kernel: Liger's kernels run on GPUs, and none is here. Remove the key."
        )
    found.lines.append(f"devices: {layout.describe()}")
    row, tokenizer = _check_data(config, found)
    _check_adapter(config, found)
    _check_optimizer(config, found)
    _check_trackers(config, found)
    _check_learner(config, found)
    _check_rewards(config, row, found)
    if config.has_episodes:
        _check_episodes(config, tokenizer, found)
    for line in found.lines:
        console.print(f"ok    {line}", markup=False, soft_wrap=True)
    for line in (*plan.notes, *found.unchecked):
        console.print(f"note  {line}", markup=False, soft_wrap=True)
    for error in found.errors:
        console.print(f"error {error}", markup=False, soft_wrap=True)
    if found.errors:
        return found.errors[0].exit_code
    console.print(_plan_table(config, num_processes))
    return 0


def _check_data(config: Config, found: _Findings) -> tuple[dict[str, Any] | None, Any]:
    """The first transformed row and the tokenizer, each None when it cannot be had here."""
    import datasets
    import transformers

    from rlx.hub import located
    from rlx.learner.incoming.data import encode_prompt, first_row
    from rlx.tokenizer import load_tokenizer

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()  # prompts that are too long are told of in rlx's words
    located(config, "base_model")
    tokenizer = None
    try:
        tokenizer = load_tokenizer(config)
        found.lines.append(f"tokenizer: {len(tokenizer)} tokens")
    except ModelError as error:
        if Path(located(config, "base_model")).is_dir():
            found.errors.append(error)
        else:
            found.unchecked.append(f"not checked: the tokenizer and the model. {error}")
    if tokenizer is not None:
        _check_context(config, found)
    try:
        row = first_row(config, tokenizer)
    except (DatasetError, UserCodeError) as error:
        if isinstance(error.__cause__, ConnectionError):
            found.unchecked.append(f"not checked: data set and transforms on a row. {error}")
            _check_transform_names(config, found)
        else:
            found.errors.append(error)
        return None, tokenizer
    found.lines.append(
        f"first row: prompt {row['prompt']!r:.120}, columns {', '.join(k for k in row if k != 'prompt') or 'none'}"
    )
    if tokenizer is not None:
        try:
            length = len(encode_prompt(config, tokenizer, row["prompt"], f"{config.path}: datasets[0], row 0"))
            if length > config.max_prompt_length:
                found.unchecked.append(
                    f"the first prompt has {length} tokens, more than max_prompt_length ({config.max_prompt_length}): it will "
                    "be left out"
                )
            else:
                found.lines.append(f"first prompt: {length} tokens of at most {config.max_prompt_length}")
        except DatasetError as error:
            found.errors.append(error)
    return row, tokenizer


def _check_context(config: Config, found: _Findings) -> None:
    from rlx.learner.policy.model import check_context

    try:
        check_context(config)
    except ConfigError as error:
        found.errors.append(error)


def _check_adapter(config: Config, found: _Findings) -> None:
    if config.adapter is None:
        return
    from rlx.learner.policy.adapters import check_folder
    from rlx.learner.policy.quantized import check_installed

    try:
        check_installed(config)
        check_folder(config)
        found.lines.append(
            f"adapter: {config.lora_model_dir or f'new, rank {config.lora_r}'}, sent to the workers "
            f"{'alone' if config.lora_sync == 'adapter' else 'merged'}"
        )
        _check_engine_takes_adapters(config, found)
    except ConfigError as error:
        found.errors.append(error)


def _check_engine_takes_adapters(config: Config, found: _Findings) -> None:
    """An engine would say so only when it has loaded the model. Raises ConfigError."""
    file = Path(config.local(config.base_model)) / "config.json"
    if config.lora_sync != "adapter" or not file.is_file():
        return
    for architecture in json.loads(file.read_text()).get("architectures") or ():
        answer = _ask_vllm(architecture)
        if answer == "False":
            raise ConfigError(
                f"{config.path}: lora_sync: adapter: vLLM serves {architecture} without adapters only; write `lora_sync: merged`"
            )
        if answer != "True":
            found.unchecked.append(f"not checked: whether vLLM serves {architecture} with adapters")


def _ask_vllm(architecture: str) -> str:
    """True, False or None, as `takes_adapters` prints it; nothing where vLLM cannot be asked here. In a process of its
    own, which imports vLLM."""
    code = "import sys; from rlx.rollout.vllm_lora import takes_adapters; print(takes_adapters(sys.argv[1]))"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, architecture],
            capture_output=True,
            text=True,
            timeout=_VLLM_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip().rpartition("\n")[2]


def _check_optimizer(config: Config, found: _Findings) -> None:
    from rlx.learner.arguments import check_optimizer

    try:
        check_optimizer(config)
        found.lines.append(f"optimizer: {config.optimizer}, {config.lr_scheduler}")
    except ConfigError as error:
        found.errors.append(error)


def _check_trackers(config: Config, found: _Findings) -> None:
    if not config.trackers:
        return
    try:
        check_trackers(config, config.path)
        found.lines.append(f"trackers: {', '.join(config.trackers)}")
    except ConfigError as error:
        found.errors.append(error)


def _check_learner(config: Config, found: _Findings) -> None:
    from rlx.learner.launch import check_attention, check_output_dir

    for check in (check_attention, check_output_dir):
        try:
            check(config)
        except ConfigError as error:
            found.errors.append(error)


def _check_transform_names(config: Config, found: _Findings) -> None:
    from rlx.dotted import resolve

    for index, section in enumerate(config.datasets):
        if section.type is not None:
            try:
                resolve(section.type, base_dir=config.base_dir, key=f"datasets[{index}].type")
                found.lines.append(f"transform {section.type}: imported")
            except UserCodeError as error:
                found.errors.append(error)


def _check_rewards(config: Config, row: dict[str, Any] | None, found: _Findings) -> None:
    from rlx.rewards.scoring import MissingColumn, ScoreRequest
    from rlx.rewards.sources import check_source, kind_of

    as_text = False
    with contextlib.suppress(UserCodeError):  # of the rollout function; what is checked of the episodes tells it
        as_text = rewards_get_text(config)
    for index, name in enumerate(config.trl.reward_funcs):
        key = f"trl.reward_funcs[{index}]"
        try:
            if (kind := kind_of(name, config.base_dir)) != "function":
                check_source(name, config.base_dir, key)
                what = "a model, is not loaded" if kind == "model" else "another process, is not called"
                found.unchecked.append(f"not checked: reward {name}, {what}; `rlx reward test` does")
                continue
            if row is None:
                _tried(config, name, key, None)
                found.lines.append(f"reward {name}: imported")
                found.unchecked.append(f"not checked: reward {name} on a row, because there is none")
                continue
            columns = {k: v for k, v in row.items() if k != "prompt"}
            said = [completion_for(row["prompt"], text, as_text) for text in ("", "42")]
            request = ScoreRequest(row["prompt"], said, [[], [0]], columns, config.trl.max_completion_length)
            values = _tried(config, name, key, request)
            found.lines.append(
                f"reward {name}: gives {', '.join(f'{v:g}' for v in values)} for the completions '' and '42' of the first row"
            )
        except MissingColumn as error:
            if config.has_episodes:
                found.unchecked.append(f"not checked: {error.for_episodes}")
            else:
                found.errors.append(error)
        except UserCodeError as error:
            found.errors.append(error)


def _tried(config: Config, name: str, key: str, request: Any) -> list[float]:
    """What the reward function says of `request`, None: only import it. In a process of its own: it may block, or end
    its process. Raises UserCodeError."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_try_and_send, args=(sender, name, config.base_dir, key, request), daemon=True)
    process.start()
    sender.close()
    seconds = config.rewards.timeout + _IMPORT_S
    try:
        if not receiver.poll(seconds):
            raise UserCodeError(f"{key} ({name}) did not answer within {seconds:g} s; in a run it would be killed.")
        answer = receiver.recv()
    except EOFError:
        process.join(_IMPORT_S)
        raise UserCodeError(
            f"{key} ({name}) ended its process, with status {process.exitcode}. A reward function must return."
        ) from None
    finally:
        process.kill()
        process.join(_IMPORT_S)
    if isinstance(answer, UserCodeError):
        raise answer
    return answer


def _try_and_send(sender: Any, name: str, base_dir: Path, key: str, request: Any) -> None:
    from rlx.rewards.scoring import load_reward, score_group

    try:
        reward = load_reward(name, base_dir, key)
        sender.send([] if request is None else score_group(reward, request).tolist())
    except UserCodeError as error:
        sender.send(error)


def _check_episodes(config: Config, tokenizer: Any, found: _Findings) -> None:
    from rlx.envs.chat import Chat
    from rlx.envs.load import load_rollout

    if tokenizer is None:
        found.unchecked.append("not checked: how episodes are made, because there is no tokenizer")
        return
    trl = config.trl
    named = trl.rollout_func or trl.environment_factory or ", ".join(trl.tools) or f"envs[0] ({config.envs[0].name})"
    try:
        chat = Chat(tokenizer, trl.chat_template_kwargs)
        rollout = load_rollout(config, chat)
        if rollout.many_turns:
            chat.check(config)
        found.lines.append(f"episodes: {named}" + (", several turns" if rollout.many_turns else ""))
    except (UserCodeError, ConfigError) as error:
        found.errors.append(error)


def _plan_table(config: Config, num_processes: int) -> Table:
    plan, trl = make_plan(config, num_processes), config.trl
    shared = plan.steps_per_batch > 1
    completions = plan.prompts_per_batch * plan.num_generations
    table = Table(
        title=f"one generation batch, for {plan.steps_per_batch} optimizer steps" if shared else "one optimizer step",
        show_header=False,
    )
    rows = [
        ("prompts", f"{plan.prompts_per_batch}"),
        ("completions", f"{completions} = {plan.prompts_per_batch} × {plan.num_generations} generations"),
        *([("completions of a step", f"{plan.completions_per_step}, in {plan.num_iterations} pass(es) over the batch")] if shared else []),
        ("micro-batches of a step", f"at most {config.token_budget:,} tokens each" if config.token_budget else
                          f"{plan.gradient_accumulation_steps} × {config.micro_batch_size} completions on {num_processes} process(es)"),
        ("staleness", f"at most {config.async_.max_staleness} step(s)" if config.async_.max_staleness else "0: sample, train, publish, in turn"),
        ("tokens of it, at most", f"{completions * (config.max_prompt_length + trl.max_completion_length):,}"
                                      f" ({config.max_prompt_length} prompt + {trl.max_completion_length} completion each)"),
        ("engines", f"{config.vllm.data_parallel_size} × tensor parallel {config.vllm.tensor_parallel_size}, {config.max_model_len} tokens of context"),
        ("loss", f"{trl.loss_type}, beta {trl.beta:g}{'' if trl.beta else ' (no reference model)'}"),
        ("service", config.base_url),
    ]  # fmt: skip
    parameters = count_parameters(Path(config.local(config.base_model)))
    if parameters is not None:
        memory = estimate_memory(config, parameters, num_processes)
        rows.append(("parameters", f"{parameters:,}"))
        rows.append(
            (
                "memory, weights and optimizer",
                f"{memory.learner_gib:.2f} GiB per learner process, {memory.engine_gib:.2f} GiB per engine; activations and runtimes come on top",
            )
        )
    for name, value in rows:
        table.add_row(name, value)
    return table
