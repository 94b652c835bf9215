"""The feed against a service in memory: order, staleness, cancelling, filtering, evaluations, and everything that fails."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from memory_service import Policy, Publisher, RandomTraffic, Service, request

from rlx.errors import (
    DeadlineExceeded,
    GroupCancelled,
    ServiceError,
    ServiceUnavailable,
    SessionReplaced,
    UserCodeError,
)
from rlx.learner.incoming import feed as feed_module
from rlx.learner.incoming.courier import Waits
from rlx.learner.incoming.feed import Feed
from rlx.learner.incoming.ledger import Ledger, Rules
from rlx.learner.incoming.stream import Fetched
from rlx.wire import GroupResult


class Said(list[str]):
    """Sets an event when something is appended."""

    def __init__(self, event: threading.Event):
        super().__init__()
        self._event = event

    def append(self, message: str) -> None:
        super().append(message)
        self._event.set()


class FakeEvaluator:
    """An evaluation that is over when the test says so."""

    def __init__(self, service: Service):
        self._service, self.errors = service, []  # type: tuple[Service, list[Exception]]
        self.started: list[tuple[int, int]] = []
        self.over = threading.Event()
        self.over.set()
        self.num_cancelled = 0

    def start(self, step: int, version: int) -> None:
        self.started.append((step, version))
        self._service.tell(("evaluation", step, self._service.policy))

    def result(self, timeout_s: float) -> Any:
        assert self.over.wait(60)
        if self.errors:
            raise self.errors.pop()
        self._service.tell(("evaluated", self.started[-1][0], self._service.policy))
        return self.started[-1]

    def cancel(self) -> None:
        self.num_cancelled += 1
        self.errors.append(GroupCancelled("taken back"))
        self.over.set()


@dataclass
class Run:
    """A learner: its feed, and what it was given."""

    service: Service
    feed: Feed
    publisher: Publisher
    model: Policy = field(default_factory=Policy)
    batches: list[Fetched] = field(default_factory=list)
    evaluations: list[Any] = field(default_factory=list)
    waited: list[str] = field(default_factory=list)

    def step(self) -> Fetched:
        batch = self.feed.batch(len(self.batches), self.model)
        self.batches.append(batch)
        self.service.log.append(("train", len(self.batches) - 1))
        self.model.train_step()
        return batch

    def close_in_background(self) -> threading.Thread:
        """Returns when everything was told to end, and only the courier is waited for."""
        thread = threading.Thread(target=self.feed.close)
        thread.start()
        while self.feed._courier._errands.empty():
            time.sleep(0.001)
        return thread

    def in_background(self) -> Callable[[], Fetched]:
        """Begins a step; the result waits for it."""
        found: list[Fetched | BaseException] = []

        def body() -> None:
            try:
                found.append(self.step())
            except BaseException as error:
                found.append(error)

        thread = threading.Thread(target=body, daemon=True)
        thread.start()

        def result() -> Fetched:
            thread.join(60)
            assert found, "the step does not end"
            if isinstance(found[0], BaseException):
                raise found[0]
            return found[0]

        return result


@contextmanager
def learner(
    service: Service,
    session: str = "s",
    evaluates: Callable[[int], bool] = lambda step: False,
    evaluator: FakeEvaluator | None = None,
    service_s: float = 60.0,
    patience_s: float = 60.0,
    ledger: Ledger | None = None,
    **rules: Any,
) -> Iterator[Run]:
    ledger = ledger or Ledger(Rules(**{"groups_per_step": 2, "total_steps": 10} | rules))
    client = service.client()
    publisher = Publisher(client)
    feed = Feed(
        client, publisher, evaluator, ledger, session, Waits(service_s, 60.0),
        request_of=partial(request, session), has_spread=has_spread, evaluates=evaluates,
        on_evaluation=lambda evaluation, packed: run.evaluations.append((evaluation, bytes(packed.payload))),
        on_wait=lambda message: run.waited.append(message), patience_s=patience_s,
    )  # fmt: skip
    run = Run(service, feed, publisher)
    run.model.steps.data += ledger.step
    run.batches += [Fetched((), [])] * ledger.step
    feed.start()
    try:
        yield run
    finally:
        publisher.may_send.set()
        publisher.may_answer.set()
        feed.close()


def train_on(run: Run) -> None:
    """Steps until there is an error."""
    while len(run.batches) < 100:
        run.step()


def has_spread(group: GroupResult) -> bool:
    return bool(group.rewards[0].values.min() != group.rewards[0].values.max())


def check_ages(run: Run, staleness: int) -> None:
    """Every token that was trained was sampled by a policy that is at most `staleness` steps old."""
    for step, batch in enumerate(run.batches):
        for group in batch.groups:
            policies = {run.service.policy_of[v] for e in group.episodes for v in e.weight_versions}
            assert all(step - staleness <= policy <= step for policy in policies)


def test_without_staleness_sampling_training_and_publishing_follow_each_other():
    service = Service()
    with learner(service, total_steps=3) as run, RandomTraffic(service, seed=1):
        for _ in range(3):
            run.step()
        run.feed.finish(run.model)
    assert [b.tickets for b in run.batches] == [(0, 1), (2, 3), (4, 5)]
    assert [[g.key for g in b.groups] for b in run.batches] == [
        ["s/0.0", "s/1.0"],
        ["s/2.0", "s/3.0"],
        ["s/4.0", "s/5.0"],
    ]
    assert service.log == [
        ("commit", 1, 0.0, "full"), ("submit", "0.0", 0.0), ("submit", "1.0", 0.0), ("train", 0),
        ("commit", 2, 1.0, "difference"), ("submit", "2.0", 1.0), ("submit", "3.0", 1.0), ("train", 1),
        ("commit", 3, 2.0, "difference"), ("submit", "4.0", 2.0), ("submit", "5.0", 2.0), ("train", 2),
        ("commit", 4, 3.0, "difference"),
    ]  # fmt: skip


def test_weights_travel_and_groups_are_sampled_while_the_learner_trains():
    service = Service()
    with learner(service, max_staleness=1) as run:
        first = run.in_background()
        service.finish("0.0", "1.0")
        assert first().tickets == (0, 1)
        run.publisher.may_send.clear()
        second = run.in_background()
        service.finish("3.0", "2.0")
        assert second().tickets == (2, 3), "policy 1 is not published yet, and step 1 can train"
        assert second().times.staleness_max == 1
        assert service.tickets() == [], "nothing may be sampled from policy 0 for step 2"
        run.publisher.may_send.set()
        service.wait_for(lambda: service.tickets() == ["4.0", "5.0"])


def test_a_step_waits_for_a_group_that_would_be_too_old_for_the_next(monkeypatch):
    monkeypatch.setattr(feed_module, "PATIENCE", 1e6)
    service = Service()
    with learner(service, max_staleness=1) as run:
        steps = run.in_background()
        service.finish("1.0", "2.0")
        assert steps().tickets == (1, 2)
        steps = run.in_background()
        service.finish("4.0", "5.0", "3.0", "0.0")
        assert steps().tickets == (0, 3)
        assert service.cancelled == []
    check_ages(run, 1)


def test_a_group_that_holds_a_step_up_for_too_long_is_cancelled_and_sampled_anew():
    service = Service()
    with learner(service, max_staleness=1) as run:
        steps = run.in_background()
        service.finish("1.0", "2.0")
        assert steps().tickets == (1, 2)
        steps = run.in_background()
        service.finish("4.0", "5.0")
        assert steps().tickets == (4, 5)
        service.wait_for(lambda: service.cancelled == ["0.0", "3.0"])
        steps = run.in_background()
        service.finish("0.1", "3.1")
        assert steps().tickets == (0, 3)
        assert run.batches[1].metrics["rollout/requeued_groups"] == 2
    check_ages(run, 1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_every_prompt_is_trained_once_with_delays_cancellations_and_a_service_that_dies(
    staleness: int, seed: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(feed_module, "_MORE_ATTEMPTS", 100)  # chance may give one prompt back many times
    service = Service(flat=lambda key: int(key.partition("/")[2].partition(".")[0]) % 3 == 0)
    rules = {"max_staleness": staleness, "total_steps": 8, "dynamic_sampling": seed % 2 == 0, "oversample": 1.5}
    with learner(service, max_inflight_groups=5, **rules) as run:
        with RandomTraffic(service, seed, give_back=0.1, restarts=3):
            for _ in range(8):
                run.step()
        run.feed.finish(run.model)
    trained = Counter(ticket for batch in run.batches for ticket in batch.tickets)
    assert set(trained.values()) == {1}
    assert sum(trained.values()) == 16
    if seed % 2:
        assert set(trained) == set(range(16))
    else:
        assert {t for t in range(16) if t % 3} <= set(trained), "the others are left out"
    assert service.policy == 8
    check_ages(run, staleness)


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_learner_goes_on_where_its_checkpoint_was(seed: int):
    """The first one is not closed: its groups stay in the service, which the second takes over."""
    service, rules = Service(), Rules(2, 8, max_staleness=1)
    ended: list[int] = []
    with RandomTraffic(service, seed), learner(service, "first", ledger=Ledger(rules)) as first:
        for _ in range(4):
            ended += first.step().tickets
        state = first.feed.state()
        first.step()
        again = Ledger(rules, 4)
        again.restore(state)
        with learner(service, "second", ledger=again) as second:
            for _ in range(4):
                ended += second.step().tickets
            with pytest.raises(SessionReplaced):
                train_on(first)
    assert sorted(ended) == list(range(16))


def test_a_service_that_is_started_anew_gets_the_weights_in_full_and_the_same_groups():
    service = Service()
    with learner(service) as run:
        step = run.in_background()
        service.finish("0.0")
        service.wait_for(lambda: service.tickets() == ["1.0"])
        service.stop()
        service.start()
        service.finish("1.0")
        assert step().tickets == (0, 1)
        assert run.waited == ["the service"]
    assert service.log == [
        ("commit", 1, 0.0, "full"), ("submit", "0.0", 0.0), ("submit", "1.0", 0.0), ("stop",),
        ("commit", 2, 0.0, "full"), ("submit", "1.0", 0.0), ("train", 0),
    ]  # fmt: skip


def test_groups_that_a_new_service_sampled_before_it_had_the_weights_come_again():
    """The client's own retry reached it before the learner noticed."""
    service = Service()
    with learner(service) as run:
        step = run.in_background()
        service.wait_for(lambda: service.tickets() == ["0.0", "1.0"])
        with service.lock:
            service._instance, service.session = "another", None
        service.finish("0.0", "1.0", versions=[0])
        service.finish("0.1", "1.1")
        assert step().tickets == (0, 1)
    assert [entry for entry in service.log if entry[0] == "commit"] == [
        ("commit", 1, 0.0, "full"), ("commit", 2, 0.0, "full")
    ]  # fmt: skip


