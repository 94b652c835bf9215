"""The rollout service, without HTTP and without Ray.

    GroupRequest ─► GroupStore (one task per key) ─► router: a worker ─► episodes
         GroupResult ◄───────────────────────── scorer: rewards ◄────────────┘

Everything runs in one event loop. A group outlives the caller that submitted it, and the worker that generated it: it
is generated anew on another one. Every wait has a deadline that names who was waited for. `start` → rollouts, weight
updates, workers that join and leave → `drain`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from rlx.config.sections import AsyncSection, ServiceSection
from rlx.errors import RequestRefused, RequestTooLong, RlxError, ServiceError, ServiceUnavailable, WireError
from rlx.rollout.deadline import deadline
from rlx.rollout.fleet import Fleet, Member
from rlx.rollout.group_runner import EPISODES, REWARDS, Episodes, GroupRunner, Scorer
from rlx.rollout.groups import GroupStore, check_request, check_session
from rlx.rollout.observations import Observations
from rlx.rollout.router import Router
from rlx.rollout.single_calls import SingleCalls
from rlx.rollout.statistics import GroupStatistics
from rlx.rollout.supervisor import Supervisor
from rlx.rollout.weight_updates import WeightUpdates
from rlx.rollout.weights_store import remove_leftovers
from rlx.rollout.worker import Worker, WorkerStatus
from rlx.view.live import LiveRun
from rlx.wire import GroupRequest, GroupResult

KEPT_GROUPS, KEPT_BYTES = 4096, 2**30
CLOSE_TIMEOUT_S = 20.0
MAX_NEW_WORKERS = 64
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadProgress:
    """`ready` of `total` parts (the workers and the rewards) are up; `waiting_for` names the others."""

    ready: int
    total: int
    waiting_for: tuple[str, ...]
    seconds: float


class RolloutService:
    """`max_model_len`: tokens of the workers' context, when it is known. `make_worker` gives one more worker, with a
    name of its own, for `add_workers`."""

    def __init__(
        self,
        workers: list[Worker],
        scorer: Scorer,
        episodes: Episodes,
        settings: ServiceSection,
        async_settings: AsyncSection | None = None,
        *,
        model: str,
        start_timeout_s: float,
        max_model_len: int | None = None,
        make_worker: Callable[[], Worker] | None = None,
    ):
        self.model = model
        self.instance = uuid.uuid4().hex
        """Of this process: another one knows nothing of what was sent here."""
        self.fleet = Fleet(workers, settings)
        self.weights = WeightUpdates(self.fleet, settings, async_settings)
        self.supervisor = Supervisor(self.fleet, self.weights, settings, start_timeout_s)
        self.router = Router(self.fleet)
        self._group_deadline_s = settings.group_timeout * (async_settings.steps_in_flight if async_settings else 1)
        self._runner = GroupRunner(episodes, scorer, self._group_deadline_s, self.fleet.describe)
        self._single = SingleCalls(self.fleet, self.router, settings.group_timeout)
        self._max_model_len, self._make_worker = max_model_len, make_worker
        self._leaving: set[asyncio.Task[None]] = set()
        self._scorer, self._episodes, self._settings = scorer, episodes, settings
        self.groups = GroupStore(KEPT_GROUPS, KEPT_BYTES)
        page = LiveRun(base_model=model, workers=lambda: [asdict(status) for status in self.workers()])
        self.observations = Observations(self.fleet.events, page)
        self._state, self._cause = "loading", ""
        self._born, self._start_timeout_s = time.monotonic(), start_timeout_s
        self._parts: dict[str, Callable[[], Awaitable[None]]] = {
            m.name: partial(self.supervisor.bring_up, m) for m in self.fleet.members
        }
        self._parts[REWARDS] = scorer.start
        if episodes.own_reward:  # plain replies have nothing to start
            self._parts[EPISODES] = episodes.start
        self._session: str | None = None
        self._up: set[str] = set()

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self, progress: Callable[[LoadProgress], None] = lambda _: None) -> None:
        """Start workers and scorer together; the first error stops the others and names its worker. What
        `service.max_workers` allows beyond them joins later, one by one, as there are devices."""
        remove_leftovers()
        tasks = [asyncio.create_task(self._start_part(name, start(), progress)) for name, start in self._parts.items()]
        seconds = self._start_timeout_s
        try:
            async with deadline(
                seconds,
                lambda: (
                    f"{', '.join(self.load_progress().waiting_for)} did not start within "
                    f"vllm.start_timeout = {seconds:g} s"
                ),
            ):
                for done in asyncio.as_completed(tasks):
                    await done
        except RlxError as error:
            self._state, self._cause = "failed", str(error)
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self.supervisor.start()
        self._state = "serving"
        if (more := (self._settings.max_workers or 0) - len(self.fleet.members)) > 0:
            self._admit(more)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new rollouts, give the running ones `timeout_s` seconds, cancel what is left, close every part."""
        if self._state != "failed":
            self._state = "stopping"
        if running := self.groups.running():
            await asyncio.wait(running, timeout=timeout_s)
        leftovers: list[asyncio.Task[Any]] = [*self.groups.running(), *self._leaving]
        for task in leftovers:
            task.cancel()
        await asyncio.gather(*leftovers, return_exceptions=True)
        await self.router.close()
        await self.supervisor.close()
        self.weights.close()
        closes = [(m.name, m.worker.close()) for m in self.fleet.members]
        closes += [(EPISODES, self._episodes.close()), (REWARDS, self._scorer.close())]
        await asyncio.gather(*(self._close_part(name, close) for name, close in closes))

    async def _start_part(self, name: str, start: Awaitable[None], progress: Callable[[LoadProgress], None]) -> None:
        try:
            await start
        except RlxError as error:
            if name in str(error) or name in (REWARDS, EPISODES):
                raise
            raise type(error)(f"worker {name}: {error}") from error
        self._up.add(name)
        progress(self.load_progress())

    async def _close_part(self, name: str, close: Awaitable[None]) -> None:
        """Closing goes on with the others when one fails; what failed is logged."""
        try:
            async with deadline(CLOSE_TIMEOUT_S, lambda: f"{name} did not close within {CLOSE_TIMEOUT_S:g} s"):
                await close
        except RlxError as error:
            _log.warning("while closing %s: %s", name, error)

    def load_progress(self) -> LoadProgress:
        waiting = tuple(name for name in self._parts if name not in self._up)
        return LoadProgress(len(self._up), len(self._parts), waiting, round(time.monotonic() - self._born, 1))

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether some worker generated a token lately and has the newest weights; and the same for people.
        `status`: ok, degraded (some workers work, not all that have joined), loading, down, unverified (down until a
        learner brings weights that pass the gate), stopping or failed; `cause` says why."""
        status, cause = self._state, self._cause
        if self._state == "serving":
            joined = [m for m in self.fleet.members if m.state != "loading"]
            idle = [m for m in joined if m not in self.fleet.ready()]
            silent = [f"{m.name} generated no token for {m.token_age_s():.0f} s" for m in self.fleet.silent()]
            works = [m for m in self.fleet.ready() if m not in self.fleet.silent()]
            out = "unverified" if any(m.kept for m in self.fleet.members) else "down"
            status = "ok" if works and len(works) == len(joined) else "degraded" if works else out
            cause = "; ".join(([self.fleet.describe()] if idle else []) + silent)
        body = {
            "status": status,
            "cause": cause,
            "instance": self.instance,
            "weight_version": self.fleet.weight_version,
            "workers": [asdict(status) for status in self.workers()],
        }
        if self._state == "loading":
            body["progress"] = asdict(self.load_progress())
        return status in ("ok", "degraded"), body

    @property
    def is_stopping(self) -> bool:
        """Whether it waits for the running groups only."""
        return self._state == "stopping"

    def check_serving(self) -> None:
        """Raise ServiceUnavailable unless the service takes requests."""
        if self._state == "loading":
            progress = self.load_progress()
            raise ServiceUnavailable(f"the service is loading and waits for {', '.join(progress.waiting_for)}")
        if self._state == "failed":
            raise ServiceUnavailable(f"the service did not start: {self._cause}")
        if self._state == "stopping":
            raise ServiceUnavailable("the service is stopping")

    # --- the learner's session -----------------------------------------------------------------------------------

    def begin_session(self, session: str) -> dict[str, Any]:
        """The service belongs to the learner `session` from here on: what others left behind goes. The same session
        again changes nothing but forgets what it had cancelled."""
        if not session or "/" in session or len(session) > 256:
            raise WireError(f"session must have 1 to 256 characters and no slash, got {session!r}")
        self.check_serving()
        if session != self._session:
            self.weights.discard()
        self._session = session
        replaced = self.groups.begin_session(session)
        return {"instance": self.instance, "weight_version": self.fleet.weight_version, "replaced": replaced}

    def check_session(self, session: str | None) -> None:
        """Raise SessionReplaced for a request of another session than the current one, ServiceUnavailable when none
        began yet: this is another process than the one that the learner knew."""
        if session is None:
            return
        self.check_serving()
        if self._session is None:
            raise ServiceUnavailable(f"the service was started anew and does not know the session {session!r} yet")
        check_session(session, self._session, "this request")

    # --- groups ---------------------------------------------------------------------------------------------------

    async def rollout(self, request: GroupRequest) -> GroupResult:
        """The scored group of `request`; the same key again gives the same result, or joins the running one."""
        self._check(request)
        return await self.groups.get(request, partial(self._runner.run_on, self.router.assign))

    async def on_worker(self, request: GroupRequest, work: Callable[[Member], Awaitable[GroupResult]]) -> GroupResult:
        """What `work` makes of the group on a worker of the router's choice; otherwise a group as any other: with its
        deadline, cancelled and drained as one."""
        self._check(request)

        async def run(_: GroupRequest) -> GroupResult:
            seconds = min(request.deadline_s, self._group_deadline_s)
            async with deadline(seconds, lambda: f"group {request.key!r} was not done within its {seconds:g} s"):
                with await self.router.assign(request) as member:
                    return await work(member)

        return await self.groups.get(request, run)

    def cancel(self, keys: Iterable[str]) -> list[str]:
        """Stop the running groups among `keys` and name them; who waits for one gets GroupCancelled."""
        return self.groups.cancel(keys)

    def _check(self, request: GroupRequest) -> None:
        check_request(request)
        if self._max_model_len is not None and request.prompt_ids.size >= self._max_model_len:
            raise RequestTooLong(
                f"group {request.key!r}: a prompt of {request.prompt_ids.size} tokens leaves no room for a completion in "
                f"the context of {self._max_model_len}; shorten it, or raise vllm.max_model_len"
            )
        self.check_serving()

    @property
    def statistics(self) -> GroupStatistics:
        """Of the groups that were scored."""
        return self._runner.statistics

    # --- the workers themselves -----------------------------------------------------------------------------------

    def workers(self) -> list[WorkerStatus]:
        return [
            replace(self.fleet.status(member), restarts=member.restarts, limit=self.router.limit(member).sequences)
            for member in list(self.fleet.members)  # the page asks from another thread
        ]

    def add_workers(self, count: int) -> list[str]:
        """Start `count` more and name them; each serves once it has the newest weights and is verified."""
        self.check_serving()
        if not 1 <= count <= MAX_NEW_WORKERS:
            raise WireError(f"count must be 1 to {MAX_NEW_WORKERS}, got {count}")
        return self._admit(count)

    def _admit(self, count: int) -> list[str]:
        if self._make_worker is None:
            raise ServiceError("this service cannot start more workers")
        return [self.supervisor.admit(self._make_worker()).name for _ in range(count)]

    def remove_worker(self, name: str) -> None:
        """It gets no more groups, has `service.drain_timeout` seconds for those that it has, then leaves; what it did
        not finish is generated anew on another one."""
        self.check_serving()
        staying = [m.name for m in self.fleet.members if m.state not in ("draining", "gone")]
        states = {m.name: m.state for m in self.fleet.members}
        if name not in states:
            raise RequestRefused(f"there is no worker {name!r}; the workers are: {', '.join(staying)}")
        if states[name] == "draining":
            return
        if staying == [name]:
            raise RequestRefused(f"{name} is the only worker; add another one first")
        task = self.supervisor.retire(name)
        self._leaving.add(task)
        task.add_done_callback(partial(self._left, name))

    def _left(self, name: str, task: asyncio.Task[None]) -> None:
        self._leaving.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.warning("while %s left: %s", name, error)

    async def openai(self, route: str, body: dict[str, Any]) -> dict[str, Any] | AsyncIterator[str]:
        """An OpenAI-shaped request on a worker of the router's choice."""
        self.check_serving()
        return await self._single.openai(route, body)

    async def prompt_logprobs(self, ids: np.ndarray, worker: str | None = None) -> dict[str, np.ndarray]:
        """log p of `ids` int32 [T] on every ready worker, or on the named one: float32 [T-1] by worker name."""
        self.check_serving()
        return await self._single.prompt_logprobs(ids, worker)
