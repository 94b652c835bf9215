"""What each tracker needs beside its callback of transformers: how its run begins, its table, its end.

The packages are imported here when a tracker is made, not before; `rlx.config.trackers.check_trackers` has found them.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback

from rlx.config import Config

_PROJECT = "rlx"


class TensorBoard:
    """Event files in a folder of the run. Steps after `resumed_step` of the folder are shown no more."""

    name = "tensorboard"

    def __init__(self, config: Config, run_id: str, resumed_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._folder = Path(config.output_dir) / "tensorboard" / run_id
        self._writer = SummaryWriter(str(self._folder), purge_step=resumed_step + 1 if resumed_step else None)
        self.callback = TensorBoardCallback(self._writer)
        self._last: tuple[Any, ...] = ()

    def begin(self, args: Any, state: Any, control: Any, kwargs: Mapping[str, Any], values: Mapping[str, Any]) -> str:
        self._last = (args, state, control)
        self.callback.on_train_begin(args, state, control, **kwargs)
        self._writer.add_text("rlx", "\n".join(f"    {key}: {value}" for key, value in values.items()))
        return f"tensorboard --logdir {self._folder.parent}"

    def run_id(self) -> str:
        return self._folder.name

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """As text: it has no tables. Indented, so that nothing in it is read as Markdown."""
        lines = [f"{name}: {value}" for row in rows for name, value in zip(columns, row, strict=True)]
        text = "\n".join(f"    {line}" for entry in lines for line in entry.splitlines())
        self._writer.add_text("completions", text, step)

    def end(self, failed: bool) -> None:
        self.callback.on_train_end(*self._last)


class Wandb:
    """Weights & Biases. Its own console capture is off: the terminal shows the live view."""

    name = "wandb"

    def __init__(self, config: Config, run_id: str):
        if config.wandb_watch:
            os.environ["WANDB_WATCH"] = config.wandb_watch
        if config.wandb_log_model:
            os.environ["WANDB_LOG_MODEL"] = config.wandb_log_model  # read by the callback when it is made
        self._config, self._run_id = config, run_id
        self.callback = WandbCallback()
        self._last: tuple[Any, ...] = ()
        self._kwargs: Mapping[str, Any] = {}

    def begin(self, args: Any, state: Any, control: Any, kwargs: Mapping[str, Any], values: Mapping[str, Any]) -> str:
        import wandb

        self._last, self._kwargs = (args, state, control), kwargs
        keys = self._config
        run = wandb.init(
            project=keys.wandb_project or os.environ.get("WANDB_PROJECT") or _PROJECT,
            entity=keys.wandb_entity,
            name=keys.wandb_name or keys.wandb_run_id,
            id=self._run_id,
            resume="allow",
            mode=keys.wandb_mode,
            dir=os.environ.get("WANDB_DIR") or keys.output_dir,
            settings=wandb.Settings(console="off", silent=True),
        )
        self.callback.on_train_begin(args, state, control, **kwargs)
        run.config.update({"rlx": dict(values)}, allow_val_change=True)
        return f"offline, in {Path(run.dir).parent}; `wandb sync` sends it" if run.offline else run.url or "disabled"

    def run_id(self) -> str:
        return self._run_id

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        wandb.log({"completions": wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def end(self, failed: bool) -> None:
        import wandb

        if not failed:
            self.callback.on_train_end(*self._last, **self._kwargs)
        wandb.finish(exit_code=int(failed))


class _MLflowCallback(MLflowCallback):
    """Copies checkpoints as files; transformers' would pickle a Python model around each."""

    def __init__(self, copies_checkpoints: bool):
        super().__init__()
        self._copies_checkpoints = copies_checkpoints

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._copies_checkpoints:
            name = f"checkpoint-{state.global_step}"
            self._ml_flow.log_artifacts(str(Path(args.output_dir) / name), artifact_path=name)


class MLflow:
    """MLflow, at `mlflow_tracking_uri`."""

    name = "mlflow"

    def __init__(self, config: Config, run_id: str | None):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._config = config
        self._run_id = run_id or os.environ.pop("MLFLOW_RUN_ID", None)  # with it, the callback would start a second run
        if self._run_id is not None:
            os.environ["MLFLOW_MAX_LOG_PARAMS"] = "0"  # the parameters of a run cannot be changed
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self.callback = _MLflowCallback(config.hf_mlflow_log_artifacts)
        self._last: tuple[Any, ...] = ()

    def begin(self, args: Any, state: Any, control: Any, kwargs: Mapping[str, Any], values: Mapping[str, Any]) -> str:
        import mlflow

        self._last = (args, state, control)
        keys = self._config
        if keys.mlflow_tracking_uri:
            mlflow.set_tracking_uri(keys.mlflow_tracking_uri)
        if keys.mlflow_experiment_name:
            mlflow.set_experiment(keys.mlflow_experiment_name)
        run = mlflow.start_run(run_id=self._run_id, run_name=keys.mlflow_run_name)
        self.callback.on_train_begin(args, state, control, **kwargs)
        if self._run_id is None:
            longest = mlflow.utils.validation.MAX_PARAM_VAL_LENGTH
            mlflow.log_params({f"rlx.{key}": str(value)[:longest] for key, value in values.items()}, synchronous=False)
        self._run_id = run.info.run_id
        return f"run {self._run_id} at {_without_user(mlflow.get_tracking_uri())}"

    def run_id(self) -> str:
        assert self._run_id is not None, "it has begun"
        return self._run_id

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A file a step: MLflow appends to one by reading all of it."""
        import mlflow

        by_column = {name: [row[place] for row in rows] for place, name in enumerate(columns)}
        mlflow.log_dict(by_column, f"completions/step_{step:06d}.json")

    def end(self, failed: bool) -> None:
        import mlflow

        mlflow.flush_async_logging()
        mlflow.end_run("FAILED" if failed else "FINISHED")


class Trackio:
    """Trackio, on this machine unless a Space is named."""

    name = "trackio"

    def __init__(self, config: Config, run_name: str):
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        self._config, self._run_name = config, run_name
        self.callback = TrackioCallback()
        self._last: tuple[Any, ...] = ()
        self._kwargs: Mapping[str, Any] = {}

    def begin(self, args: Any, state: Any, control: Any, kwargs: Mapping[str, Any], values: Mapping[str, Any]) -> str:
        import trackio

        own = copy.copy(args)
        own.project = self._config.trackio_project_name or _PROJECT
        own.run_name = self._run_name
        own.trackio_space_id = self._config.trackio_space_id
        own.trackio_static_space_id = False  # no second, frozen Space
        self._last, self._kwargs = (own, state, control), kwargs
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how to look at it
            self.callback.on_train_begin(own, state, control, **kwargs)
        trackio.config.update({"rlx": dict(values)}, allow_val_change=True)
        return f"run {self._run_name}: trackio show --project {own.project}"

    def run_id(self) -> str:
        return self._run_name

    def table(self, step: int, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import pandas
        import trackio

        frame = pandas.DataFrame([list(row) for row in rows], columns=list(columns))
        trackio.log({"completions": trackio.Table(dataframe=frame)})

    def end(self, failed: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.callback.on_train_end(*self._last, **self._kwargs)


def _without_user(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if separator else url