@pytest.mark.parametrize("staleness", [0, 1])
def test_tokens_of_versions_that_nobody_published_end_the_run(staleness: int):
    service = Service()
    with learner(service, max_staleness=staleness) as run:
        step = run.in_background()
        service.finish("0.0", versions=[9])
        with pytest.raises(
            ServiceError, match=r"worker-0 sampled s/0\.0 with weight versions \(9,\), but 1 was published"
        ):
            step()


def test_a_version_shows_in_tokens_before_its_commit_is_answered_and_another_that_nobody_sent_ends_the_run():
    service = Service()
    with learner(service, max_staleness=1) as run:
        step = run.in_background()
        service.finish("0.0", "1.0")
        step()
        run.publisher.may_answer.clear()
        step = run.in_background()
        service.wait_for(lambda: service.version == 2)
        service.finish("2.0", versions=[1, 2])
        service.finish("3.0", versions=[2, 9])
        run.publisher.may_answer.set()
        with pytest.raises(ServiceError, match=r"sampled s/3\.0 with weight versions \(2, 9\)"):
            step()


def test_a_token_of_the_policy_before_ends_a_synchronous_run():
    service = Service()
    with learner(service, max_staleness=0) as run:
        first = run.in_background()
        service.finish("0.0", "1.0")
        first()
        step = run.in_background()
        service.finish("2.0", versions=[1, 2])
        with pytest.raises(ServiceError, match=r"sampled s/2\.0 with weight versions \(1, 2\), but 2 was published"):
            step()


