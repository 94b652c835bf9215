"""The feed: keeps groups in flight, and gives each step its batch. Rank 0's side of everything asynchronous.

    ledger.dispatch ─► client.submit ─► arrived: version → policy → ledger ─► batch(step): ledger.take, ticket order
         ▲   ▲                              │ lost: courier.recover, then the same keys again
         │   └── a group arrived, a step was taken, weights are served (any thread, under one lock)
         └────── courier: publish in the background, evaluations, reconnecting

Consumes: tickets of the ledger. Waits for: groups, publishes and evaluations, only in `batch` and `finish`; unblocked by
any of them, or by an error of any thread, which is raised there. Produces: batches. With max_staleness 0 a step's groups
are sent when its weights are served, so nothing overlaps; there is no other code for it.
"""

from __future__ import annotations

import concurrent.futures
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from rlx.errors import DeadlineExceeded, GroupCancelled, ServiceError, ServiceUnavailable
from rlx.learner.incoming.courier import Client, Courier, Evaluator, Publisher, Served, Waits
from rlx.learner.incoming.evaluation import Evaluation
from rlx.learner.incoming.ledger import Ledger, Taken
from rlx.learner.incoming.stream import Fetched
from rlx.learner.incoming.tally import Arrived, Tally, num_tokens, times_of
from rlx.learner.watch.bottleneck import StepTimes
from rlx.learner.watch.journal import Journal
from rlx.learner.weights.publish import Packed
from rlx.wire import GroupRequest, GroupResult

_SAY_AFTER_S = 30.0
"""Seconds without anything happening after which it is said what is waited for; and again after twice as many."""
PATIENCE = 2.0
"""Times as long as it had been under way that a group may hold a step up. Cancelling throws away what was sampled, and the
prompt's next completions may take as long; but nobody knows whether this one ever ends."""
_MORE_ATTEMPTS = 3
"""Times beyond max_requeues that a prompt may come again because the service gave it back, or sampled it too old."""


@dataclass(eq=False)
class _Flight:
    number: int
    attempt: int
    request: GroupRequest
    sent_at: float
    generation: int
    lost: ServiceError | None = None
    """Why nothing usable came of it, until the service is found again"""
    is_foreign: bool = False
    """Whether something came, of weights that are not ours; that key is used up"""


