"""What the commands of `rlx` share: how they take a YAML, loading the YAML, and one line to stderr for an error."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from rlx.config import Config, load_config, parse_overrides
from rlx.errors import RlxError
from rlx.hub import settle_hub

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
EPILOG = "Any key of the YAML can be given here too: --trl.beta 0.01 --vllm.port 8001 --learning_rate 1e-5"
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML of the run.")]


def load(path: Path, arguments: list[str]) -> Config:
    """The validated configuration; ends the command where there is none."""
    try:
        config = load_config(path, parse_overrides(arguments))
    except RlxError as error:
        _fail(error)
        raise typer.Exit(error.exit_code) from None
    settle_hub(config)
    return config


def guarded(body: Callable[[], int]) -> int:
    """The exit status of `body`, or that of its error, told on stderr."""
    try:
        return body()
    except RlxError as error:
        _fail(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _fail(error: RlxError) -> None:
    typer.echo(f"{_mark()}{error}", err=True)


def _mark() -> str:
    return "\x1b[31merror:\x1b[0m " if sys.stderr.isatty() and "NO_COLOR" not in os.environ else "error: "