def test_a_service_that_does_not_come_back_ends_the_run_in_time():
    service = Service()
    with learner(service, service_s=0.2) as run:
        step = run.in_background()
        service.wait_for(lambda: len(service.tickets()) == 2)
        service.stop()
        with pytest.raises(ServiceUnavailable, match=r"no rollout service was ready within 0\.2 s"):
            step()


def test_a_service_that_answers_but_loses_every_group_ends_the_run():
    service = Service()
    over = threading.Event()

    def lose() -> None:
        while not over.wait(0.01):
            for ticket in service.tickets():
                service.fail(ticket, ServiceUnavailable("no worker is left"))

    thread = threading.Thread(target=lose, daemon=True)
    with learner(service, service_s=1.0) as run:
        thread.start()
        with pytest.raises(ServiceUnavailable, match="no worker is left"):
            run.step()
        over.set()
        thread.join(10)


def test_the_error_of_a_group_ends_the_run_unchanged():
    service = Service()
    with learner(service) as run:
        step = run.in_background()
        service.wait_for(lambda: len(service.tickets()) == 2)
        service.fail("1.0", UserCodeError("reward raised"))
        with pytest.raises(UserCodeError, match=r"^reward raised$"):
            step()


def test_a_prompt_that_is_given_back_again_and_again_ends_the_run():
    service = Service()
    with learner(service, max_requeues=0) as run:
        step = run.in_background()
        for attempt in range(4):
            service.wait_for(lambda attempt=attempt: f"0.{attempt}" in service.tickets())
            service.fail(f"0.{attempt}", GroupCancelled(f"given back {attempt}"))
        with pytest.raises(GroupCancelled, match="given back 3"):
            step()


