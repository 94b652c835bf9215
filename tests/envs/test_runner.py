import asyncio
import contextlib
import threading
import time
from typing import Any

import numpy as np
import pytest
from env_parts import USER, FakeEnvironments, Policy, chat_of, group, runner_of

from rlx.envs import runner as runner_module
from rlx.envs import state as state_module
from rlx.envs import threads
from rlx.envs.errors import EnvLost
from rlx.envs.rollout import Rollout
from rlx.envs.runner import Native
from rlx.envs.threads import Executor, stuck_threads
from rlx.episode import Episode
from rlx.errors import ConfigError, DeadlineExceeded, ServiceError, ServiceUnavailable
from rlx.wire import GroupRequest, GroupResult, RewardOutcome

SAID = "four<|im_end|>"


def _policy(says: Any = None) -> Policy:
    return Policy(chat_of(), says or (lambda *_: SAID))


async def _one(function: Native, policy: Policy | None = None, request: GroupRequest | None = None, **parts: Any) -> Episode:  # fmt: skip
    [episode] = await runner_of(function, **parts).run(policy or _policy(), request or group())
    return episode


async def _forever() -> None:
    await asyncio.Event().wait()


def _nothing_left() -> bool:
    return asyncio.all_tasks() == {asyncio.current_task()}


# --- how an episode ends


async def test_an_episode_is_what_its_function_did():
    async def function(ctx: Rollout) -> float:
        await ctx.turn()
        ctx.observe({"role": "user", "content": "sure?"})
        await ctx.turn()
        ctx.extra["steps"] = 3
        ctx.metric("m", 1)
        ctx.metric("m", 2)
        ctx.exact = False
        ctx.reward(9)
        return 0.5

    episode = await _one(function)
    assert (episode.status, episode.error, episode.attempts, episode.turns) == ("ok", "", 1, 2)
    assert (episode.reward, [r.value for r in episode.step_rewards]) == (0.5, [9.0])
    assert (episode.extra, episode.metrics, episode.exact) == ({"steps": 3}, {"m": 2.0}, False)
    assert episode.text == "fourfour"
    times = [time for turn in episode.turn_times for time in turn]
    assert len(times) == 4
    assert times == sorted(times)
    assert episode.completion == [
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "four"},
    ]
    assert len(episode.rows) == 1
    assert episode.rows[0].prompt_ids is None
    assert episode.num_sampled == 10


@pytest.mark.parametrize(
    ("value", "reward"),
    [(0.5, 0.5), (1, 1.0), (True, 1.0), (None, None), (np.float32(0.25), 0.25), (np.int64(3), 3.0), (np.bool_(True), 1.0)],
)  # fmt: skip
async def test_numbers_of_every_kind_are_rewards(value: Any, reward: float | None):
    async def function(ctx: Rollout) -> Any:
        await ctx.turn()
        return value

    episode = await _one(function)
    assert (episode.status, episode.reward) == ("ok", reward)
    assert not isinstance(episode.reward, bool | np.generic)


async def test_without_a_return_value_the_reward_is_the_sum_of_the_steps():
    async def function(ctx: Rollout) -> None:
        await ctx.turn()
        ctx.reward(0.5, turn=0)
        ctx.reward(0.25)

    assert (await _one(function)).reward == 0.75


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("1.0", "returned a str, '1.0'"),
        ({"reward": 1}, "returned a dict"),
        (float("nan"), "returned nan"),
        (float("inf"), "returned inf"),
        (10**400, "Return a finite number"),
        (1j, "returned a complex"),
        (np.complex64(1), "returned a complex64"),
        (np.asarray([1.0]), "returned a ndarray"),
    ],
)
async def test_what_is_no_finite_number_aborts_the_episode(value: Any, says: str):
    async def function(ctx: Rollout) -> Any:
        await ctx.turn()
        return value

    episode = await _one(function)
    assert (episode.status, episode.reward) == ("aborted", None)
    assert says in episode.error


async def test_a_function_that_never_sampled_aborts_its_episode():
    async def function(ctx: Rollout) -> float:
        ctx.start()
        return 1.0

    episode = await _one(function)
    assert (episode.status, episode.rows, episode.reward) == ("aborted", (), None)
    assert "never generated through ctx" in episode.error


