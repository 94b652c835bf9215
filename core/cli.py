"""The command line. Nothing heavy is imported before the configuration is validated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rlx import __version__, cli_runs
from rlx.cli_parts import EPILOG, OVERRIDES, ConfigPath, guarded, load
from rlx.config import Config
from rlx.imports import loading

app = typer.Typer(
    help="GRPO with vLLM rollout workers on Ray and a separate learner, from one YAML.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Processes = Annotated[int, typer.Option("--num-processes", "-n", min=1, help="Learner processes, one per GPU.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Same as `rlx check`: validate everything, start nothing.")]


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"rlx {__version__}")
        raise typer.Exit


@app.command(context_settings=OVERRIDES, epilog=EPILOG)
def check(context: typer.Context, config: ConfigPath, num_processes: Processes = 1) -> None:
    """Validate keys, batch arithmetic, devices, data, rewards and transforms; print the plan. Loads no model."""
    raise typer.Exit(_check(load(config, context.args), num_processes))


@app.command("vllm-serve", context_settings=OVERRIDES, epilog=EPILOG)
def vllm_serve(context: typer.Context, config: ConfigPath, dry_run: DryRun = False) -> None:
    """Start the rollout service: Ray, the vLLM workers, the reward processes and the HTTP gateway."""
    loaded = load(config, _serve_options(context.args))
    if dry_run:
        raise typer.Exit(_check(loaded, 1))
    with loading():
        from rlx.cluster.serve import serve_main

    raise typer.Exit(guarded(lambda: serve_main(loaded)))


@app.command(context_settings=OVERRIDES, epilog=EPILOG)
def train(
    context: typer.Context,
    config: ConfigPath,
    num_processes: Processes = 1,
    dry_run: DryRun = False,
    replay: Annotated[
        Path | None,
        typer.Option("--replay", metavar="FOLDER", help="Recorded rollouts to train on, without a service."),
    ] = None,
) -> None:
    """Start the learner. It waits for the service of `rlx vllm-serve CONFIG` and trains."""
    overrides = [*context.args, *(["--replay", str(replay)] if replay is not None else [])]
    loaded = load(config, overrides)
    if dry_run:
        raise typer.Exit(_check(loaded, num_processes))
    from rlx.learner.launch import train_main

    raise typer.Exit(guarded(lambda: train_main(loaded, overrides, num_processes)))


@app.command(context_settings=OVERRIDES, epilog=EPILOG)
def run(context: typer.Context, config: ConfigPath, num_processes: Processes = 1, dry_run: DryRun = False) -> None:
    """Service and learner in one terminal: start the service, wait for it, train, stop it."""
    loaded = load(config, context.args)
    if dry_run:
        raise typer.Exit(_check(loaded, num_processes))
    from rlx.cluster.run import run_main

    raise typer.Exit(guarded(lambda: run_main(loaded, context.args, num_processes)))


cli_runs.add_to(app)

rollout = typer.Typer(help="Look at single episodes.", no_args_is_help=True)
reward = typer.Typer(help="Try reward functions without training.", no_args_is_help=True)
workers = typer.Typer(help="The rollout workers of a running service: list, add, remove.", no_args_is_help=True)
app.add_typer(rollout, name="rollout")
app.add_typer(reward, name="reward")
app.add_typer(workers, name="workers")


@rollout.command("test", context_settings=OVERRIDES, epilog=EPILOG)
def rollout_test(
    context: typer.Context,
    config: ConfigPath,
    row: Annotated[int, typer.Option("--row", min=0, help="Which row of the first data set.")] = 0,
) -> None:
    """One episode, token by token: what the policy sampled, what was context, versions, rewards. Uses the service of
    the YAML when it runs, else starts one for this."""
    loaded = load(config, context.args)
    from rlx.cluster.rollout_test import rollout_test_main

    raise typer.Exit(guarded(lambda: rollout_test_main(loaded, context.args, row)))


@reward.command("test", context_settings=OVERRIDES, epilog=EPILOG)
def reward_test(
    context: typer.Context,
    config: ConfigPath,
    samples: Annotated[
        Path | None, typer.Option("--samples", help="A samples.jsonl of a run: score it again, without a model.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of the first data set to try.")] = 4,
    answer_column: Annotated[
        str | None,
        typer.Option("--answer-column", help="The column that holds the right answer; default: found by name."),
    ] = None,
) -> None:
    """Every reward function on trivial completions (nothing, the prompt, the answer, a very long one), in the same
    processes as in a run; flags what pays for nothing, or blocks."""
    loaded = load(config, context.args)
    from rlx.cluster.reward_test import reward_test_main

    raise typer.Exit(guarded(lambda: reward_test_main(loaded, samples, rows, answer_column)))


@workers.command("list", context_settings=OVERRIDES, epilog=EPILOG)
def workers_list(context: typer.Context, config: ConfigPath) -> None:
    """Name, state, node, process, weight version and load of every worker."""
    loaded = load(config, _serve_options(context.args))
    from rlx.cluster.workers import list_main

    raise typer.Exit(guarded(lambda: list_main(loaded)))


@workers.command("add", context_settings=OVERRIDES, epilog=EPILOG)
def workers_add(
    context: typer.Context,
    config: ConfigPath,
    count: Annotated[int, typer.Option("--count", min=1, help="How many.")] = 1,
) -> None:
    """Add workers on free devices of the Ray cluster, and wait until they have the newest weights and serve."""
    loaded = load(config, _serve_options(context.args))
    from rlx.cluster.workers import add_main

    raise typer.Exit(guarded(lambda: add_main(loaded, count)))


@workers.command("remove", context_settings=OVERRIDES, epilog=EPILOG)
def workers_remove(
    context: typer.Context,
    config: ConfigPath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `rlx workers list` calls it.")],
) -> None:
    """Let a worker finish what it has, then take it out and give its devices back."""
    words = [name, *context.args]
    name = words.pop(-1 if name.startswith("--") else 0)  # typer takes an override before NAME for it
    loaded = load(config, _serve_options(words))
    from rlx.cluster.workers import remove_main

    raise typer.Exit(guarded(lambda: remove_main(loaded, name)))


def _check(config: Config, num_processes: int) -> int:
    with loading():
        from rlx.cluster.check import check_main

        return guarded(lambda: check_main(config, num_processes))


def _serve_options(arguments: list[str]) -> list[str]:
    """Axolotl's `vllm-serve --port 8001` means `--vllm.port 8001`."""
    short = ("host", "port", "tensor-parallel-size", "data-parallel-size", "gpu-memory-utilization", "dtype",
             "max-model-len", "enable-prefix-caching")  # fmt: skip
    renamed = []
    for argument in arguments:
        name = argument[2:].partition("=")[0].replace("_", "-")
        renamed.append(f"--vllm.{argument[2:]}" if argument.startswith("--") and name in short else argument)
    return renamed


def main(arguments: list[str] | None = None) -> Any:
    """The `rlx` command."""
    return app(args=arguments, prog_name="rlx")


if __name__ == "__main__":
    main()
