"""Engines, reward functions and a configuration for the tests of `cluster/`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray

from rlx.config import Config, load_config
from rlx.errors import ModelError, ServiceError
from rlx.processes import descendants, end_processes
from rlx.rollout.engine import Engine
from rlx.rollout.fake_engine import FakeEngine
from rlx.wire import Completion, Sampling

T = TypeVar("T")
PATIENCE_S = 300.0
"""For what takes a moment on an idle machine."""

REWARDS = """
import asyncio, ctypes, os, signal, subprocess, threading, time
from pathlib import Path

def length(completions, **kwargs):
    return [float(len(text)) for text in completions]

def in_main_thread(completions, log_metric, **kwargs):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    log_metric("pid", os.getpid())
    return [float(threading.current_thread() is threading.main_thread())] * len(completions)

def hangs_on_odd_steps(completions, trainer_state, **kwargs):
    time.sleep(1000 * (trainer_state.global_step % 2))
    return [1.0] * len(completions)

def ends_its_process(completions, **kwargs):
    os._exit(7)

def raises(completions, **kwargs):
    return [1 / 0]

def wants_gold(completions, gold):
    return [1.0] * len(completions)

def only_lengths(completions, log_extra, log_metric, moves=None, **kwargs):
    # As many values as it was given completions: a number, None, or not a number.
    log_extra("seen", completions)
    log_metric("given", len(completions))
    return [{"none": None, "nan": float("nan")}.get(text, float(len(text))) for text in completions]

def meets(completions, trainer_state, **kwargs):
    # Comes back when as many calls as the completion says are inside, each in a process of its own.
    here = Path(__file__).parent
    (here / f"met-{trainer_state.global_step}").touch()
    while len(list(here.glob("met-*"))) < int(completions[0]):
        time.sleep(0.01)
    return [float(os.getpid() % 2**20)] * len(completions)

def notes(completions, trainer_state, **kwargs):
    # Ends when there is a file `goes-on`.
    here = Path(__file__).parent
    with (here / "notes").open("a") as notes:
        notes.write(f"begins {trainer_state.global_step}\\n")
        notes.flush()
        while not (here / "goes-on").exists():
            time.sleep(0.01)
        notes.write(f"ends {trainer_state.global_step}\\n")
    return [1.0] * len(completions)

inside, peak = 0, 0

async def side_by_side(completions, log_metric, **kwargs):
    global inside, peak
    # "meets" comes back when four calls have been inside together.
    inside += 1
    peak = max(peak, inside)
    if completions[0] == "blocks":
        time.sleep(1000)
    if completions[0] == "waits":
        await asyncio.sleep(1000)
    while completions[0] == "meets" and peak < 4:
        await asyncio.sleep(0.01)
    inside -= 1
    log_metric("peak", peak)
    return [1.0] * len(completions)

def _sleeper(**options):
    return subprocess.Popen(["sleep", "1000"], **options).pid

def misbehaves(completions, log_metric, **kwargs):
    # Does what the completion says.
    what = completions[0]
    pid = os.getpid()
    if what == "fork":
        os.fork()
    elif what == "leaves children":
        log_metric("child", _sleeper())
        log_metric("detached", _sleeper(start_new_session=True))
    elif what == "leaves children and exits":
        (Path(__file__).parent / "child").write_text(str(_sleeper()))
        os._exit(7)
    elif what == "alarm":
        signal.signal(signal.SIGALRM, lambda *_: os._exit(8))
        signal.alarm(2)
    elif what == "outlives an alarm":
        time.sleep(2.2)
    elif what == "dies of an alarm":
        signal.alarm(1)
        time.sleep(1000)
    elif what == "blocks in C":
        ctypes.PyDLL(None).sleep(1000)
    elif what == "10 GB":
        bytearray(10 * 2**30)
    elif what == "100 MB":
        for _ in range(88):
            print("x" * 2**20)
        size = -1
        while os.fstat(1).st_size != size:  # what is written at the moment at which the log is shortened may get lost
            size = os.fstat(1).st_size + 12 * (2**20 + 1) + len("from a child\\n")
            for _ in range(12):
                print("x" * 2**20, flush=True)
            os.system("echo from a child")
    elif what == "prints without end":
        while True:
            print("x" * 2**20)
            time.sleep(0.01)
    log_metric("pid", os.getpid())
    log_metric("is default", signal.getsignal(signal.SIGALRM) is signal.SIG_DFL)
    return [float(pid == os.getpid())] * len(completions)
