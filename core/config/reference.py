"""Writes docs/configuration.md from the models: `python -m rlx.config.reference`. A test keeps it fresh."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlx.config.lora import LoraKeys
from rlx.config.output import OutputKeys
from rlx.config.refusals import REFUSED
from rlx.config.schema import Config
from rlx.config.section import keys_of
from rlx.config.sections import (
    AsyncSection,
    ClusterSection,
    DatasetSection,
    EnvSection,
    EpisodesSection,
    OpenEnvSection,
    RewardLimits,
    RewardsSection,
    ServiceSection,
    VllmSection,
)
from rlx.config.sharding import FsdpSection, ShardingKeys
from rlx.config.trackers import TrackerKeys
from rlx.config.training import TrainingKeys
from rlx.config.trl import TrlSection

_SECTIONS: list[tuple[str, type[BaseModel]]] = [
    ("trl", TrlSection),
    ("vllm", VllmSection),
    ("datasets[] and test_datasets[]", DatasetSection),
    ("async", AsyncSection),
    ("service", ServiceSection),
    ("rewards", RewardsSection),
    ("rewards.functions.NAME", RewardLimits),
    ("envs[]", EnvSection),
    ("envs[].openenv", OpenEnvSection),
    ("episodes", EpisodesSection),
    ("cluster", ClusterSection),
    ("fsdp_config", FsdpSection),
]

_INTRODUCTION = """# Configuration

One YAML serves `rlx vllm-serve`, `rlx train`, `rlx run` and `rlx check`. Every key can be given on the command line too:
`--trl.beta 0.01`, `--vllm.port 8001`, `--learning_rate 1e-5`. An unknown key is an error that names its line and the
nearest key. A key with no value means its default.

This page is made from the models in `core/config/` (`make docs`).
"""


def render() -> str:
    """The whole page as Markdown."""
    parts = [
        _INTRODUCTION,
        "## Top level\n",
        _table(
            Config,
            skip={name.split("[")[0] for name, _ in _SECTIONS} - {"datasets", "envs"}
            | {key for part in Config.__bases__ for key in keys_of(part)},
        ),
        "\n## Top level: training\n",
        f"{TrainingKeys.__doc__}\n",
        _table(TrainingKeys, skip=set()),
        "\n## Top level: output\n",
        f"{OutputKeys.__doc__}\n",
        _table(OutputKeys, skip=set()),
        "\n## Top level: adapters\n",
        "Training of an adapter instead of the whole model ([guide](guides/lora.md)).\n",
        _table(LoraKeys, skip=set()),
        "\n## Top level: large models\n",
        "What a model needs that does not fit one process ([guide](guides/large_models.md)).\n",
        _table(ShardingKeys, skip=set()),
        "\n## Top level: trackers\n",
        "Where metrics and completions go besides output_dir ([guide](guides/monitoring.md)).\n",
        _table(TrackerKeys, skip=set()),
    ]
    for name, model in _SECTIONS:
        first_line = (model.__doc__ or "").strip().splitlines()[0]
        parts += [f"\n## `{name}`\n", f"{first_line}\n", _table(model, skip=set())]
    parts += [
        "\n## Keys of Axolotl that are refused\n",
        "Each is an error with this text, unless its value means “off” there.\n",
        "| key | why | instead |\n| --- | --- | --- |",
    ]
    parts += [f"| `{key}` | {refusal.why} | {refusal.instead} |" for key, refusal in sorted(REFUSED.items())]
    return "\n".join(parts) + "\n"


def _table(model: type[BaseModel], skip: set[str]) -> str:
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in keys_of(model).items():
        if name not in skip:
            meaning = (field.description or "").replace("|", "\\|")
            rows.append(f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {meaning} |")
    return "\n".join(rows)


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return ""
    if field.default is PydanticUndefined:
        return "**required**"
    if field.default is None:
        return ""
    value = field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{str(a).lower() if isinstance(a, bool) else a}`" for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(a) for a in arguments if a is not type(None))
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {str: "text", int: "integer", float: "number", bool: "true/false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


if __name__ == "__main__":
    page = Path("docs") / "configuration.md"
    page.write_text(render(), encoding="utf-8")
    print(f"wrote {page}")
