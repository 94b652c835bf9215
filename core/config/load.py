"""From a YAML file and overrides to a Config, or to one ConfigError that lists everything that is wrong with it."""

from __future__ import annotations

import difflib
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rlx.config.refusals import METHODS_ELSEWHERE, REFUSED, RENAMED, VALUE_HINTS
from rlx.config.schema import Config
from rlx.config.section import keys_of
from rlx.config.source import KeyPath, Source, dotted, read_source
from rlx.errors import ConfigError


def load_config(path: str | Path, overrides: dict[KeyPath, tuple[str, Any]] | None = None) -> Config:
    """Read, check and freeze the configuration in `path`. Raises ConfigError with every problem found."""
    source = read_source(Path(path), overrides or {})
    problems = _key_problems(source, Config, source.data, ())
    data = _without_refused(source.data)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        problems += [
            _explain(source, dict(item))
            for item in error.errors(include_url=False)
            if item["type"] != "extra_forbidden"
        ]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    config._path = Path(path).resolve()
    return config


def parse_overrides(arguments: list[str]) -> dict[KeyPath, tuple[str, Any]]:
    """`--trl.beta 0.01 --vllm.port=8001 --bf16` → key paths with values, read as YAML. Dashes mean underscores."""
    overrides: dict[KeyPath, tuple[str, Any]] = {}
    rest = list(arguments)
    while rest:
        typed = rest.pop(0)
        if not typed.startswith("--") or len(typed) == 2:
            raise ConfigError(f"command line: {typed!r} is not understood. Overrides look like --trl.beta 0.01")
        name, has_value, text = typed[2:].partition("=")
        if not has_value and rest and not rest[0].startswith("--"):
            text, has_value = rest.pop(0), "="
        key = tuple(name.replace("-", "_").split("."))
        try:
            value = yaml.safe_load(text) if has_value else True
        except yaml.YAMLError:
            value = text
        if isinstance(value, str):
            value = _as_number(value)
        overrides[key] = (f"--{name}", value)
    return overrides


def _as_number(text: str) -> Any:
    try:
        return float(text) if any(c.isdigit() for c in text) else text
    except ValueError:
        return text


def _key_problems(source: Source, model: type[BaseModel], data: dict[str, Any], at: KeyPath) -> list[str]:
    problems = []
    for name, value in data.items():
        key = (*at, name)
        name = _plain(name, at)
        flat = ".".join(str(part) for part in (*at, name) if not isinstance(part, int))
        if flat in REFUSED:
            refusal = REFUSED[flat]
            if not any(value is off or (value == off and type(value) is type(off)) for off in refusal.harmless):
                problems.append(f"{source.where(key)}: {dotted(key)}: {refusal.why}. {refusal.instead}")
            continue
        field = keys_of(model).get(name) if isinstance(name, str) else None
        if field is None:
            problems.append(f"{source.where(key)}: unknown key {dotted(key)!r}.{_nearest(str(name), model, at)}")
            continue
        section, many = _section_of(field.annotation)
        if section is not None and many and isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    problems += _key_problems(source, section, item, (*key, index))
        elif section is not None and isinstance(value, dict):
            problems += _key_problems(source, section, value, key)
    return problems


def _plain(name: Any, at: KeyPath) -> Any:
    """Axolotl's older keys of fsdp_config have a prefix."""
    return name.removeprefix("fsdp_") if at == ("fsdp_config",) and isinstance(name, str) else name


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section model behind a field's annotation, and whether it is a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    if typing.get_origin(annotation) is list:
        return _section_of(typing.get_args(annotation)[0])[0], True
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        found = [_section_of(part) for part in typing.get_args(annotation)]
        return next((pair for pair in found if pair[0]), (None, False))
    return None, False


def _nearest(name: str, model: type[BaseModel], at: KeyPath) -> str:
    """A suggestion: the same key in another section, else the nearest here, else the nearest in another section."""
    everywhere = {name: name for name in keys_of(Config)}
    for section, field in keys_of(Config).items():
        inner, many = _section_of(field.annotation)
        if inner is not None:
            everywhere |= {key: f"{section}[].{key}" if many else f"{section}.{key}" for key in keys_of(inner)}
    if name in RENAMED:
        return f" Here it is {RENAMED[name]!r}."
    if not at and difflib.get_close_matches(name, ("num_processes",), cutoff=0.8):
        return " Did you mean the option --num-processes of `rlx train`, `rlx run` and `rlx check`?"
    if name not in everywhere and (close := difflib.get_close_matches(name, keys_of(model), n=1, cutoff=0.7)):
        return f" Did you mean {dotted((*at, close[0]))!r}?"
    close = difflib.get_close_matches(name, everywhere, n=1, cutoff=0.8)
    return f" Did you mean {everywhere[close[0]]!r}?" if close else " docs/configuration.md lists every key."


def _without_refused(data: dict[str, Any], at: tuple[str, ...] = ()) -> dict[str, Any]:
    kept = {}
    for name, value in data.items():
        if ".".join((*at, str(_plain(name, at)))) in REFUSED:
            continue
        inner = keys_of(Config)[name].annotation if not at and name in keys_of(Config) else None
        if value is None and isinstance(inner, type) and issubclass(inner, BaseModel):
            continue
        if not at and isinstance(value, dict):
            value = _without_refused(value, (str(name),))
        elif not at and isinstance(value, list):
            value = [_without_refused(item, (str(name),)) if isinstance(item, dict) else item for item in value]
        kept[name] = value
    # A key written with no value means "the default", as in Axolotl; required keys stay missing.
    return {name: value for name, value in kept.items() if value is not None}


def _explain(source: Source, item: dict[str, Any]) -> str:
    key: KeyPath = tuple(
        part
        for part in item["loc"]
        if not (isinstance(part, str) and part.startswith(("literal[", "bool", "function-")))
    )
    flat, value, message = dotted(key), item.get("input"), item["msg"]
    where = source.where(key)
    if item["type"] == "missing":
        return f"{source.path}: the key {flat!r} is missing. {_meaning(key)}"
    if item["type"] == "value_error":
        return f"{where}: {flat + ': ' if flat else ''}{message.removeprefix('Value error, ')}."
    if flat == "rl" and value in METHODS_ELSEWHERE:
        return f"{where}: rl: rlx trains with grpo or gdpo, not {value}. Write `rl: grpo`."
    hint = VALUE_HINTS.get((flat, value)) if isinstance(value, str | int) else None
    if hint:
        return f"{where}: {flat}: {hint}"
    if item["type"] == "list_type" and isinstance(value, str | dict):
        message = f"Write a list: `{key[-1]}: [{value if isinstance(value, str) else '{...}'}]`, or each with a dash"
    return f"{where}: {flat}: {value!r} cannot be used. {message}. {_meaning(key)}"


def _meaning(key: KeyPath) -> str:
    model: type[BaseModel] | None = Config
    description = ""
    for part in key:
        if isinstance(part, int) or model is None:
            continue
        field = keys_of(model).get(part)
        if field is None:
            break
        description = field.description or ""
        model = _section_of(field.annotation)[0]
    return f"It is: {description}" if description else ""