async def test_an_exception_aborts_one_episode_with_the_users_traceback_and_no_other():
    async def function(ctx: Rollout) -> float:
        await ctx.turn()
        if ctx.index == 1:
            return 1 / 0
        return 1.0

    episodes = await runner_of(function).run(_policy(), group(n=3))
    assert [e.status for e in episodes] == ["ok", "aborted", "ok"]
    assert [e.reward for e in episodes] == [1.0, None, 1.0]
    assert "ZeroDivisionError" in episodes[1].error
    assert "return 1 / 0" in episodes[1].error
    assert "/envs/runner.py" not in episodes[1].error


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
async def test_what_ends_a_program_aborts_the_episode_and_not_the_process(error: BaseException):
    async def function(ctx: Rollout) -> None:
        raise error

    episode = await _one(function)
    assert episode.status == "aborted"
    assert f"it raised {error!r}, which ends a program" in episode.error


async def test_a_function_that_cancels_itself_is_aborted():
    async def function(ctx: Rollout) -> None:
        raise asyncio.CancelledError

    assert "cancelled itself" in (await _one(function)).error


async def test_what_cannot_be_sent_as_json_aborts_the_episode_that_made_it():
    async def function(ctx: Rollout) -> float:
        await ctx.turn()
        ctx.extra["array"] = np.ones(2)
        return 1.0

    for max_tokens in (500, 2):
        episode = await _one(function, request=group(max_tokens=max_tokens))
        assert episode.status == "aborted"
        assert "ctx.extra" in episode.error
        assert episode.extra == {}


# --- truncated


async def test_an_episode_that_ran_out_of_tokens_is_truncated_and_keeps_its_rewards():
    async def function(ctx: Rollout) -> None:
        while True:
            await ctx.turn()
            ctx.reward(1.0)
            ctx.observe({"role": "user", "content": "more"})

    episode = await _one(function, request=group(max_tokens=100))
    assert (episode.status, episode.scorable) == ("truncated", True)
    assert episode.reward == episode.turns > 1
    assert len(episode.rows[0].ids) <= 100
    assert episode.rows[0].mask[-1]
    assert "nothing is left to sample" in episode.error


async def test_a_last_turn_cut_by_the_budget_is_truncated():
    async def function(ctx: Rollout) -> float:
        await ctx.turn()
        return 1.0

    episode = await _one(function, request=group(max_tokens=2))
    assert (episode.status, episode.reward, episode.num_sampled) == ("truncated", 1.0, 2)


async def test_a_turn_cut_by_its_own_limit_is_not_truncated():
    async def function(ctx: Rollout) -> float:
        await ctx.turn(max_tokens=2)
        return 1.0

    assert (await _one(function)).status == "ok"


async def test_truncation_inside_a_task_group_is_truncation():
    async def function(ctx: Rollout) -> None:
        await ctx.turn()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ctx.turn())

    policy = _policy(lambda *_: "x" * 99)
    assert (await _one(function, policy, group(max_tokens=2))).status == "truncated"


async def test_a_prompt_that_leaves_no_room_is_aborted():
    async def function(ctx: Rollout) -> None:
        await ctx.turn()

    episode = await _one(function, max_model_len=5)
    assert (episode.status, episode.rows) == ("aborted", ())
    assert "max_model_len 5" in episode.error


# --- timeout


async def test_an_episode_that_never_ends_times_out_and_its_request_is_cancelled():
    async def function(ctx: Rollout) -> None:
        await ctx.turn()

    policy = _policy()
    policy.gate.clear()
    episode = await _one(function, policy, timeout=0.05)
    assert (episode.status, episode.reward) == ("timeout", None)
    assert "episodes.timeout, 0.05 s" in episode.error
    assert policy.cancelled == ["g:0.0.0"]
    assert _nothing_left()


async def test_an_episode_ends_before_its_group_does():
    async def function(ctx: Rollout) -> float:
        await ctx.turn()
        raise EnvLost("gone") if ctx.attempt == 0 else await _forever()

    for deadline_s in (2.0, 20.0, 200.0):  # more, where a busy machine takes all of it for the first attempt
        episode = await asyncio.wait_for(
            _one(function, request=group(deadline_s=deadline_s), retries=2, timeout=6000), 600
        )
        if episode.attempts > 1:
            break
    assert (episode.status, episode.attempts) == ("timeout", 2)


