"""The contract of reward functions: what they get, what they may return, what their author is told."""

import asyncio
import math
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlx.episode import CONTEXT, Episode, Row
from rlx.errors import UserCodeError
from rlx.rewards.scoring import (
    Reward,
    RewardWorker,
    ScoreRequest,
    load_reward,
    read_values,
    score_group,
)
from rlx.wire import GroupRequest, Sampling

KEY = "trl.reward_funcs[0]"
REQUEST = ScoreRequest(
    prompt="2+2=",
    completions=["4", "5", "four", ""],
    completion_ids=[[4, 0], [5, 0], [6, 7, 0], [0]],
    columns={"answer": "4", "level": 1},
    max_completion_length=8,
    step=7,
)
CHAT = ScoreRequest(
    prompt=[{"role": "user", "content": "2+2?"}],
    completions=[[{"role": "assistant", "content": text}] for text in ("4", "5")],
    completion_ids=[[4], [5]],
    step=1,
)


def load(folder: Path, source: str, name: str = "rewards.f") -> Reward:
    (folder / "rewards.py").write_text(source)
    return load_reward(name, folder, KEY)


def worker(folder: Path, source: str) -> RewardWorker:
    (folder / "rewards.py").write_text(source)
    return RewardWorker("rewards.f", 2, folder)


def refusal(reward: Reward, request: ScoreRequest = REQUEST) -> str:
    with pytest.raises(UserCodeError) as caught:
        score_group(reward, request)
    text = str(caught.value)
    assert text.startswith(f"{KEY} (rewards.f) ")
    return text


def test_the_documented_reward_function_scores(tmp_path):
    source = (
        "import random\n"
        "def rand_reward_func(completions, **kwargs) -> list[float]:\n"
        " return [random.uniform(0, 1) for _ in completions]\n"
    )
    scores = score_group(load(tmp_path, source, "rewards.rand_reward_func"), REQUEST)
    assert scores.dtype == np.float32
    assert scores.shape == (4,)
    assert np.all((scores >= 0) & (scores <= 1))


def test_the_reward_of_the_documented_rollout_example_scores(tmp_path):
    source = (
        "import re\n"
        "def math_reward(prompts, completions, answers, **kwargs):\n"
        "  rewards = []\n"
        "  for completion, correct_answer in zip(completions, answers):\n"
        "    match = re.search(r'FINAL ANSWER:\\s*(.+)', completion)\n"
        "    predicted = match.group(1).strip() if match else ''\n"
        "    rewards.append(1.0 if predicted == str(correct_answer) else 0.0)\n"
        "  return rewards\n"
    )
    request = ScoreRequest("6*7?", ["FINAL ANSWER: 42", "42"], [[1], [2]], {"answers": 42})
    assert score_group(load(tmp_path, source, "rewards.math_reward"), request).tolist() == [1, 0]


def test_functions_get_every_argument_of_the_contract_repeated_for_the_group(tmp_path):
    reward = load(tmp_path, "seen = {}\ndef f(**kwargs):\n  seen.update(kwargs)\n  return [0] * 4")
    score_group(reward, REQUEST)
    seen = reward.function.__globals__["seen"]
    assert seen["prompts"] == ["2+2="] * 4
    assert seen["completions"] == ["4", "5", "four", ""]
    assert seen["completion_ids"] == [[4, 0], [5, 0], [6, 7, 0], [0]]
    assert seen["answer"] == ["4"] * 4
    assert seen["level"] == [1] * 4
    assert seen["max_completion_length"] == 8
    assert seen["trainer_state"].global_step == 7
    assert set(seen) == {
        "prompts", "completions", "completion_ids", "answer", "level", "max_completion_length", "trainer_state",
        "log_extra", "log_metric",
    }  # fmt: skip


def test_environments_have_attributes_and_say_what_there_is(tmp_path):
    source = "def f(environments):\n    return [e.total + e['total'] for e in environments]\n"
    source += "def g(environments):\n    return [e.client for e in environments]\n"
    (tmp_path / "mine.py").write_text(source)
    request = ScoreRequest("p", ["c"], [[0]], own_columns={"environments": [{"total": 2, "done": True}]})
    assert score_group(load_reward("mine.f", tmp_path, "key"), request).tolist() == [4.0]
    with pytest.raises(UserCodeError, match=r"'client' is not here.* that are JSON: done, total"):
        score_group(load_reward("mine.g", tmp_path, "key"), request)


