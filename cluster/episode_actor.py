"""The Ray actor that runs rollout functions, `rlx-episodes-0` and so on: the user's coroutines in a thread of their own.

The actor's own event loop stays free: it watches the user's, and says who blocks it. Where it cannot run either, as a
call in C keeps the interpreter's lock, the process ends itself. `ray_episodes.RayEpisodes` is its other end.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from rlx.cluster.calls import call
from rlx.cluster.packed import ask, unpack
from rlx.config import Config
from rlx.envs.threads import Executor
from rlx.episode import Episode
from rlx.errors import ServiceError
from rlx.processes import shorten, write_output_to
from rlx.wire import Completion, GroupRequest, Sampling

_BEAT_S = 0.25
_STALLS_TO_THE_END = 2
"""So many times `episodes.stall_timeout` without any Python, and the process ends."""
_THREADS = 256
"""For `asyncio.to_thread` of all episodes; Python's own choice, 6 on two cores, would let agents wait for each other."""


class Stalled(ServiceError):
    """A rollout function blocks the process. `group` begins with `KEY:`, the key of the group that it belongs to, or is
    something else."""

    def __init__(self, message: str, group: str = ""):
        Exception.__init__(self, message, group)  # both, so that it can be pickled
        self.group = group

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Loaded:
    """`own_reward`: whether the episodes may bring a reward of their own."""

    pid: int
    own_reward: bool


class EpisodeActor:
    """Runs many groups at once."""

    _label = "rlx-episodes"  # for Ray's messages about an actor that could not be made

    def __init__(self, label: str, log: str):
        self._label = label
        self._log = Path(log)
        write_output_to(self._log)
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(Executor(_THREADS, thread_name_prefix="to_thread"))
        self._thread = threading.Thread(target=self._turn, name="episodes", daemon=True)
        self._beat = time.monotonic()
        self._stall_s = 0.0
        self._parts: Any = None
        self._alive: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return self._label

    async def load(self, config: Config, urls: Mapping[str, str]) -> Loaded:
        """Import the user's function, the tokenizer and the environments; `urls` are those of servers started here."""
        from rlx.envs.setup import set_up

        self._stall_s = config.episodes.stall_timeout
        self._thread.start()
        self._parts = await self._in_thread(set_up(config, urls))
        asyncio.run_coroutine_threadsafe(self._keep_beating(), self._loop)
        self._alive = asyncio.create_task(self._keep_alive())
        return Loaded(os.getpid(), self._parts.own_reward)

    async def run(self, worker: Any, name: str, request: GroupRequest) -> list[Episode]:
        """The episodes of a group, sampled by the rollout actor `worker` called `name`. Raises Stalled."""

        async def sample(request_id: str, prompt_ids: np.ndarray, sampling: Sampling) -> Completion:
            asked = ask(worker, request_id, prompt_ids, 1, sampling)
            [completion] = unpack(await call(asked, f"worker {name}"))
            return completion

        running = asyncio.ensure_future(self._in_thread(self._parts.runner.run(sample, request)))
        watch = asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait([running, watch], return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                watch.result()
            return await running
        finally:
            running.cancel()
            watch.cancel()

    async def stuck(self) -> list[str]:
        """Names of threads that go on although their episode is over."""
        from rlx.envs.threads import stuck_threads

        return stuck_threads()

    async def close(self) -> None:
        """Close the environments' sessions."""
        if self._parts is not None:
            await self._in_thread(self._parts.close())

    async def _in_thread(self, coroutine: Any) -> Any:
        """Run `coroutine` in the loop of the user's functions; a cancellation reaches it there."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def _turn(self) -> None:
        """Run the loop of the user's functions, also after a task of theirs raised what ends a program."""
        while True:
            try:
                self._loop.run_forever()
            except (SystemExit, KeyboardInterrupt):
                traceback.print_exc()

    async def _keep_beating(self) -> None:
        while True:
            self._beat = time.monotonic()
            await asyncio.sleep(_BEAT_S)

    async def _keep_alive(self) -> None:
        """While this runs the process lives. Otherwise a thread that needs no lock writes to the log where each thread
        is, and ends the process. Of what is printed the end is kept."""
        while True:
            shorten(self._log)
            faulthandler.dump_traceback_later(_STALLS_TO_THE_END * self._stall_s, exit=True, file=2)
            await asyncio.sleep(_BEAT_S)

    async def _watch(self) -> None:
        """Raises Stalled when the user's loop has not turned for `episodes.stall_timeout` seconds, in which this one did:
        a machine that stands still stops both."""
        beat, looks = self._beat, 0
        while looks * _BEAT_S < self._stall_s:
            await asyncio.sleep(_BEAT_S)
            looks = looks + 1 if self._beat == beat else 0
            beat = self._beat
        silent = time.monotonic() - beat
        task = asyncio.current_task(self._loop)
        frame = sys._current_frames()[self._thread.ident or 0]
        raise Stalled(
            f"a rollout function blocked its process for {silent:.0f} s {_place_of(frame)}. Put an awaitable call "
            "there, or `await asyncio.to_thread(...)`.",
            task.get_name() if task else "",
        )


def _place_of(frame: FrameType | None) -> str:
    """The innermost line of the user's code that `frame` stands in."""
    library = sysconfig.get_paths()["stdlib"]
    inner = frame
    while frame is not None:
        module, file = frame.f_globals.get("__name__", ""), frame.f_code.co_filename
        users = module.startswith("rlx.dotted.") or not module.startswith("rlx.")
        if users and not file.startswith((library, "<")):
            return f"at {file}:{frame.f_lineno}, in {frame.f_code.co_name}"
        frame = frame.f_back
    return f"in {inner.f_code.co_qualname}" if inner is not None else ""