async def test_an_episode_lost_with_the_time_of_its_group_is_not_begun_again():
    async def function(ctx: Rollout) -> None:
        ctx.fail(EnvLost("gone"))
        await _forever()

    episode = await _one(function, request=group(deadline_s=0.3), retries=2, timeout=60)
    assert (episode.status, episode.attempts) == ("env_lost", 1)


async def test_a_request_that_outlives_its_episode_is_not_recorded():
    outlives: list[asyncio.Task[Any]] = []
    policy = _policy()

    async def function(ctx: Rollout) -> float:
        await ctx.turn()
        policy.gate.clear()
        outlives.append(asyncio.create_task(ctx.fork().turn()))
        await policy.asked(2)
        return 1.0

    episode = await _one(function, policy)
    policy.gate.set()
    with pytest.raises(asyncio.CancelledError, match="the episode is over"):
        await outlives[0]
    assert len(episode.rows) == 1


async def test_one_that_times_out_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch):
    seconds = iter([0.1, 60.0, 60.0])
    monkeypatch.setattr(runner_module, "new_deadline", lambda timeout: time.monotonic() + next(seconds))

    async def function(ctx: Rollout) -> float:
        await ctx.turn()
        if ctx.index == 0:
            await _forever()
        return 1.0

    episodes = await runner_of(function).run(_policy(), group(n=3))
    assert [e.status for e in episodes] == ["timeout", "ok", "ok"]
    assert [e.num_sampled for e in episodes[1:]] == [5, 5]


async def test_a_function_that_swallows_its_cancellation_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner_module, "GRACE_S", 0.05)
    swallowed, release = [], asyncio.Event()

    async def function(ctx: Rollout) -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                swallowed.append(True)

    episode = await _one(function, timeout=0.05)
    assert episode.status == "timeout"
    assert "did not end within 0.05 s of being cancelled" in episode.error
    assert swallowed
    monkeypatch.setattr("rlx.envs.threads.GRACE_S", 0.0)
    stuck = stuck_threads()
    release.set()
    assert stuck == ["g, episode 0"]
    async with asyncio.timeout(10):
        while stuck_threads():  # noqa: ASYNC110 - the task sets no event behind its end
            await asyncio.sleep(0)


@pytest.mark.parametrize("gives_up", [True, False])
async def test_a_thread_that_the_function_left_behind_is_named_until_it_ends(monkeypatch, gives_up: bool):
    monkeypatch.setattr("rlx.envs.threads.GRACE_S", 0.0)
    loop = asyncio.get_running_loop()
    loop.set_default_executor(Executor(2))
    entered, release = asyncio.Event(), threading.Event()

    def wait() -> None:
        loop.call_soon_threadsafe(entered.set)
        release.wait(60)

    async def function(ctx: Rollout) -> float:
        await ctx.turn()
        waiting = asyncio.create_task(asyncio.to_thread(wait))
        await entered.wait()
        if gives_up:
            assert not stuck_threads(), "the episode is not over"
            return 1.0
        await waiting
        return 0.0

    running = asyncio.create_task(_one(function))
    await entered.wait()
    if gives_up:
        assert (await running).status == "ok"
    else:
        running.cancel()
        await asyncio.wait({running})
    stuck = stuck_threads()
    release.set()
    assert stuck == ["g, episode 0"]
    await loop.shutdown_default_executor()
    assert not stuck_threads()


async def test_threads_are_counted_while_others_are_left_behind(monkeypatch: pytest.MonkeyPatch):
    """The process is asked from another thread than that of the episodes."""

    class Ends(threading.Thread):
        def is_alive(self) -> bool:
            threads._abandoned[threading.Thread()] = time.monotonic()
            return False

    monkeypatch.setattr(threads, "_abandoned", {Ends(): 0.0, Ends(): 0.0})
    assert not stuck_threads()


async def test_a_function_that_catches_everything_does_not_sample_after_its_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner_module, "GRACE_S", 0.3)
    release = asyncio.Event()

    async def function(ctx: Rollout) -> None:
        while not release.is_set():
            try:
                await ctx.fork().turn()
            except BaseException:  # what such a function would do
                continue

    policy = _policy()
    async with asyncio.timeout(60):
        episode = await _one(function, policy, timeout=0.05)
    assert episode.status == "timeout"
    asked, recorded = len(policy.requests), len(episode.rows)
    await asyncio.sleep(0.15)
    release.set()
    assert (len(policy.requests), len(episode.rows)) == (asked, recorded)