def test_chat_prompts_give_chat_completions(tmp_path):
    reward = load(tmp_path, "def f(prompts, completions): return [float(c[0]['content']) for c in completions]")
    assert score_group(reward, CHAT).tolist() == [4, 5]
    assert score_group(load_reward("rlx.rewards.format.think", tmp_path, KEY), CHAT).tolist() == [0, 0]


@pytest.mark.parametrize(
    "source",
    [
        "def f(completions): return [1, 2, 3, 4]",
        "def f(completions, /): return [1, 2, 3, 4]",
        "def f(prompts, completions, answer): return [1, 2, 3, int(answer[3])]",
        "def f(prompts, /, *args, missing=4, **kwargs):\n"
        "  assert 'prompts' not in kwargs and len(kwargs['completions']) == 4\n  return [1, 2, 3, missing]",
        "async def f(completions, **kwargs):\n  import asyncio\n  await asyncio.sleep(0)\n  return [1, 2, 3, 4]",
        "async def g(): return [1, 2, 3, 4]\ndef f(completions): return g()",
        "class Judge:\n  def __call__(self, completions): return [1, 2, 3, 4]\nf = Judge()",
        "class Judge:\n  async def __call__(self, completions): return [1, 2, 3, 4]\nf = Judge()",
        "import functools\ndef g(completions, best, **kw): return [1, 2, 3, best]\nf = functools.partial(g, best=4)",
        "def f(completions): return (1, 2.0, 3, 4)",
        "import numpy as np\ndef f(completions): return np.arange(1, 5)",
        "import numpy as np\ndef f(completions): return [np.float32(1), np.int64(2), 3, np.array(4)]",
        "import torch\ndef f(completions): return torch.arange(1, 5, dtype=torch.bfloat16)",
        "import torch\ndef f(completions): return [torch.tensor(float(i), requires_grad=True) for i in range(1, 5)]",
    ],
)
def test_every_sensible_function_scores(tmp_path, source):
    assert score_group(load(tmp_path, source), REQUEST).tolist() == [1, 2, 3, 4]


def test_none_is_nan_and_booleans_are_numbers(tmp_path):
    scores = score_group(load(tmp_path, "def f(completions): return [None, True, False, 0.5]"), REQUEST)
    assert math.isnan(scores[0])
    assert scores[1:].tolist() == [1, 0, 0.5]


def test_a_missing_column_is_named_with_those_that_there_are(tmp_path):
    text = refusal(load(tmp_path, "def f(completions, anwser): return [0] * 4"))
    assert "asks for 'anwser'" in text
    assert "Columns: answer, level." in text
    assert "Did you mean 'answer'?" in text
    assert text.endswith("Rename the parameter, or have the transform return 'anwser'.")


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        ("[1, 2, 3]", "returned 3 values for 4 completions. Return one for each."),
        ("[]", "returned 0 values for 4 completions. Return one for each."),
        ("[1, 2, 3, 4, 5]", "returned 5 values for 4 completions. Return one for each."),
        ("None", "returned None (a value of type NoneType). Return a list with one number or None per completion."),
        ("1.0", "returned 1.0 (a value of type float). Return a list with one number or None per completion."),
        ("'abcd'", "returned 'abcd' (a value of type str). Return a list with one number or None per completion."),
        ("{1: 1}", "returned {1: 1} (a value of type dict). Return a list with one number or None per completion."),
        ("[1, 'x', 3, 4]", "returned 'x' (a value of type str) for completion 1. Return a number or None."),
        ("[[1], [2], [3], [4]]", "returned [1] (a value of type list) for completion 0. Return a number or None."),
        ("[1, 2, 1j, 4]", "returned 1j (a value of type complex) for completion 2. Return a number or None."),
        (
            "[1, 2, 3, float('nan')]",
            "returned nan for completion 3. Return a finite number, or None if not",
        ),
        ("[1, -float('inf'), 3, 4]", "returned -inf for completion 1. Return a finite number, or None"),
        ("[1e39, 2, 3, 4]", "returned 1e+39 for completion 0. Return a finite number, or None"),
        ("[10**400, 2, 3, 4]", "for completion 0. Return a finite number, or None"),
    ],
)
def test_a_broken_contract_is_explained(tmp_path, returned, told):
    assert told in refusal(load(tmp_path, f"def f(completions): return {returned}"))


