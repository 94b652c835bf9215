"""`rlx` commands as real processes, project folders for them, and the comparison of log-probabilities."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM

from rlx.processes import free_port
from rlx.rollout.client import RolloutClient

TOKEN = "token-of-the-tests"
TOLERANCE = 0.05
"""Largest difference of a log-probability between a synced worker and the learner's model, both in bfloat16."""
SERVICE_START_S, LEARNER_START_S, END_S = 600, 300, 300
"""By then it has hung"""
_FIRST_PORT = 18300


class Rlx:
    """A running `rlx` command in a session of its own, in `folder`; `output` is what it wrote to stdout and stderr."""

    def __init__(self, folder: Path, *arguments: str | Path, **environment: str):
        self.folder = folder
        self._mark = f"RLX_E2E={uuid.uuid4().hex}"
        self._path = folder / f"terminal-{uuid.uuid4().hex[:6]}.txt"
        name, value = self._mark.split("=")
        with self._path.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", "rlx.cli", *map(str, arguments)],
                cwd=folder, stdout=output, stderr=output, start_new_session=True,
                env={**os.environ, "RLX_TOKEN": TOKEN, "CUDA_VISIBLE_DEVICES": "", **environment, name: value},
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self._path.read_text(errors="replace")

    @property
    def last_message(self) -> str:
        """From the last `error:` to the end."""
        return self.output[self.output.rindex("error: ") :].rstrip()

    def wait(self, within_s: float) -> int:
        """The exit status. Raises AssertionError with the output when it does not end in time."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {within_s:g} s:\n{self.output}") from None

    def wait_for(self, text: str, within_s: float) -> None:
        """Until a line with `text` was printed."""
        deadline = time.monotonic() + within_s
        while True:
            has_ended = self.process.poll() is not None
            if text in self.output:
                return
            assert not has_ended, f"ended with {self.process.returncode} before {text!r}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {text!r} within {within_s:g} s:\n{self.output}"
            time.sleep(0.1)

    def ctrl_c(self) -> None:
        """What a terminal does: the signal goes to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def processes(self) -> dict[int, str]:
        """Command lines of everything that this command started and that still runs, itself included: all inherit
        the mark in their environment, whoever their parent is."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if self._mark.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    def left(self, within_s: float = END_S) -> list[str]:
        """What still runs after `within_s` seconds."""
        deadline = time.monotonic() + within_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return list(left.values())

    def close(self) -> None:
        """Kill what is left."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(END_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@contextmanager
def rlx(folder: Path, *arguments: str | Path, **environment: str) -> Iterator[Rlx]:
    command = Rlx(folder, *arguments, **environment)
    try:
        yield command
    finally:
        command.close()


@contextmanager
def serving(config: Path, *arguments: str | Path) -> Iterator[Rlx]:
    """`rlx vllm-serve`, ready."""
    with rlx(config.parent, "vllm-serve", config, *arguments) as service:
        service.wait_for("ready: ", SERVICE_START_S)
        yield service


def write_config(path: Path, **keys: Any) -> Path:
    """The YAML at `path`: a small GRPO run on its own port, with `keys` laid over; nested mappings are merged."""
    base: dict[str, Any] = {
        "rl": "grpo",
        "output_dir": str(path.parent / "out"),
        "trl": {
            "num_generations": 4,
            "max_prompt_length": 64,
            "max_completion_length": 16,
            "vllm_server_timeout": SERVICE_START_S,
        },
        "vllm": {"port": free_port("127.0.0.1", _FIRST_PORT), "cpu_kv_cache_gib": 0.25},
        "cluster": {"dashboard": False, "object_store_mib": 80},
        "micro_batch_size": 8,
        "lr_scheduler": "constant",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(_merged(base, keys)))
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def url_of(config: Path) -> str:
    return f"http://127.0.0.1:{yaml.safe_load(config.read_text())['vllm']['port']}"


def client_of(config: Path) -> RolloutClient:
    return RolloutClient(url_of(config), TOKEN)


Sequence = tuple[list[int], list[int]]
"""Token ids of a prompt and of its completion."""


def difference(client: RolloutClient, model: Path, sequences: list[Sequence], least_logprob: float = -1e9) -> float:
    """max |log p(worker) − log p(transformers)| over the completions' tokens, all workers. Tokens that the worker finds
    less likely than `least_logprob` do not count: bfloat16 rounds the large negative logits of a sharp policy coarsely."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    largest = 0.0
    for prompt, completion in sequences:
        ids_T = torch.tensor(prompt + completion)
        with torch.no_grad():
            logprobs_TV = network(ids_T[None]).logits[0, :-1].float().log_softmax(-1)
        expected_T = logprobs_TV.gather(-1, ids_T[1:, None])[-len(completion) :, 0].numpy()
        for reported_T in client.prompt_logprobs(ids_T.numpy()).values():
            reported_T = reported_T[-len(completion) :]
            gaps_T = np.abs(reported_T - expected_T)[reported_T > least_logprob]
            largest = max(largest, float(gaps_T.max(initial=0.0)))
    return largest


def steps_shown(output: str) -> list[int]:
    """The optimizer steps of the progress lines."""
    return [int(number) for number in re.findall(r"^step (\d+)/", output, re.MULTILINE)]


def evaluations_shown(output: str, reward: str) -> list[float]:
    """What the lines of the evaluations say of one reward function."""
    return [float(v) for v in re.findall(rf"^evaluation after step .*\b{reward} (-?[\d.]+)", output, re.MULTILINE)]


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(base[key], over[key]) for key in base.keys() & over.keys() if isinstance(base[key], dict)}
    return {**base, **over, **both}