async def test_a_timeout_error_at_the_deadline_is_a_timeout():
    async def function(ctx: Rollout) -> None:
        async with asyncio.timeout_at(ctx.deadline):  # the loop's clock is time.monotonic
            await _forever()

    assert (await _one(function, timeout=0.05)).status == "timeout"


async def test_a_timeout_error_before_the_deadline_is_the_users():
    async def function(ctx: Rollout) -> None:
        raise TimeoutError("tool")

    assert (await _one(function)).status == "aborted"


# --- environments


async def test_a_lost_environment_begins_the_episode_again_with_the_same_seed():
    environments, attempts = FakeEnvironments(losses=2), []

    async def function(ctx: Rollout) -> None:
        attempts.append((ctx.attempt, ctx.seed))
        env = await ctx.env("maze")
        await ctx.turn()
        await env.step()

    policy = _policy()
    episode = await _one(function, policy, environments=environments)
    assert (episode.status, episode.attempts, episode.reward) == ("ok", 3, 0.5)
    assert attempts == [(0, 7), (1, 7), (2, 7)]
    assert [s.seed for s in environments.sessions] == [7, 7, 7]
    assert [s.closed for s in environments.sessions] == [1, 1, 1]
    assert len(episode.rows) == 1
    assert len({r.sampling.seed for r in policy.requests}) == 3


@pytest.mark.parametrize("retries", [0, 1, 2])
async def test_an_environment_that_stays_lost_ends_the_episode(retries: int):
    environments = FakeEnvironments(losses=9)

    async def function(ctx: Rollout) -> None:
        await ctx.turn()
        await (await ctx.env()).step()

    episode = await _one(function, environments=environments, retries=retries)
    assert (episode.status, episode.attempts, episode.reward) == ("env_lost", retries + 1, None)
    assert "the environment died" in episode.error
    assert not episode.scorable


@pytest.mark.parametrize("how", ["step", "call_tool", "open", "raised"])
async def test_a_loss_that_the_function_swallows_is_a_loss(how: str):
    async def function(ctx: Rollout) -> float:
        await ctx.turn()
        try:
            if how == "raised":
                ctx.fail(EnvLost("an agent's environment died"))
                raise EnvLost("the user's own")
            env = await ctx.env()
            await (env.step() if how == "step" else env.call_tool("t", {}))
        except EnvLost:
            return 1.0
        return 2.0

    environments = FakeEnvironments(losses=9, refuse=how == "open")
    episode = await _one(function, environments=environments, retries=1)
    assert (episode.status, episode.attempts, episode.reward) == ("env_lost", 2, None)


async def test_nothing_is_sampled_after_a_loss():
    async def function(ctx: Rollout) -> float:
        env = await ctx.env()
        with contextlib.suppress(EnvLost):
            await env.step()
        for _ in range(3):
            with contextlib.suppress(EnvLost):
                await ctx.turn()
        return 1.0

    policy = _policy()
    assert (await _one(function, policy, environments=FakeEnvironments(losses=1), retries=0)).status == "env_lost"
    assert policy.requests == []


@pytest.mark.parametrize("end", ["return", "raise", "hang", "truncated", "service", "lost"])
async def test_environments_are_closed_however_the_episode_ends(end: str):
    environments = FakeEnvironments(losses=99 if end == "lost" else 0)

    async def function(ctx: Rollout) -> None:
        env = await ctx.env()
        await ctx.fork().env()
        if end == "hang":
            await _forever()
        if end == "raise":
            raise ValueError("x")
        if end == "lost":
            await env.step()
        await ctx.turn()
        if end == "truncated":
            await ctx.turn()

    policy = _policy(lambda *_: ServiceError("x") if end == "service" else "x" * 9)
    running = runner_of(function, environments=environments, timeout=0.1 if end == "hang" else 30.0)
    try:
        episodes = await running.run(policy, group(n=2, max_tokens=9))
    except ServiceError:
        assert end == "service"
    else:
        assert {e.status for e in episodes} == {
            {"return": "truncated", "raise": "aborted", "hang": "timeout", "lost": "env_lost"}.get(end, end)
        }
    assert len(environments.sessions) >= 4 or end == "service"
    assert {s.closed for s in environments.sessions} == {1}
    assert _nothing_left()


