"""Dotted names of the YAML to Python objects: one rule for rewards, transforms and rollout functions.

    rewards.my_reward           rewards.py next to the YAML
    tasks.math.grade.exact      tasks/math/grade.py next to the YAML, or an installed package
    rewards.Judge.score         nested attributes
    ../shared/rewards.py:exact  a file by its path, relative to the YAML

Next to the YAML wins. Such files are imported as `rlx.dotted.<folder>.module`: two YAML folders that both hold a
`rewards.py` stay apart, nothing is shadowed by a user's file called `datasets.py`, and `sys.path` is untouched. The
folder is in the module's name, so a spawned process that unpickles the user's objects finds them again. Inside
those files `import helpers` means the sibling `helpers.py`, unless `helpers` is in the standard library.
"""

from __future__ import annotations

import builtins
import difflib
import importlib
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from rlx.errors import UserCodeError

__path__: list[str] = []  # lets the import system look for `rlx.dotted.<folder>` here; the finder below answers

_STDLIB = os.path.dirname(os.__file__)
_MACHINERY = ("<frozen importlib", f"{_STDLIB}/importlib/", f"{_STDLIB}/asyncio/", __file__)
_MISSING = object()
_FORMATS_OF_AXOLOTL = (
    *("alpaca", "alpaca_chat", "bradley_terry", "chat_template", "chatml", "completion", "input_output", "llama3"),
    *("metharme", "oasst", "pygmalion", "sharegpt", "stepwise_supervised", "user_defined", "zephyr"),
)


def resolve(name: str, *, base_dir: Path, key: str, main: str | None = None) -> Callable[..., Any]:
    """The callable that `name`, the value of the configuration key `key`, stands for; the YAML is in `base_dir`.

    `main` is the attribute taken when the name is that of a module.
    """
    site = _Site(name, key, Path(os.path.abspath(base_dir)))
    prefix, parts = _split_file(site) if ":" in name or name.endswith(".py") else _split_dotted(site)
    target: Any = _walk(site, prefix, parts)
    if isinstance(target, ModuleType):
        if main is None or not hasattr(target, main):
            rule = f" without a function called {main!r}" if main else ""
            raise site.error(f"this is a module{rule}. Name a function in it{_example(name, target)}.")
        target = getattr(target, main)
    if not callable(target):
        what = "None" if target is None else f"a value of type {type(target).__name__}"
        raise site.error(f"this is {what}, not a function. Name a function there.")
    function: Callable[..., Any] = target
    return function


def user_traceback(error: BaseException, hide: Sequence[str] = ()) -> str:
    """The traceback of `error` as Python prints it, without the frames of rlx, asyncio and the import system.

    `hide` are more file names whose frames are the caller's, not the user's.
    """
    report = traceback.TracebackException.from_exception(error)
    parts: list[traceback.TracebackException | None] = [report]
    while parts:
        if (part := parts.pop()) is None:
            continue
        shown = [f for f in part.stack if not f.filename.startswith(_MACHINERY) and f.filename not in hide]
        part.stack = traceback.StackSummary.from_list(shown)
        parts += [part.__cause__, part.__context__, *(part.exceptions or ())]
    return "".join(report.format()).rstrip()


@dataclass(frozen=True)
class _Site:
    """Where a name was written: its text, configuration key and the folder of the YAML."""

    name: str
    key: str
    base: Path

    def error(self, message: str) -> UserCodeError:
        return UserCodeError(f"{self.key} ({self.name}): {message}")


# --- what the name says


def _split_file(site: _Site) -> tuple[str, list[str]]:
    path, _, attribute = site.name.partition(":")
    if not path.endswith(".py") or not all(p.isidentifier() for p in attribute.split(".")):
        raise site.error("this is not a name that can be loaded. Write `file.function` or `path/to/file.py:function`.")
    file = Path(os.path.abspath(site.base / path))
    if not file.is_file():
        raise site.error(f"there is no file {file}.{_did_you_mean(file.name, _names_in(file.parent, '.py'))}")
    if "." in file.stem:
        raise site.error(f"a file name with a dot before `.py` cannot be imported. Rename {file.name}.")
    inside = file.relative_to(site.base).with_suffix("").parts if file.is_relative_to(site.base) else ()
    if inside and all(p.isidentifier() for p in inside):
        return _package_of(site.base), [*inside, *attribute.split(".")]
    return _package_of(file.parent), [file.stem, *attribute.split(".")]


def _split_dotted(site: _Site) -> tuple[str, list[str]]:
    parts = site.name.split(".")
    if not all(part.isidentifier() for part in parts):
        raise site.error("this is not a dotted name. Write `file.function`, for example `rewards.my_reward`.")
    beside = any(_source(site.base, parts[:n]) for n in range(1, len(parts) + 1))
    return (_package_of(site.base) if beside else ""), parts


# --- from the name to the object


def _walk(site: _Site, prefix: str, parts: list[str]) -> Any:
    target: Any = _import(site, prefix + parts[0])
    if target is None:
        raise site.error(_not_found(site, parts))
    for depth, part in enumerate(parts[1:], start=1):
        path = prefix + ".".join(parts[: depth + 1])
        is_last = depth == len(parts) - 1
        child: Any = None if is_last else _submodule(site, target, path)
        if child is None:
            child = _attribute(site, target, part)
        if child is _MISSING or (is_last and isinstance(child, ModuleType)):
            child = _submodule(site, target, path) or child
        if child is _MISSING:
            raise site.error(_no_attribute(target, part, ".".join(parts[:depth])))
        target = child
    return target


def _submodule(site: _Site, parent: Any, path: str) -> ModuleType | None:
    return _import(site, path) if isinstance(parent, ModuleType) and hasattr(parent, "__path__") else None


