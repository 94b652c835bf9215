"""What is packaged, what the type checker sees, and what lies in the folders are the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("core", "rollout", "learner", "rewards", "envs", "cluster")


def name_of(folder: Path) -> str:
    parts = folder.relative_to(ROOT).parts
    return ".".join(["rlx", *(parts[1:] if parts[0] == "core" else parts)])


def test_every_package_is_listed_by_hand_in_pyproject():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {
        name_of(init.parent): str(init.parent.relative_to(ROOT))
        for f in FOLDERS
        for init in (ROOT / f).rglob("__init__.py")
    }
    assert set(listed["packages"]) == set(there)
    assert listed["package-dir"] == there


def test_the_type_checker_sees_every_module():
    linked = {p.name for p in (ROOT / "typings" / "rlx").iterdir() if not p.name.startswith("__pycache__")}
    core = {p.name for p in (ROOT / "core").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert linked == core | set(FOLDERS) - {"core"}
    assert all((ROOT / "typings" / "rlx" / name).exists() for name in linked)


@pytest.mark.parametrize("folder", ["core/config", "rollout", "envs", "cluster", "learner/incoming", "learner/watch"])
def test_a_large_folder_says_in_its_init_which_module_is_for_what(folder: str):
    index = set(re.findall(r"\w+", (ROOT / folder / "__init__.py").read_text().split('"""')[1]))
    modules = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
    assert {name for name in modules - index if not (folder == "rollout" and name.startswith("vllm_"))} == set()


def test_nothing_of_this_machine_is_in_the_pinned_requirements():
    lines = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins
    assert all(line.count("==") == 1 and "/" not in line and " " not in line for line in pins)