class Feed:
    """`request_of(number, attempt)` makes the request of a ticket; `has_spread` tells whether a group's rewards differ.

    `evaluates(step)`: whether the policy of `step` is to be evaluated. `patience_s` bounds the time in which nothing at
    all happens while a step waits; each thing that it waits for has its own, shorter deadline. `shares_cpu`: whether the
    workers compute on the learner's cores. `journal` is told what happens.
    """

    def __init__(
        self,
        client: Client,
        publisher: Publisher,
        evaluator: Evaluator | None,
        ledger: Ledger,
        session: str,
        waits: Waits,
        *,
        request_of: Callable[[int, int], GroupRequest],
        has_spread: Callable[[GroupResult], bool],
        evaluates: Callable[[int], bool],
        on_evaluation: Callable[[Evaluation, Packed], None],
        on_wait: Callable[[str], None],
        patience_s: float,
        shares_cpu: bool = False,
        journal: Journal | None = None,
    ):
        self._client, self._publisher, self._ledger = client, publisher, ledger
        self._request_of, self._has_spread, self._patience_s = request_of, has_spread, patience_s
        self._journal = journal or Journal()
        self._on_wait = on_wait
        self._evaluates = evaluates if evaluator is not None else lambda step: False
        self._changed = threading.Condition(threading.RLock())
        self._flights: dict[str, _Flight] = {}
        self._ready: dict[int, Arrived] = {}
        self._policy_of: dict[int, int] = {}
        """By version that was sent, the step of its policy"""
        self._sent_step, self._is_recovering = -1, False
        self._events, self._tally = 0, Tally()
        self._held_since: dict[tuple[int, int], float] = {}
        """By number and attempt, when a group began to hold a step up"""
        self._always = StepTimes(max_staleness=float(ledger.rules.max_staleness), shares_cpu=float(shares_cpu))
        self._error: BaseException | None = None
        self._is_closed = False
        self._courier = Courier(
            client, publisher, evaluator, session, waits, on_version=self._sends, on_served=self._served,
            on_back=self._back, on_idle=self._happened, on_error=self._failed, on_evaluation=on_evaluation, on_wait=on_wait,
            evaluates_first=ledger.rules.max_staleness > 0,
            on_lost=lambda cause: self._journal.service_lost(str(cause)), on_found=self._journal.service_back,
        )  # fmt: skip

    # --- the main thread ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Take the service over; what another learner left there is cancelled."""
        self._courier.start()

    def batch(self, step: int, model: nn.Module) -> Fetched:
        """The groups that `step` trains on, none where it goes on with those of the step before; `model` is its policy,
        and is published on the way."""
        if step % self._ledger.rules.steps_per_batch:
            return self._go_on(step, model)
        while True:
            with self._changed:
                self._raise_error()
                is_sent = self._sent_step >= step
                if is_sent or self._courier.publishing:
                    may_take = is_sent or not self._evaluates(step)
                    if may_take and (taken := self._ledger.take()) is not None:
                        return self._hand_over(taken)
                    self._wait(self._give_up() if may_take else math.inf)
                    continue
            self._publish(step, model)

    def _go_on(self, step: int, model: nn.Module) -> Fetched:
        """Publishes `model` without waiting for that, unless weights are still on their way; one that is to be evaluated
        waits for them."""
        while True:
            with self._changed:
                self._raise_error()
                if self._sent_step >= step or (self._courier.publishing and not self._evaluates(step)):
                    tally, self._tally = self._tally, Tally()
                    return self._fetched((), [], step, tally)
                if self._courier.publishing:
                    self._wait()
                    continue
            self._publish(step, model)

    def finish(self, model: nn.Module) -> None:
        """Publish and evaluate the policy after the last step; returns when that is done. Groups that are still under way
        are taken back: no step trains on them."""
        step = min(self._ledger.step, self._ledger.rules.total_steps)
        self._take_all_back()
        while True:
            with self._changed:
                self._raise_error()
                if self._courier.publishing:
                    self._wait()
                    continue
                if self._sent_step >= step:
                    return
            self._publish(step, model)

    def state(self) -> dict[str, object]:
        """The ledger's, for a checkpoint between two steps."""
        with self._changed:
            return self._ledger.state()

    def close(self) -> None:
        """Take back what is in flight; idempotent. The client is to be closed after it."""
        with self._changed:
            self._is_closed = True
        self._take_all_back()
        self._courier.close()

    def _publish(self, step: int, model: nn.Module) -> None:
        began = time.monotonic()
        packed = self._publisher.snapshot(model)
        self._journal.span("snapshot of the weights", began, time.monotonic())
        with self._changed:
            self._tally.weight_sync_wait_s += time.monotonic() - began
            self._sent_step = step
            self._courier.publish(step, packed, self._evaluates(step))

    def _give_up(self) -> float:
        """Seconds until one of the groups that hold the step up is given up, as cancelling it would have cost less."""
        now, held = time.monotonic(), {(ticket.number, ticket.attempt) for ticket in self._ledger.held_up_by()}
        self._held_since = {ticket: self._held_since.get(ticket, now) for ticket in held}
        sent_at = {(flight.number, flight.attempt): flight.sent_at for flight in self._flights.values()}
        ends = {ticket: since + PATIENCE * (since - sent_at[ticket]) for ticket, since in self._held_since.items()}
        for (number, _), end in ends.items():
            if end <= now:
                self._ledger.give_up(number)
        return max(min(ends.values(), default=math.inf) - now, 0.0)

    def _wait(self, at_most_s: float = math.inf) -> None:
        """Until something happens, or `at_most_s` is over, counted as a wait for the one thing that is missing."""
        began, events, say_at = time.monotonic(), self._events, _SAY_AFTER_S
        while (waited := time.monotonic() - began) < min(self._patience_s, at_most_s):
            wait_s = min(say_at, self._patience_s, at_most_s) - waited
            if self._changed.wait_for(lambda: self._events != events, wait_s):
                break
            if time.monotonic() - began >= say_at:
                self._on_wait(self._describe(say_at))
                say_at *= 2
        waited = time.monotonic() - began
        if self._flights or self._courier.doing == "nothing":
            self._tally.rollout_wait_s += waited
            missing = "rollouts"
        elif self._courier.doing == "evaluating":
            self._tally.eval_s += waited
            missing = "the evaluation"
        else:
            self._tally.weight_sync_wait_s += waited
            missing = "the publish"
        self._journal.span(f"wait for {missing}", began, began + waited)
        if self._events == events and waited >= self._patience_s:
            raise DeadlineExceeded(self._describe(waited))

    def _describe(self, waited_s: float) -> str:
        flights = sorted(self._flights.values(), key=lambda flight: flight.sent_at)
        oldest = f", the oldest of them {flights[0].request.key}" if flights else ""
        return (
            f"step {self._ledger.step} waited {waited_s:.0f} s in which nothing happened: {self._ledger.count('ready')} of "
            f"{self._ledger.rules.groups_per_step} groups are there, the rollout service has {len(flights)}{oldest}; the "
            f"learner's courier is {self._courier.doing}"
        )

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # --- a batch --------------------------------------------------------------------------------------------------

    def _hand_over(self, taken: Taken) -> Fetched:
        tally, self._tally = self._tally, Tally()
        groups = [self._ready.pop(number) for number in taken.consumed]
        unused = [self._ready.pop(number).group for number in (*taken.filtered, *taken.dropped)]
        tally.discarded_tokens += sum(map(num_tokens, unused))
        tally.filtered += len(taken.filtered)
        self._take_back(taken, tally)
        self._journal.took(taken.step + 1, groups, tally)
        self._pump()
        return self._fetched(taken.consumed, groups, taken.step, tally)

    def _fetched(self, tickets: tuple[int, ...], groups: list[Arrived], step: int, tally: Tally) -> Fetched:
        times = times_of(tally, groups, step, self._always)
        counts = {"rollout/requeued_groups": float(tally.put_back), "rollout/filtered_groups": float(tally.filtered)}
        weights = tally.served.times.metrics() if tally.served else {}
        return Fetched(tickets, [arrived.group for arrived in groups], times, counts | weights)

    def _take_back(self, taken: Taken, tally: Tally) -> None:
        tally.put_back += len(taken.cancelled) + len(taken.dropped)
        late = set(taken.cancelled)
        keys = [key for key, flight in self._flights.items() if (flight.number, flight.attempt) in late]
        for key in keys:
            del self._flights[key]
        if keys:
            self._client.cancel(keys)

    def _take_all_back(self) -> None:
        with self._changed:
            keys = list(self._flights)
            self._flights.clear()
        self._client.cancel(keys)

    # --- any thread, under the lock -------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Send what the ledger lets go; nothing once this is closed, as nobody would take it back."""
        if self._is_closed:
            return
        for ticket in self._ledger.dispatch():
            request = self._request_of(ticket.number, ticket.attempt)
            self._submit(_Flight(ticket.number, ticket.attempt, request, time.monotonic(), self._courier.generation))

    def _submit(self, flight: _Flight) -> None:
        self._flights[flight.request.key] = flight
        self._client.submit(flight.request).add_done_callback(partial(self._done, flight))

    def _done(self, flight: _Flight, future: concurrent.futures.Future[GroupResult]) -> None:
        with self._changed:
            if self._is_closed or future.cancelled():
                return
            try:
                if self._flights.get(flight.request.key) is flight:
                    self._answered(flight, future)
                    self._pump()
                elif future.exception() is None:  # it was taken back, and came all the same
                    self._tally.discarded_tokens += num_tokens(future.result())
            except BaseException as error:  # a callback has nobody above it: the main thread raises this
                self._failed(error)
            self._happened()

    def _answered(self, flight: _Flight, future: concurrent.futures.Future[GroupResult]) -> None:
        try:
            group = future.result()
        except ServiceUnavailable as error:
            self._lose(flight, error)
            return
        except GroupCancelled as error:
            self._put_back(flight, error)
            return
        tokens = num_tokens(group)
        self._tally.generated_tokens += tokens
        oldest = self._oldest_policy(flight, group)
        if oldest is None:
            self._tally.discarded_tokens += tokens
            return
        self._courier.progressed()
        if self._ledger.arrived(flight.number, flight.attempt, oldest, self._has_spread(group)) == "kept":
            del self._flights[flight.request.key]
            self._ready[flight.number] = Arrived(group, oldest, flight.sent_at, time.monotonic())
        else:
            self._tally.discarded_tokens += tokens
            self._put_back(flight, self._foreign(group))

    def _oldest_policy(self, flight: _Flight, group: GroupResult) -> int | None:
        """The policy of the group's oldest token; None where that is none of ours, or too old in a synchronous run.

        Then its prompt comes again if the service was started anew and had not got our weights; else the run ends."""
        policies = [self._policy_of.get(version) for episode in group.episodes for version in episode.weight_versions]
        known = [policy for policy in policies if policy is not None]
        oldest = min(known, default=self._ledger.served or 0)
        if len(known) == len(policies) and (self._ledger.rules.max_staleness or oldest == self._ledger.step):
            return oldest
        flight.is_foreign = True
        self._lose(flight, self._foreign(group))
        return None

    def _foreign(self, group: GroupResult) -> ServiceError:
        versions = tuple(sorted({v for episode in group.episodes for v in episode.weight_versions}))
        return ServiceError(
            f"worker {group.worker} sampled {group.key} with weight versions {versions}, but {self._publisher.version} was "
            "published. Is another learner using this service?"
        )

    def _put_back(self, flight: _Flight, cause: ServiceError) -> None:
        if flight.attempt >= self._ledger.rules.max_requeues + _MORE_ATTEMPTS:
            raise cause
        del self._flights[flight.request.key]
        self._ledger.failed(flight.number, flight.attempt)
        self._tally.put_back += 1

    def _lose(self, flight: _Flight, cause: ServiceError) -> None:
        flight.lost = cause
        if not self._is_recovering:
            self._is_recovering = True
            self._courier.recover(cause)

    # --- the courier's thread -------------------------------------------------------------------------------------

    def _sends(self, step: int, version: int) -> None:
        """The policy of `step` is about to be sent as `version`, which may show in tokens before the commit is answered."""
        with self._changed:
            self._policy_of[version] = step

    def _served(self, served: Served) -> None:
        with self._changed:
            kept = served.step - self._ledger.rules.max_staleness - 1
            self._policy_of = {version: step for version, step in self._policy_of.items() if step >= kept}
            self._tally.served = served
            self._journal.published(served)
            self._always = replace(self._always, workers=float(served.workers))
            self._ledger.serve(served.step)
            self._ledger.fit(served.workers, served.running, served.waiting)
            self._pump()
            self._happened()

    def _back(self) -> None:
        """The service is there again: what it lost is submitted again, by the same keys."""
        with self._changed:
            self._is_recovering, generation = False, self._courier.generation
            for flight in list(self._flights.values()):
                if flight.lost is None:
                    continue
                if not flight.is_foreign:
                    self._submit(replace(flight, lost=None, generation=generation))
                elif flight.generation == generation:
                    raise flight.lost
                else:
                    self._put_back(flight, flight.lost)
            self._pump()
            self._happened()

    def _failed(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._happened()

    def _happened(self) -> None:
        with self._changed:
            self._events += 1
            self._changed.notify_all()
