"""The command line answers at once and imports nothing heavy before the configuration is validated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlx.cli import app
from rlx.cluster import workers

HEAVY = ("torch", "vllm", "ray", "transformers", "datasets", "fastapi")
YAML = "base_model: some/model\nrl: grpo\ndatasets:\n  - path: some/data\n"


def rlx(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlx.cli", *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def imported_by(*arguments: str) -> set[str]:
    code = (
        "import sys\n"
        "from rlx.cli import main\n"
        f"try: main({list(arguments)!r})\n"
        "except SystemExit: pass\n"
        f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    return {name for name in HEAVY if f"'{name}'" in result.stdout.split("LOADED ")[1]}


def test_version_and_help_answer():
    assert rlx("--version").stdout.startswith("rlx 0.")
    help_text = rlx("--help").stdout
    assert all(command in help_text for command in ("check", "vllm-serve", "train", "run"))


@pytest.mark.parametrize("command", ["check", "vllm-serve", "train", "run", "dashboard"])
def test_every_command_has_help_that_names_the_overrides(command):
    result = rlx(command, "--help")
    assert result.returncode == 0
    assert "--trl.beta" in result.stdout


def test_help_and_a_config_error_load_nothing_heavy(tmp_path: Path):
    (tmp_path / "bad.yaml").write_text(YAML + "trl:\n  bta: 1\n")
    assert imported_by("--help") == set()
    for command in ("check", "vllm-serve", "train", "run"):
        assert imported_by(command, str(tmp_path / "bad.yaml")) == set()
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "prompt": "2+2="}\n')
    assert imported_by("samples", str(tmp_path)) == set()


def test_a_config_error_is_one_message_and_exit_code_two(tmp_path: Path):
    (tmp_path / "bad.yaml").write_text(YAML + "trl:\n  bta: 1\n")
    for command in ("check", "vllm-serve", "train", "run"):
        result = rlx(command, str(tmp_path / "bad.yaml"))
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr == (
            f"error: {tmp_path}/bad.yaml, line 6: unknown key 'trl.bta'. Did you mean 'trl.beta'?\n"
        )


def test_a_missing_file_is_one_message():
    result = rlx("train", "no/such.yaml")
    assert result.returncode == 2
    assert "no such file" in result.stderr
    assert "Traceback" not in result.stderr


def test_axolotl_options_of_vllm_serve_reach_the_vllm_section(tmp_path: Path):
    (tmp_path / "run.yaml").write_text(YAML)
    result = rlx("vllm-serve", str(tmp_path / "run.yaml"), "--port", "0")
    assert result.returncode == 2
    assert "command line, --vllm.port: vllm.port: 0 cannot be used" in result.stderr


@pytest.mark.parametrize("order", [("w-7", "--vllm.port", "9"), ("--vllm.port", "9", "w-7"), ("--vllm.port=9", "w-7")])
def test_a_worker_is_named_before_or_after_the_overrides(monkeypatch, tmp_path: Path, order: tuple[str, ...]):
    (tmp_path / "run.yaml").write_text(YAML)
    asked = []

    def remove_main(config, name):
        asked.append((config.vllm.port, name))
        return 0

    monkeypatch.setattr(workers, "remove_main", remove_main)
    result = CliRunner().invoke(app, ["workers", "remove", str(tmp_path / "run.yaml"), *order])
    assert (result.exit_code, asked) == (0, [(9, "w-7")]), result.output


def test_samples_answers_with_what_was_written_or_one_message(tmp_path: Path):
    (tmp_path / "samples.jsonl").write_text('{"step": 7, "prompt": "2+2=", "completion": "4", "rewards": {"a": 1}}\n')
    result = rlx("samples", str(tmp_path), "--step", "5:9", "--best", "3", "--by", "a", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith('{"step": 7')
    for arguments, code in ((("--step", "x"), 2), (("--status", "fine"), 2), (("--group", "none"), 1)):
        result = rlx("samples", str(tmp_path), *arguments)
        assert (result.returncode, result.stdout) == (code, "")
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