def waiting_for_the_second_group(run: Run) -> Callable[[], Fetched]:
    """A step that has one of its two groups, while the courier has nothing to do."""
    step = run.in_background()
    run.service.wait_for(lambda: len(run.service.tickets()) == 2)
    while run.feed._courier.doing != "nothing":
        time.sleep(0.001)
    run.service.finish("0.0")
    return step


def test_a_wait_in_which_nothing_happens_ends_with_what_is_missing():
    service = Service()
    with learner(service) as run:
        step = waiting_for_the_second_group(run)
        run.feed._patience_s = 0.1
        service.fail("1.0", GroupCancelled("given back"))
        with pytest.raises(
            DeadlineExceeded,
            match=r"step 0 waited \d+ s in which nothing happened: 1 of 2 groups are there, the rollout service has 1, the "
            r"oldest of them s/1\.[01]; the learner's courier is nothing",
        ):
            step()


def test_a_long_wait_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch):
    service, said = Service(), threading.Event()
    with learner(service) as run:
        step = waiting_for_the_second_group(run)
        run.waited = Said(said)
        monkeypatch.setattr("rlx.learner.incoming.feed._SAY_AFTER_S", 0.05)
        service.fail("1.0", GroupCancelled("given back"))
        assert said.wait(60)
        service.finish("1.1")
        step()
    assert "in which nothing happened: 1 of 2 groups are there, the rollout service has 1" in run.waited[0]


def test_clocks_that_jump_change_nothing(monkeypatch: pytest.MonkeyPatch):
    service, jumps = Service(), iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: (-1) ** next(jumps) * 1e9)
    with learner(service, total_steps=4, max_staleness=1) as run, RandomTraffic(service, seed=3, restarts=1):
        for _ in range(4):
            run.step()
    assert sorted(t for b in run.batches for t in b.tickets) == list(range(8))
    assert all(0 <= batch.times.in_flight_s < 1e6 for batch in run.batches)