"""


def patiently(start: Callable[[], T]) -> T:
    """`start` a node of Ray, which must be up 30 s later; where a busy machine is slower, once more."""
    before = descendants(os.getpid())
    try:
        return start()
    except Exception:  # a bare one: the node timed out
        end_processes({pid: since for pid, since in descendants(os.getpid()).items() if pid not in before}, 0.0)
    return start()


async def no_cpu_is_free() -> None:
    """Until Ray's head knows it: it hears of what its nodes have given away a moment later."""
    async with asyncio.timeout(PATIENCE_S):
        while ray.available_resources().get("CPU"):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def seen_by_watchdog(ward: int) -> None:
    """Wait until the watchdog over process `ward` has looked once more at what runs below it.

    It waits after each look, which the kernel counts; before the first look it opens the descriptor of its ward."""
    end = time.monotonic() + PATIENCE_S
    wanted = f"rlx.cluster.watchdog\0{ward}\0".encode()
    first: int | None = None
    while time.monotonic() < end:
        for pid in descendants(ward):
            with contextlib.suppress(OSError):  # it ended meanwhile
                if not Path(f"/proc/{pid}/cmdline").read_bytes().endswith(wanted):
                    continue
                if any("[pidfd]" in os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()):
                    status = Path(f"/proc/{pid}/status").read_text()
                    waits = int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])
                    first = waits if first is None else first
                    if waits >= first + 3:
                        return
        time.sleep(0.05)
    raise AssertionError(f"no watchdog looks after process {ward}")


def write_config(folder: Path, text: str = "", rewards: str = "reward_functions.length", **vllm: Any) -> Config:
    """A configuration in `folder`, with the functions of REWARDS next to it."""
    (folder / "reward_functions.py").write_text(REWARDS)
    lines = [
        "base_model: fake",
        "rl: grpo",
        f"output_dir: {folder / 'out'}",
        "datasets: [{path: none}]",
        f"trl: {{reward_funcs: [{rewards}], max_prompt_length: 16, max_completion_length: 16}}",
        "vllm: {" + ", ".join(f"{key}: {value}" for key, value in vllm.items()) + "}",
        text,
    ]
    path = folder / "config.yaml"
    path.write_text("\n".join(lines))
    return load_config(path)


def fake_engine(config: Config, index: int) -> Engine:
    return TestEngine(seed=index, seconds_per_token=0.001)


def steady_engine(config: Config, index: int) -> Engine:
    """50 tokens a second, every completion as long as it may be; what is sampled depends on the request alone."""
    return TestEngine(seconds_per_token=0.02, deterministic=True, length_of=lambda request_id, index: 10**9)


def broken_engine(config: Config, index: int) -> Engine:
    engine = FakeEngine()
    engine.fail_next = ModelError("no model here")
    return engine


class TestEngine(FakeEngine):
    """The fake, with switches in the route of `openai`."""

    __test__ = False

    async def generate(self, request_id: str, prompt_ids: np.ndarray, n: int, sampling: Sampling) -> list[Completion]:
        if request_id == "refuse":
            raise ServiceError("refused: too long")
        if request_id == "bug":
            raise KeyError("a bug")
        return await super().generate(request_id, prompt_ids, n, sampling)

    async def openai(self, route: str, body: dict[str, Any]) -> dict[str, Any] | AsyncIterator[str]:
        if route == "die":
            os._exit(9)
        if route == "child":
            return {"pid": _sleeper()}
        if route == "in_flight":
            return {"in_flight": self.in_flight}
        if route == "endless":
            return _endless()
        return await super().openai(route, body)


def _sleeper() -> int:
    return subprocess.Popen(["sleep", "1000"], start_new_session=True).pid


async def _endless() -> AsyncIterator[str]:
    while True:
        yield "data: more\n\n"
        await asyncio.sleep(0.01)