def _import(site: _Site, path: str) -> ModuleType | None:
    """The module called `path`; None when there is none, an error when it is there and fails."""
    try:
        return importlib.import_module(path)
    except (Exception, SystemExit) as error:  # the user's module: anything may come out of it
        if isinstance(error, ModuleNotFoundError) and error.name == path:
            return None
        raise site.error(f"its import failed.\n{user_traceback(error)}{_dependency_hint(error)}") from error


def _attribute(site: _Site, parent: Any, part: str) -> Any:
    try:
        return getattr(parent, part, _MISSING)
    except (Exception, SystemExit) as error:  # the user's module: its `__getattr__` may do anything
        raise site.error(f"reading `{part}` failed.\n{user_traceback(error)}{_dependency_hint(error)}") from error


# --- modules next to the YAML


def _package_of(folder: Path) -> str:
    escaped = str(folder).replace("%", "%25").replace(".", "%2E")
    return f"{__name__}.<{escaped}>."


def _source(folder: Path, parts: Sequence[str]) -> Path | None:
    """The file of the module `parts` below `folder`; None for anything else, plain folders included."""
    location = folder.joinpath(*parts)
    for file in (location / "__init__.py", location.with_name(f"{location.name}.py")):
        if file.is_file():
            return file
    return None


class _BesideFinder:
    """Answers for `rlx.dotted.<folder>` and the modules below it."""

    @staticmethod
    def find_spec(fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not fullname.startswith(f"{__name__}.<"):
            return None
        escaped, *parts = fullname.removeprefix(f"{__name__}.").split(".")
        folder = Path(escaped[1:-1].replace("%2E", ".").replace("%25", "%"))
        location = folder.joinpath(*parts)
        if parts and (file := _source(folder, parts)):
            package = [str(location)] if file.name == "__init__.py" and file.parent == location else None
            loader = _BesideLoader(fullname, str(file), folder, parts)
            return spec_from_file_location(fullname, file, loader=loader, submodule_search_locations=package)
        if not location.is_dir():
            return None
        spec = ModuleSpec(fullname, None, is_package=True)
        spec.submodule_search_locations = [str(location)]
        return spec


class _BesideLoader(SourceFileLoader):
    """Runs a user's module with an `import` that sees the files of its folder."""

    def __init__(self, fullname: str, file: str, folder: Path, parts: Sequence[str]):
        super().__init__(fullname, file)
        self.folder, self.own_name = folder, ".".join(parts)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": self._import_from}
        super().exec_module(module)

    def _import_from(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        if level or not self._is_sibling(name.split("."), fromlist or ()):
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        package = _package_of(self.folder)
        module = importlib.import_module(package + name)
        if not fromlist:
            return sys.modules[package + name.partition(".")[0]]
        return builtins.__import__(module.__name__, globals, locals, fromlist)

    def _is_sibling(self, parts: list[str], fromlist: Sequence[str]) -> bool:
        if parts[0] in sys.stdlib_module_names or ".".join(parts) == self.own_name:
            return False
        wanted = [parts[:n] for n in range(1, len(parts) + 1)] + [[*parts, item] for item in fromlist if item != "*"]
        return any(_source(self.folder, path) for path in wanted)


sys.meta_path.insert(0, _BesideFinder)


# --- what to tell the user


def _not_found(site: _Site, parts: list[str]) -> str:
    module, function = parts[0], parts[-1]
    looked = f"Looked for {site.base / module}.py, for a package {site.base / module}, and for an installed module"
    text = f"no module called {module!r}. {looked}."
    if module in _FORMATS_OF_AXOLOTL and site.key.endswith(".type"):
        return (
            f"{module} is one of Axolotl's formats for supervised or preference data. GRPO needs a function of yours that makes "
            "a prompt of a row: write `type: file.function`, for a file next to the YAML; docs/rewards.md has one."
        )
    definition = re.compile(rf"^(?:async\s+)?def\s+{re.escape(function)}\b", re.MULTILINE)
    for file in sorted(site.base.glob("*.py")):
        if definition.search(file.read_text(encoding="utf-8", errors="replace")):
            return f"{text} {file.name} defines {function!r}: write `{file.stem}.{function}`."
    if site.base != Path.cwd() and _source(Path.cwd(), [module]):
        return f"{text} There is one in the current directory, which is not searched: move it next to the YAML."
    installed = {found.name for found in pkgutil.iter_modules()}
    return text + _did_you_mean(module, [*_names_in(site.base), *sorted(installed)])


def _no_attribute(parent: Any, part: str, path: str) -> str:
    where = f" ({parent.__file__})" if isinstance(parent, ModuleType) and getattr(parent, "__file__", None) else ""
    names = [n for n in dir(parent) if not n.startswith("_")]
    return f"{path}{where} has no attribute {part!r}.{_did_you_mean(part, names) or _offer(_functions(parent))}"


def _functions(parent: Any) -> list[str]:
    own = getattr(parent, "__name__", None)
    members = vars(parent).items() if hasattr(parent, "__dict__") else ()
    return [n for n, v in members if callable(v) and not n.startswith("_") and getattr(v, "__module__", None) == own]


def _example(name: str, module: ModuleType) -> str:
    return "".join(f", for example `{name}.{function}`" for function in _functions(module)[:1])


def _offer(names: list[str]) -> str:
    return f" It has: {', '.join(names[:8])}." if names else ""


def _names_in(folder: Path, suffix: str = "") -> list[str]:
    return sorted(f"{f.stem}{suffix}" for f in folder.glob("*.py")) if folder.is_dir() else []


def _did_you_mean(word: str, candidates: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(candidates), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _dependency_hint(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"\nInstall {error.name.partition('.')[0]!r} where rlx runs, or remove that import."
    return ""