def test_a_generator_is_not_a_list(tmp_path):
    assert "a value of type generator" in refusal(load(tmp_path, "def f(completions):\n  yield from [1, 2, 3, 4]"))


@pytest.mark.parametrize("prefix", ["", "async "])
def test_an_error_in_the_function_shows_the_traceback_of_its_author(tmp_path, prefix):
    source = f"def deep(x):\n  return 1 / 0\n{prefix}def f(completions):\n  return [deep(c) for c in completions]"
    text = refusal(load(tmp_path, source))
    assert "raised ZeroDivisionError.\nTraceback (most recent call last):\n" in text
    assert f'File "{tmp_path}/rewards.py", line 4, in f' in text
    assert f'File "{tmp_path}/rewards.py", line 2, in deep' in text
    assert text.endswith("ZeroDivisionError: division by zero")
    assert "scoring.py" not in text
    assert "asyncio" not in text


@pytest.mark.parametrize("body", ["c.strip()", "re.search('4', c)"])
def test_text_functions_on_chat_completions_are_told_where_the_text_is(tmp_path, body):
    reward = load(tmp_path, f"import re\ndef f(completions): return [bool({body}) for c in completions]")
    with pytest.raises(UserCodeError, match=r'the text of one is `completion\[0\]\["content"\]`\.$'):
        score_group(reward, CHAT)


def test_a_function_that_exits_is_an_error_and_not_an_exit(tmp_path):
    assert "raised SystemExit" in refusal(load(tmp_path, "def f(completions): raise SystemExit(3)"))


def test_errors_survive_pickling_with_their_text(tmp_path):
    reward = load(tmp_path, "def f(completions): return [1]")
    with pytest.raises(UserCodeError) as caught:
        score_group(reward, REQUEST)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is UserCodeError
    assert str(again) == str(caught.value)


def test_classes_and_functions_without_a_signature_are_refused(tmp_path):
    with pytest.raises(UserCodeError, match="is a class"):
        load(tmp_path, "class f:\n  pass")
    with pytest.raises(UserCodeError, match="does not tell its parameters"):
        load_reward("builtins.max", tmp_path, KEY)


def test_a_module_stands_for_its_function_called_reward(tmp_path):
    assert load(tmp_path, "def reward(completions): return [0] * 4", "rewards").function.__name__ == "reward"
    for name, function in [("math", "accuracy"), ("format", "think"), ("length", "soft_overlong")]:
        assert load_reward(f"rlx.rewards.{name}", tmp_path, KEY).function.__name__ == function


def test_log_metric_averages_and_log_extra_keeps_columns(tmp_path):
    source = (
        "def f(completions, log_metric, log_extra):\n"
        "  log_metric('short', 1); log_metric('short', 0); log_metric('long', 3)\n"
        "  log_extra('seen', completions)\n"
        "  return [0] * 4"
    )
    outcome, metrics = worker(tmp_path, source).score(REQUEST)
    assert metrics == {"short": 0.5, "long": 3.0}
    assert outcome.extra == {"seen": ["4", "5", "four", ""]}


def test_log_extra_wants_a_value_for_each_completion(tmp_path):
    text = refusal(load(tmp_path, "def f(completions, log_extra):\n  log_extra('seen', [1])\n  return [0] * 4"))
    assert "log_extra('seen'): 1 values for 4 completions" in text


def test_a_worker_scores_groups_and_reports_what_each_one_logged(tmp_path):
    source = (
        "def f(completions, log_metric, **kwargs):\n"
        "  if len(completions) == 4: log_metric('four', 4)\n"
        "  return [len(c) for c in completions]"
    )
    scoring = worker(tmp_path, source)
    began = time.perf_counter()
    outcome, metrics = scoring.score(REQUEST)
    took = time.perf_counter() - began
    assert (outcome.name, outcome.outcome, outcome.failed, outcome.error) == ("rewards.f", "ok", 0, "")
    assert outcome.values.tolist() == [1, 1, 4, 0]
    assert 0 < outcome.seconds <= took
    assert metrics == {"four": 4.0}
    assert scoring.score(CHAT)[1] == {}
    assert scoring.reward.key == "trl.reward_funcs[2]"
    scoring.close()


