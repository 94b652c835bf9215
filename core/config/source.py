"""A YAML file as plain data, with the line of every key, and command-line overrides laid over it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlx.errors import ConfigError

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Source:
    """`data` is the parsed document; `lines` maps a key path such as ("trl", "beta") to its line, counted from 1."""

    path: Path
    data: dict[str, Any]
    lines: dict[KeyPath, int]
    overrides: dict[KeyPath, str]

    def where(self, key: KeyPath) -> str:
        """Where the user wrote `key`: an override as typed, else file and line of the key or of its nearest parent."""
        if key in self.overrides:
            return f"command line, {self.overrides[key]}"
        for size in range(len(key), 0, -1):
            if key[:size] in self.lines:
                return f"{self.path}, line {self.lines[key[:size]]}"
        return str(self.path)


def read_source(path: Path, overrides: dict[KeyPath, tuple[str, Any]]) -> Source:
    """Parse `path` and apply `overrides`, `{key path: (as typed, value)}`. Raises ConfigError."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder. Give the YAML file itself, for example {path / 'config.yaml'}.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file.{_siblings(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    lines: dict[KeyPath, int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = {} if node is None else _construct(node, (), lines, path)
    except yaml.YAMLError as error:
        raise ConfigError(_syntax(path, text, error)) from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a mapping of keys to values is expected at the top, found a {type(data).__name__}.")
    typed: dict[KeyPath, str] = {}
    for key, (as_typed, value) in overrides.items():
        _put(data, key, value, as_typed)
        typed[key] = as_typed
    return Source(path, data, lines, typed)


def _syntax(path: Path, text: str, error: yaml.YAMLError) -> str:
    """Where the YAML breaks, with the line itself, and what it usually is."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    if mark is None or not isinstance(error, yaml.MarkedYAMLError):
        return f"{path} is not valid YAML: {' '.join(str(error).split())}"
    lines = text.split("\n")
    line = lines[min(mark.line, len(lines) - 1)]
    hint = ""
    if line[: mark.column + 1].strip() == "" and "\t" in line[: mark.column + 1]:
        hint = " Indent with spaces, not with tabs."
    elif error.problem == "mapping values are not allowed here":
        hint = " Is this line, or the one before it, indented otherwise than the keys beside it, or does a value hold `: ` without quotes?"
    elif error.problem and error.problem.startswith("expected <block end>"):
        hint = " Indent this line as far as the keys or dashes beside it."
    shown = f"{line.rstrip()}\n    {' ' * mark.column}^" if line.strip() else "(the end of the file)"
    return f"{path}, line {mark.line + 1}: this is not valid YAML: {error.problem}.{hint}\n    {shown}"


def _construct(node: yaml.Node, at: KeyPath, lines: dict[KeyPath, int], path: Path) -> Any:
    if isinstance(node, yaml.MappingNode):
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = yaml.SafeLoader("").construct_object(key_node)
            here = (*at, key)
            line = key_node.start_mark.line + 1
            if key in result:
                raise ConfigError(
                    f"{path}, line {line}: the key {dotted(here)!r} is written twice (first in line {lines[here]}). "
                    "Keep one of them."
                )
            lines[here] = line
            result[key] = _construct(value_node, here, lines, path)
        return result
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, child in enumerate(node.value):
            lines[(*at, index)] = child.start_mark.line + 1
            items.append(_construct(child, (*at, index), lines, path))
        return items
    return _number(yaml.SafeLoader("").construct_object(node), node)


def _number(value: Any, node: yaml.Node) -> Any:
    """YAML 1.1 reads `1e-5` as a string; every user means the number."""
    if isinstance(value, str) and isinstance(node, yaml.ScalarNode) and node.style is None:
        try:
            return float(value) if "e" in value.lower() and value.lower() not in ("inf", "nan") else value
        except ValueError:
            return value
    return value


def _put(data: dict[str, Any], key: KeyPath, value: Any, as_typed: str) -> None:
    at: Any = data
    for depth, part in enumerate(key[:-1]):
        if at.get(part) is None:
            at[part] = {}
        at = at[part]
        if not isinstance(at, dict):
            raise ConfigError(f"command line, {as_typed}: {dotted(key[: depth + 1])!r} holds no keys below it.")
    at[key[-1]] = value


def dotted(key: KeyPath) -> str:
    """("datasets", 0, "path") → `datasets[0].path`."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text


def _siblings(path: Path) -> str:
    if not path.parent.is_dir():
        return f" Nor is there a folder {path.parent}."
    found = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml"))
    return f" In {path.parent} there is: {', '.join(found[:8])}." if found else f" {path.parent} holds no YAML file."
