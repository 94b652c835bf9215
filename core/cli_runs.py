"""The commands that look at a run: samples, view, report and trace need no service, dashboard does. None needs a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rlx.cli_parts import EPILOG, OVERRIDES, ConfigPath, guarded, load


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command()(samples)
    app.command()(view)
    app.command()(report)
    app.command(context_settings=OVERRIDES, epilog=EPILOG)(dashboard)
    app.command()(trace)


def samples(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The output_dir of a run, or its samples.jsonl.")],
    step: Annotated[str | None, typer.Option("--step", metavar="N|A:B", help="Of this step, or of these.")] = None,
    best: Annotated[int | None, typer.Option("--best", min=1, help="The N with the highest reward.")] = None,
    worst: Annotated[int | None, typer.Option("--worst", min=1, help="The N with the lowest reward.")] = None,
    by: Annotated[
        str | None, typer.Option("--by", metavar="REWARD", help="What --best and --worst go by; default: the sum.")
    ] = None,
    status: Annotated[str | None, typer.Option("--status", help="ok, truncated, timeout, env_lost, aborted.")] = None,
    group: Annotated[str | None, typer.Option("--group", metavar="KEY", help="Of this group.")] = None,
    diff_versions: Annotated[
        bool, typer.Option("--diff-versions", help="Whose tokens come from more than one weight version.")
    ] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=0, help="How many; default 10, 0 for all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The records as they were saved, one a line.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Long texts whole.")] = False,
) -> None:
    """What the model wrote, the newest first: prompt, conversation, rewards, advantage, weight versions."""
    from rlx.sample_view import samples_main
    from rlx.samples import Query, parse_steps

    def show() -> int:
        steps = None if step is None else parse_steps(step)
        query = Query(steps, status, group, diff_versions, best, worst, by, limit)
        return samples_main(out, query, as_json, full)

    raise typer.Exit(guarded(show))


def view(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The output_dir of a run.")],
    other: Annotated[Path | None, typer.Argument(metavar="OUT2", help="Another run, to compare it with.")] = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Where to listen; default: a free port.")] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
) -> None:
    """The page of a run, for a browser on this machine: curves, step times, workers, samples, events. Goes on while the
    run writes; Ctrl-C ends it."""
    from rlx.view.serve import view_main

    folders = [out] if other is None else [out, other]
    raise typer.Exit(guarded(lambda: view_main(folders, port, sys.stdout.isatty() and not no_browser)))


def report(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The output_dir of a run.")],
    file: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Default: OUT/report.html.")] = None,
) -> None:
    """One HTML file about a run, to hand on: curves, evaluation, best and worst samples, events, configuration,
    versions. Needs no network and no script."""
    from rlx.view.report import report_main

    raise typer.Exit(guarded(lambda: report_main(out, file)))


def dashboard(
    context: typer.Context,
    config: ConfigPath,
    start: Annotated[bool, typer.Option("--prometheus/--no-prometheus", help="Start one where there is one.")] = True,
    interval: Annotated[int, typer.Option("--interval", min=1, metavar="SECONDS", help="From scrape to scrape.")] = 5,
) -> None:
    """Where to look at a running service, configuration for Prometheus and Grafana, and a Prometheus until Ctrl-C."""
    loaded = load(config, context.args)
    from rlx.cluster.dashboard import dashboard_main

    raise typer.Exit(guarded(lambda: dashboard_main(loaded, start, interval)))


def trace(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The output_dir of a run.")],
    step: Annotated[str, typer.Option("--step", metavar="N|A:B", help="Of this step, or of these.")],
    file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="What to write; default: OUT/trace-N.json.")
    ] = None,
) -> None:
    """A step as a timeline for ui.perfetto.dev or chrome://tracing: groups, turns, rewards, publish, training, waits, each
    on its process."""
    from rlx.samples import parse_steps
    from rlx.trace import trace_main

    raise typer.Exit(guarded(lambda: trace_main(out, parse_steps(step), file)))