def test_a_worker_keeps_one_event_loop_so_that_clients_stay_usable(tmp_path):
    source = (
        "import asyncio\nlock = asyncio.Lock()\nloops = []\n"
        "async def f(completions):\n"
        "  loops.append(asyncio.get_running_loop())\n"
        "  async with lock: return [len(set(map(id, loops)))] * 4"
    )
    scoring = worker(tmp_path, source)
    assert [scoring.score(REQUEST)[0].values[0] for _ in range(3)] == [1, 1, 1]
    scoring.close()


@pytest.mark.parametrize(
    ("body", "outcome", "failed", "values", "told"),
    [
        ("raise KeyError('x')", "exception", 4, [None] * 4, "raised KeyError.\nTraceback"),
        ("raise KeyboardInterrupt", "exception", 4, [None] * 4, "raised KeyboardInterrupt.\nTraceback"),
        ("import asyncio; raise asyncio.CancelledError", "exception", 4, [None] * 4, "raised CancelledError."),
        ("raise SystemExit(3)", "exception", 4, [None] * 4, "raised SystemExit.\nTraceback"),
        ("return [1, 2, 3]", "invalid", 4, [None] * 4, "returned 3 values for 4 completions."),
        ("return 'abcd'", "invalid", 4, [None] * 4, "returned 'abcd' (a value of type str)."),
        ("return [1, float('nan'), None, {2}]", "invalid", 2, [1, None, None, None], "returned nan for completion 1."),
        ("return [1, 2, 3, '{4}']", "invalid", 1, [1, 2, 3, None], "returned '{4}' (a value of type str) for"),
        ("return [10**5000, 2, 3, 4]", "exception", 4, [None] * 4, "raised ValueError.\nValueError: Exceeds"),
        ("return [None] * 4", "ok", 0, [None] * 4, ""),
    ],
)
@pytest.mark.parametrize("prefix", ["", "async "])
async def test_what_one_call_does_wrong_is_its_outcome(tmp_path, prefix, body, outcome, failed, values, told):
    scoring = worker(tmp_path, f"{prefix}def f(completions):\n  {body}")
    said, _ = await scoring.score_beside(REQUEST, 30) if prefix else scoring.score(REQUEST)
    assert (said.outcome, said.failed) == (outcome, failed)
    assert [None if math.isnan(v) else v for v in said.values] == values
    assert told in said.error
    assert said.error.startswith("trl.reward_funcs[2] (rewards.f) ") == bool(told)
    scoring.close()


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def f(gold): return [0] * 4", "asks for 'gold'"),
        ("async def f(gold): return [0] * 4", "asks for 'gold'"),
        ("import rlx.errors\ndef f(completions): raise rlx.errors.UserCodeError('needs gold')", "needs gold"),
    ],
)
async def test_what_no_other_call_will_do_better_is_an_error(tmp_path, source, told):
    scoring = worker(tmp_path, source)
    with pytest.raises(UserCodeError, match=r"trl\.reward_funcs\[2\] \(rewards\.f\) .*" + told):
        await scoring.score_beside(REQUEST, 30) if scoring.reward.is_async else scoring.score(REQUEST)
    scoring.close()


async def test_groups_beside_each_other_keep_their_logs_and_deadlines_apart(tmp_path):
    source = (
        "import asyncio\nboth = asyncio.Barrier(2)\n"
        "async def f(completions, trainer_state, log_metric, log_extra):\n"
        "  step = trainer_state.global_step\n"
        "  log_metric('step', step)\n"
        "  if step == 3: await asyncio.sleep(60)\n"
        "  await both.wait()\n"
        "  log_extra('step', [step] * len(completions))\n"
        "  return [step] * len(completions)"
    )
    scoring = worker(tmp_path, source)
    groups = [ScoreRequest("p", ["a", "b"], [[1], [2]], step=step) for step in (1, 2, 3)]
    said = await asyncio.gather(*(scoring.score_beside(g, 0.3 if g.step == 3 else 30) for g in groups))
    assert [outcome.outcome for outcome, _ in said] == ["ok", "ok", "timeout"]
    assert [outcome.extra for outcome, _ in said] == [{"step": [1, 1]}, {"step": [2, 2]}, {}]
    assert [metrics for _, metrics in said] == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert said[2][0].error.endswith("did not answer within 0.3 s (rewards.timeout) and was cancelled.")
    scoring.close()