def test_the_next_weights_wait_for_an_evaluation_and_training_goes_on_meanwhile():
    service = Service()
    evaluator = FakeEvaluator(service)
    evaluator.over.clear()
    with learner(service, evaluates=lambda step: step in (0, 10), evaluator=evaluator, max_staleness=1) as run:
        step = run.in_background()
        service.finish("0.0", "1.0")
        step()
        step = run.in_background()
        service.finish("2.0", "3.0")
        step()
        assert service.policy == 0
        assert service.tickets() == []
        evaluator.over.set()
        step = run.in_background()
        service.wait_for(lambda: service.tickets() == ["4.0", "5.0", "6.0", "7.0"])
        assert service.policy == 2
        service.finish("4.0", "5.0")
        step()
    log = [entry[:2] for entry in service.log if entry[0] in ("commit", "evaluation", "evaluated", "train")]
    assert log == [
        ("commit", 1), ("evaluation", 0), ("train", 0), ("train", 1), ("evaluated", 0), ("commit", 2), ("train", 2)
    ]  # fmt: skip
    assert run.evaluations == [((0, 1), b"0.0")]


@pytest.mark.parametrize(
    ("staleness", "first"), [(0, ["submit", "submit", "evaluation"]), (1, ["evaluation", "submit"])]
)
def test_an_evaluation_is_not_behind_training_where_the_next_weights_would_wait_for_both(
    staleness: int, first: list[str]
):
    service = Service()
    evaluator = FakeEvaluator(service)
    with learner(service, evaluates=lambda step: step == 0, evaluator=evaluator, max_staleness=staleness) as run:
        step = run.in_background()
        service.wait_for(lambda: ("evaluated", 0, 0.0) in service.log)
        service.finish("0.0", "1.0")
        assert step().tickets == (0, 1)
    events = [entry[0] for entry in service.log if entry[0] in ("submit", "evaluation")]
    assert events[: len(first)] == first
    assert evaluator.started == [(0, 1)]


def test_the_policy_of_a_due_step_is_evaluated_also_when_publishing_is_slow():
    """Step 2 has its groups, and waits until the weights of step 1 made way for its own."""
    service = Service()
    evaluator = FakeEvaluator(service)
    with learner(service, evaluates=lambda step: step == 2, evaluator=evaluator, max_staleness=2) as run:
        for number in range(2):
            step = run.in_background()
            service.finish(f"{2 * number}.0", f"{2 * number + 1}.0")
            step()
            run.publisher.may_send.clear()
        step = run.in_background()
        service.finish("4.0", "5.0")
        run.publisher.may_send.set()
        assert step().tickets == (4, 5)
        service.wait_for(lambda: ("evaluated", 2, 2.0) in service.log)


def test_an_evaluation_that_lost_its_service_is_made_anew_with_the_same_weights():
    service = Service()
    evaluator = FakeEvaluator(service)
    evaluator.over.clear()
    with learner(service, evaluates=lambda step: step == 0, evaluator=evaluator) as run:
        step = run.in_background()
        service.wait_for(lambda: ("evaluation", 0, 0.0) in service.log and len(service.tickets()) == 2)
        evaluator.errors.append(ServiceUnavailable("lost"))
        service.stop()
        service.start()
        evaluator.over.set()
        service.finish("0.0", "1.0")
        step()
        service.wait_for(lambda: ("evaluated", 0, 0.0) in service.log)
    assert evaluator.started == [(0, 1), (0, 2)]


def test_a_step_tells_where_its_time_went(monkeypatch: pytest.MonkeyPatch):
    service, said = Service(), threading.Event()
    monkeypatch.setattr("rlx.learner.incoming.feed._SAY_AFTER_S", 0.01)
    with learner(service, max_staleness=1) as run:
        run.waited = Said(said)
        step = run.in_background()
        service.wait_for(lambda: len(service.tickets()) == 4)
        said.clear()
        assert said.wait(60), "the step waits for its groups"
        service.finish("0.0", "1.0")
        times = step().times
        assert times.rollout_wait_s > 0
        assert (times.weight_sync_s, times.weight_sync_pause_s, times.max_staleness) == (0.02, 0.005, 1)
        assert (times.generated_tokens, times.generation_s, times.staleness_max) == (4, pytest.approx(0.1), 0)
        assert run.batches[0].metrics["weights/changed_fraction"] == 0.5


