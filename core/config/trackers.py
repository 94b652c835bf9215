"""The keys of experiment trackers, flat at the top level as Axolotl has them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlx.config.section import Section
from rlx.errors import ConfigError

_NAMES = ("wandb", "mlflow", "tensorboard", "trackio")
_TURN_ON = {
    "wandb": ("wandb_project",),
    "mlflow": ("mlflow_experiment_name", "mlflow_tracking_uri"),
    "trackio": ("trackio_project_name",),
}
"""The keys whose presence turns a tracker on."""


class TrackerKeys(Section):
    """Where the run's metrics and completions go besides output_dir. Nothing leaves the machine unless one of these asks."""

    use_wandb: bool | None = Field(
        None,
        description="Log to Weights & Biases. Default: where wandb_project is given. `wandb_mode: offline` keeps it here.",
    )
    wandb_project: str | None = Field(None, description="Project; turns wandb on. Default: WANDB_PROJECT, else rlx.")
    wandb_entity: str | None = Field(None, description="Team or user; default: the user who is logged in.")
    wandb_name: str | None = Field(None, description="Name of the run; default: wandb_run_id, else wandb's own choice.")
    wandb_run_id: str | None = Field(
        None, description="Id of the run, also of one to go on with. Default: a new one, kept for resuming."
    )
    wandb_mode: Literal["online", "offline", "disabled"] | None = Field(
        None, description="offline: write to output_dir/wandb only; disabled: off. Default: WANDB_MODE, else online."
    )
    wandb_watch: Literal["gradients", "parameters", "all"] | None = Field(
        None, description="Histograms of the model's gradients or parameters, every 100 log lines."
    )
    wandb_log_model: Literal["checkpoint", "end"] | None = Field(
        None, description="Upload the weights as artifacts: every checkpoint, or the final model."
    )
    use_mlflow: bool | None = Field(
        None, description="Log to MLflow. Default: where mlflow_experiment_name or mlflow_tracking_uri is given."
    )
    mlflow_tracking_uri: str | None = Field(
        None, description="MLflow's server or store; turns it on. Default: MLFLOW_TRACKING_URI, else MLflow's own."
    )
    mlflow_experiment_name: str | None = Field(None, description="Experiment; turns MLflow on.")
    mlflow_run_name: str | None = Field(None, description="Name of the run; default: MLflow's own choice.")
    hf_mlflow_log_artifacts: bool = Field(False, description="Copy every checkpoint to MLflow's artifact store.")
    use_tensorboard: bool = Field(
        False, description="Write event files to output_dir/tensorboard: `tensorboard --logdir output_dir/tensorboard`."
    )
    use_trackio: bool | None = Field(None, description="Log to Trackio. Default: where trackio_project_name is given.")
    trackio_project_name: str | None = Field(None, description="Project; turns Trackio on. Default: rlx.")
    trackio_run_name: str | None = Field(None, description="Name of the run; default: a new one, kept for resuming.")
    trackio_space_id: str | None = Field(
        None, description="Hugging Face Space that gets the logs, for example me/runs. Default: this machine only."
    )

    @field_validator("*", mode="before")
    @classmethod
    def an_empty_key_is_off(cls, value: Any, info: Any) -> Any:
        named_by_text = info.field_name.startswith(("wandb_", "mlflow_", "trackio_"))
        return None if named_by_text and value in ("", False, "false") else value

    @model_validator(mode="after")
    def keys_of_a_tracker_need_it(self) -> TrackerKeys:
        for tracker in _NAMES:
            switch = f"use_{tracker}"
            if tracker in self.trackers or getattr(self, switch) is False or self._disabled(tracker):
                continue
            keys = [k for k in TrackerKeys.model_fields if f"{tracker}_" in k and k != switch and getattr(self, k)]
            if keys:
                raise ValueError(f"{keys[0]} has no effect without {_TURN_ON[tracker][0]} or `{switch}: true`")
        return self

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names of those that are on."""
        on = {
            "tensorboard": self.use_tensorboard,
            "wandb": self.use_wandb,
            "mlflow": self.use_mlflow,
            "trackio": self.use_trackio,
        }
        asked = [name for name, keys in _TURN_ON.items() if on[name] is None and any(getattr(self, k) for k in keys)]
        names = [name for name in _NAMES if on[name] or name in asked]
        return tuple(name for name in names if not self._disabled(name))

    def _disabled(self, tracker: str) -> bool:
        return tracker == "wandb" and self.wandb_mode == "disabled"


def check_trackers(keys: TrackerKeys, path: Path) -> None:
    """Raises ConfigError when the package of a tracker is missing."""
    missing = [name for name in keys.trackers if importlib.util.find_spec(name) is None]
    if missing:
        asked = next(k for k in (f"use_{missing[0]}", *_TURN_ON.get(missing[0], ())) if getattr(keys, k))
        raise ConfigError(
            f"{path}: {asked}: the package {missing[0]} is not installed here. Type `pip install {' '.join(missing)}`, or remove "
            "the key."
        )