async def test_a_timeout_of_the_users_own_is_an_exception(tmp_path):
    source = "import asyncio\nasync def f(completions):\n  async with asyncio.timeout(0): await asyncio.sleep(9)"
    scoring = worker(tmp_path, source)
    assert (await scoring.score_beside(REQUEST, 30))[0].outcome == "exception"
    scoring.close()


def episode(*parts: tuple[list[int], bool], text: str, **more) -> Episode:
    """One row of the parts (ids, sampled)."""
    ids = np.array([i for part, _ in parts for i in part], dtype=np.int32)
    versions = tuple((1 if sampled else CONTEXT, len(part)) for part, sampled in parts)
    return Episode((Row(ids, np.zeros(len(ids), np.float32), versions),), text, **more)


def test_a_request_is_made_of_what_came_over_the_wire():
    group = GroupRequest("k", "2+2=", np.array([1, 2]), 2, Sampling(max_tokens=8), {"answer": "4"}, step=3)
    episodes = [
        episode(([4, 0], True), text="4", extra={"moves": 2}),
        episode(([5], True), ([8, 8], False), ([6], True), text="56", completion="5, then 6"),
    ]
    assert ScoreRequest.of(group, episodes) == ScoreRequest(
        prompt="2+2=",
        completions=["4", "5, then 6"],
        completion_ids=[[4, 0], [5, 6]],
        columns={"answer": "4"},
        max_completion_length=8,
        step=3,
        own_columns={"moves": [2, None]},
    )


def test_the_text_of_a_chat_episode_is_a_message_unless_it_says_otherwise():
    group = GroupRequest("k", [{"role": "user", "content": "2+2?"}], np.array([1]), 2, Sampling(max_tokens=8))
    told = [{"role": "tool", "content": "4"}]
    request = ScoreRequest.of(group, [episode(([4], True), text="4"), episode(([4], True), text="4", completion=told)])
    assert request.completions == [[{"role": "assistant", "content": "4"}], told]


def test_scoring_loads_neither_torch_nor_ray():
    code = "import sys, rlx.rewards.scoring; print({'torch','vllm','ray'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert run.stdout.strip() == "set()"


PROBE = Reward("rewards.f", KEY, len, False, ())
FINITE = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(width=32, allow_nan=False, allow_infinity=False)
)
ANYTHING = FINITE | st.floats() | st.text(max_size=3) | st.lists(st.integers(), max_size=2) | st.complex_numbers()
AS_RETURNED = st.sampled_from([list, tuple, lambda v: np.array(v, dtype=object)])


@given(values=st.lists(FINITE, max_size=6), as_returned=AS_RETURNED)
def test_valid_values_come_back_as_they_are(values, as_returned):
    said = read_values(PROBE, as_returned(values), len(values))
    assert said.outcome == "ok"
    assert said.values.dtype == np.float32
    assert [None if math.isnan(s) else s for s in said.values] == [None if v is None else np.float32(v) for v in values]


@given(values=st.lists(ANYTHING, max_size=6), num_completions=st.integers(0, 6))
def test_whatever_a_function_returns_is_scores_or_an_explained_failure(values, num_completions):
    def valid(v: object) -> bool:
        return isinstance(v, bool | int | float) and abs(v) <= float(np.finfo(np.float32).max)

    said = read_values(PROBE, values, num_completions)
    whole = len(values) == num_completions
    expected = values if whole else [None] * num_completions
    assert [not math.isnan(v) for v in said.values] == [valid(v) for v in expected]
    assert said.failed == (sum(v is not None and not valid(v) for v in values) if whole else num_completions)
    assert said.outcome == ("ok" if whole and not said.failed else "invalid")
    assert said.error.startswith(f"{KEY} (rewards.f) returned ") == (said.outcome != "ok")