def test_closing_takes_back_what_is_in_flight():
    service = Service()
    with learner(service) as run:
        step = run.in_background()
        service.finish("0.0")
        service.wait_for(lambda: service.tickets() == ["1.0"])
        service.finish("1.0")
        step()
        run.in_background()
        service.wait_for(lambda: len(service.tickets()) == 2)
    assert service.cancelled == ["2.0", "3.0"]


def test_a_publish_that_ends_while_the_feed_is_closed_sends_nothing_any_more():
    service = Service()
    with learner(service, max_staleness=1) as run:
        step = run.in_background()
        service.finish("0.0", "1.0")
        step()
        run.publisher.may_answer.clear()
        step = run.in_background()
        service.finish("2.0", "3.0")
        step()
        service.wait_for(lambda: service.version == 2)
        closing = run.close_in_background()
        run.publisher.may_answer.set()
        closing.join(60)
    assert [entry[1] for entry in service.log if entry[0] == "submit"] == ["0.0", "1.0", "2.0", "3.0"]


@pytest.mark.parametrize("staleness", [0, 1])
def test_closing_takes_an_evaluation_back_and_does_not_wait_for_it(staleness: int):
    service = Service()
    evaluator = FakeEvaluator(service)
    evaluator.over.clear()
    with learner(service, evaluates=lambda step: step == 0, evaluator=evaluator, max_staleness=staleness) as run:
        step = run.in_background()
        service.finish("0.0", "1.0")
        step()
        service.wait_for(lambda: ("evaluation", 0, 0.0) in service.log)
        run.feed.close()
        assert evaluator.num_cancelled in (1, 2), "the courier takes back, too, what it was just beginning"
        run.feed._courier._thread.join(30)
        assert not run.feed._courier._thread.is_alive()


def test_an_evaluation_that_begins_while_the_feed_is_closed_is_taken_back():
    service = Service()
    evaluator = FakeEvaluator(service)
    with learner(service, evaluates=lambda step: step == 0, evaluator=evaluator) as run:
        run.publisher.may_answer.clear()
        run.in_background()
        service.wait_for(lambda: service.version == 1)
        closing = run.close_in_background()
        before = evaluator.num_cancelled
        run.publisher.may_answer.set()
        closing.join(60)
        run.feed._courier._thread.join(60)
        assert (before, evaluator.num_cancelled) == (1, 2)
    assert run.evaluations == []


@pytest.mark.parametrize("dies", [True, False])
@pytest.mark.parametrize("place", ["asking for the version", "before the commit", "after the commit"])
def test_a_publish_that_is_cut_off_anywhere_is_made_again_and_every_token_is_known(place: str, dies: bool):
    """The service dies there, with what it ran and had; or only the connection is lost."""
    service = Service()
    evaluator = FakeEvaluator(service)
    with learner(service, evaluates=lambda step: step == 1, evaluator=evaluator, max_staleness=1, total_steps=4) as run:
        step = run.in_background()
        service.finish("0.0", "1.0")
        step()
        left = [1, 1]

        def cut(where: str) -> None:
            if where == place and left:
                left.pop()
                if dies:
                    service.stop()
                    service.start()
                raise ServiceUnavailable("the connection was lost")

        run.publisher.at = cut
        with RandomTraffic(service, seed=5):
            for _ in range(3):
                run.step()
            run.feed.finish(run.model)
    assert not left
    assert sorted(ticket for batch in run.batches for ticket in batch.tickets) == list(range(8))
    assert service.policy == 4
    assert [policy for (policy, _), _ in run.evaluations] == [1]
    check_ages(run, 1)


def test_groups_that_no_step_needs_are_taken_back_after_the_last():
    service = Service(flat=lambda key: key.partition("/")[2] < "4")
    rules = {"max_staleness": 2, "dynamic_sampling": True, "max_sampling_attempts": 2, "oversample": 1.5}
    with learner(service, total_steps=2, **rules) as run:
        step = run.in_background()
        service.finish("0.0", "1.0", "2.0", "3.0")
        assert step().tickets == (0, 1)
        step = run.in_background()
        service.finish("4.0", "5.0")
        assert step().tickets == (4, 5)
        assert service.tickets() == ["6.0"]
        run.feed.finish(run.model)
        assert service.cancelled == ["6.0"]
    assert service.policy == 2