async def test_an_environment_that_does_not_close_is_left_with_a_note(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(state_module, "CLOSE_TIMEOUT_S", 0.05)

    async def function(ctx: Rollout) -> float:
        await ctx.env("maze")
        await ctx.turn()
        return 1.0

    episode = await _one(function, environments=FakeEnvironments(hang_on_close=True))
    assert (episode.status, episode.reward) == ("ok", 1.0)
    assert episode.error == "maze did not close within 0.05 s"


async def test_an_environment_opened_after_the_end_is_closed_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner_module, "GRACE_S", 0.05)
    environments, contexts = FakeEnvironments(), []

    async def function(ctx: Rollout) -> float:
        contexts.append(ctx)
        await ctx.turn()
        return 1.0

    await _one(function, environments=environments)
    with pytest.raises(asyncio.CancelledError):
        await contexts[0].env()
    assert environments.sessions == []


async def test_a_reward_after_the_end_changes_nothing():
    late = []

    async def function(ctx: Rollout) -> None:
        late.append(ctx)
        await ctx.turn()

    episode = await _one(function)
    late[0].reward(1.0)
    late[0].metric("m", 1.0)
    assert (episode.step_rewards, episode.metrics) == ((), {})


# --- the service, and being cancelled


@pytest.mark.parametrize("error", [ServiceError("x"), ServiceUnavailable("x"), DeadlineExceeded("x")])
@pytest.mark.parametrize("swallow", [True, False])
async def test_a_failure_of_the_service_ends_the_group(error: Exception, swallow: bool):
    async def function(ctx: Rollout) -> float:
        try:
            await ctx.turn()
        except Exception:  # what a careless function would do
            if not swallow:
                raise
        return 1.0

    policy = _policy(lambda number, *_: error if number == 1 else SAID)
    with pytest.raises(type(error)):
        await runner_of(function).run(policy, group(n=3))
    assert _nothing_left()


async def test_a_failure_of_the_service_cancels_the_other_episodes():
    cancelled = []

    async def function(ctx: Rollout) -> None:
        if ctx.index == 0:
            await ctx.turn()
        try:
            await _forever()
        except asyncio.CancelledError:
            cancelled.append(ctx.index)
            raise

    async with asyncio.timeout(60):
        with pytest.raises(ServiceError):
            await runner_of(function).run(_policy(lambda *_: ServiceError("x")), group(n=3))
    assert sorted(cancelled) == [1, 2]


async def test_a_template_that_cannot_be_bridged_ends_the_group_with_the_key():
    async def function(ctx: Rollout) -> None:
        await ctx.turn()
        ctx.observe(USER)

    chat = chat_of("qwen3", "qwen3")
    with pytest.raises(ConfigError, match="qwen3_training"):
        await runner_of(function, chat=chat).run(Policy(chat, [SAID]), group(chat=chat))


async def test_a_group_that_is_cancelled_cancels_everything():
    environments = FakeEnvironments()

    async def function(ctx: Rollout) -> None:
        await ctx.env()
        await ctx.turn()

    policy = _policy()
    policy.gate.clear()
    running = asyncio.create_task(runner_of(function, environments=environments).run(policy, group(n=2)))
    await policy.asked(2)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert sorted(policy.cancelled) == ["g:0.0.0", "g:1.0.0"]
    assert [s.closed for s in environments.sessions] == [1, 1]
    assert _nothing_left()


async def test_environments_are_closed_also_when_the_cancellation_comes_twice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner_module, "GRACE_S", 60.0)
    environments, cleaning = FakeEnvironments(), asyncio.Event()

    async def function(ctx: Rollout) -> None:
        await ctx.env()
        try:
            await ctx.turn()
        finally:
            cleaning.set()
            await asyncio.sleep(0.1)

    policy = _policy()
    policy.gate.clear()
    running = asyncio.create_task(runner_of(function, environments=environments).run(policy, group()))
    await policy.asked(1)
    running.cancel()
    await cleaning.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [s.closed for s in environments.sessions] == [1]
    assert _nothing_left()


async def test_what_one_episode_does_to_its_task_is_not_seen_by_another():
    async def function(ctx: Rollout) -> float:
        ctx.task["prompt"][0]["content"] += "!"
        ctx.task["tests"].append(1)
        await ctx.turn()
        ctx.messages[0]["content"] = "changed"
        return len(ctx.task["tests"])

    policy, request = _policy(), group(n=2, columns={"tests": []})
    episodes = await runner_of(function).run(policy, request)
    assert [e.reward for e in episodes] == [1.0, 1.0]
    assert (request.prompt, request.columns) == ([{"role": "user", "content": "hi"}], {"tests": []})


async def test_an_error_of_the_endpoint_decides_even_where_the_agent_swallows_it():
    async def function(ctx: Rollout) -> float:
        await ctx.turn()
        ctx.fail(KeyError("broken"))
        return 1.0

    episode = await _one(function)
    assert (episode.status, episode.reward) == ("aborted", None)
    assert "broken" in episode.error


class _Endpoint:
    def __init__(self) -> None:
        self.known: list[Rollout] = []
        self.gone: list[Rollout] = []

    def register(self, ctx: Rollout) -> Any:
        self.known += [ctx] if ctx not in self.known else []
        return type("E", (), {"base_url": "http://x/v1", "api_key": f"k{self.known.index(ctx)}"})()

    def unregister(self, ctx: Rollout) -> None:
        self.gone.append(ctx)


@pytest.mark.parametrize("end", ["return", "hang"])
async def test_the_endpoint_forgets_an_episode_that_ended(end: str):
    endpoint = _Endpoint()

    async def function(ctx: Rollout) -> None:
        sub = ctx.fork()
        assert (ctx.openai.api_key, sub.openai.api_key, ctx.openai.api_key) == ("k0", "k1", "k0")
        await ctx.turn()
        if end == "hang":
            await _forever()

    episode = await _one(function, endpoint=endpoint, timeout=0.1 if end == "hang" else 30.0)
    assert episode.status == {"return": "ok", "hang": "timeout"}[end]
    assert endpoint.gone == endpoint.known
    assert len(endpoint.gone) == 2
    with pytest.raises(RuntimeError, match="over"):
        _ = endpoint.known[0].openai


# --- what the rewards get


@pytest.mark.parametrize(("prompt", "completion"), [("hi", "four and four"), ([USER], [{"role": "assistant", "content": "four and four"}])])  # fmt: skip
async def test_the_completion_of_token_ids_is_their_text(prompt: Any, completion: Any):
    async def function(ctx: Rollout) -> float:
        first = await ctx.generate([1, 2])
        more = ctx.chat.tokenizer.encode(" and ", add_special_tokens=False)
        await ctx.generate([1, 2, *first.ids.tolist(), *more])
        await ctx.generate([9])
        return 1.0

    episode = await _one(function, _policy(lambda *_: "four"), group(prompt))
    assert episode.completion == completion
    assert episode.text == "fourfourfour"
    assert [row.prompt_ids.tolist() for row in episode.rows] == [[1, 2], [9]]


async def test_the_function_says_what_the_rewards_get():
    async def function(ctx: Rollout) -> None:
        await ctx.turn()
        ctx.completion = "summary"

    assert (await _one(function)).completion == "summary"


async def test_rows_that_were_never_sampled_are_dropped():
    async def function(ctx: Rollout) -> None:
        ctx.fork().start([USER])
        await ctx.turn()

    episode = await _one(function)
    assert len(episode.rows) == 1
    assert episode.completion == [{"role": "assistant", "content": "four"}]


async def test_episodes_cross_the_wire():
    async def function(ctx: Rollout) -> float:
        await ctx.turn()
        ctx.observe({"role": "user", "content": "sure?"})
        await ctx.turn()
        sub = ctx.fork()
        sub.start([USER, USER])
        await sub.turn()
        ctx.reward(1, turn=1)
        return 0.5

    episodes = tuple(await runner_of(function).run(_policy(), group(n=2)))
    scores = (RewardOutcome("r", np.asarray([1, 2], np.float32), 0.1),)
    result = GroupResult.decode(GroupResult("g", episodes, scores, "w", 0.1, 0.1).encode())
    for there, here in zip(result.episodes, episodes, strict=True):
        assert (there.reward, there.completion, there.step_rewards) == (0.5, here.completion, here.step_rewards)
        for one, other in zip(there.rows, here.rows, strict=True):
            assert np.array_equal(one.ids, other.ids)
            assert np.array_equal(one.logprobs, other.logprobs, equal_nan=True)
            assert one.versions == other.versions
