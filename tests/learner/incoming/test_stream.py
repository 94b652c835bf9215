"""The prompt order is a function of seed and ticket; what rank 0 brings becomes micro-batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlx.config import Config, make_plan
from rlx.episode import CONTEXT, Episode, Row
from rlx.errors import ServiceError
from rlx.learner.incoming.data import Prompt
from rlx.learner.incoming.requests import PromptOrder, requests_of, sampling_of, ticket_request
from rlx.learner.incoming.scored_groups import has_spread, reward_weights_of
from rlx.learner.incoming.stream import Fetched, RolloutStream, StepBatch
from rlx.learner.microbatches.batching import MicroBatch
from rlx.learner.ranks import Ranks
from rlx.learner.watch.report import sample_records
from rlx.learner.watch.step_metrics import step_metrics
from rlx.wire import GroupRequest, GroupResult, RewardOutcome


@given(num_prompts=st.integers(1, 50), seed=st.integers(0, 5), shuffle=st.booleans(), epoch=st.integers(0, 3))
def test_every_epoch_is_every_prompt_once_and_the_next_begins_at_once(num_prompts, seed, shuffle, epoch):
    order = PromptOrder(num_prompts, seed, shuffle)
    first = epoch * num_prompts
    assert sorted(order.at(ticket) for ticket in range(first, first + num_prompts)) == list(range(num_prompts))


def test_the_order_depends_on_seed_and_epoch_only():
    def epoch(number: int, seed: int) -> list[int]:
        order = PromptOrder(100, seed, shuffle=True)
        return [order.at(100 * number + place) for place in range(100)]

    assert epoch(3, seed=1) == epoch(3, seed=1)
    assert epoch(3, seed=1) != epoch(3, seed=2)
    assert epoch(3, seed=1) != epoch(4, seed=1)
    unshuffled = PromptOrder(100, seed=1, shuffle=False)
    assert [unshuffled.at(ticket) for ticket in (98, 99, 100, 101)] == [98, 99, 0, 1]


def config(**trl: object) -> Config:
    return Config.model_validate(
        {
            "base_model": "m",
            "rl": "grpo",
            "datasets": [{"path": "d"}],
            "micro_batch_size": 2,
            "trl": {"num_generations": 4, "max_completion_length": 8, "reward_funcs": ["r"], **trl},
        }
    )


def group(key: str, rewards: list[float], lengths: list[int], finish: str = "stop") -> GroupResult:
    status = "truncated" if finish == "length" else "ok"
    episodes = tuple(
        Episode((Row(np.arange(n, dtype=np.int32), np.full(n, -0.5, np.float32), ((1, n),)),), "x", status)
        for n in lengths
    )
    return GroupResult(key, episodes, (RewardOutcome("r", np.array(rewards, np.float32), 0.1),), "w", 0.1, 0.1)


def make_stream(settings: Config, fetch, on_step=lambda batch: None, steps: int = 2) -> RolloutStream:
    prompts = [Prompt(f"p{i}", np.array([1, 2, 3], np.int32), {}) for i in range(3)]
    return RolloutStream(settings, make_plan(settings), Ranks(10), prompts, lambda: 0, steps, fetch, on_step)


def test_a_step_becomes_micro_batches_with_the_groups_advantages():
    seen: list[StepBatch] = []
    rewards = [1.0, 0.0, 0.0, 1.0]
    settings = config()
    stream = make_stream(
        settings, lambda step: Fetched((step,), [group(f"{step}", rewards, [1, 2, 3, 4])]), seen.append
    )
    batches = [item["micro_batch"] for item in stream]
    assert [b.step for b in seen] == [0, 1]
    assert len(batches) == 2 * make_plan(settings).gradient_accumulation_steps == 4
    of_first = batches[:2]
    assert sum(b.lengths_B.sum().item() for b in of_first) == 10
    advantage_of_length = {
        int(n): float(b.advantages_T[b.row_T == row][0]) for b in of_first for row, n in enumerate(b.lengths_B)
    }
    expected = 0.5 / (torch.tensor(rewards).std().item() + 1e-4)
    assert {n: round(a, 4) for n, a in advantage_of_length.items()} == {
        1: round(expected, 4), 2: round(-expected, 4), 3: round(-expected, 4), 4: round(expected, 4)
    }  # fmt: skip
    assert torch.cat([b.weights_T for b in of_first]).sum().item() == pytest.approx(1.0)


def test_context_and_what_was_not_trained_has_no_log_probability_of_the_learner() -> None:
    """Of four completions three are shown; the second has unusable log-probabilities, the third context inside."""
    found = group("0", [1.0, 0.0, 0.0, 1.0], [1, 2, 5, 4])
    found.episodes[1].rows[0].logprobs[0] = np.inf
    inside = np.array([-0.5, np.nan, np.nan, -0.5, -0.5], np.float32)
    spoken = Row(np.arange(5, dtype=np.int32), inside, ((1, 1), (CONTEXT, 2), (2, 2)))
    object.__setattr__(found.episodes[2], "rows", (spoken,))
    settings, seen = config().model_copy(update={"samples_per_step": 3}), list[StepBatch]()
    stream = make_stream(settings, lambda step: Fetched((step,), [found]), seen.append, steps=1)
    for item in stream:
        ids_T = item["micro_batch"].target_ids_T
        stream.keep_logprobs(item["samples"], -ids_T.float())
    written = [sample["rows"][0] for sample in sample_records(seen[0], 3, stream.shown_logprobs())]
    assert [row.get("learner_logprobs") for row in written] == [[0.0], None, [0.0, None, None, -3.0, -4.0]]
    assert all("learner_logprobs" not in s["rows"][0] for s in sample_records(seen[0], 4, {}))


def test_a_batch_for_several_steps_is_cut_once_and_scored_before_the_first_of_them():
    """16 completions of lengths 1 to 16, two steps a pass, two passes."""
    settings = config(num_iterations=2, steps_per_generation=8, max_completion_length=16)
    settings = settings.model_copy(update={"gradient_accumulation_steps": 4})
    groups = [group(str(n), [1.0, 0.0, 0.0, 1.0], list(range(4 * n + 1, 4 * n + 5))) for n in range(4)]
    scored: list[int] = []

    def old_logprobs(batch: MicroBatch) -> torch.Tensor:
        scored.append(len(seen))
        return -batch.lengths_B.repeat_interleave(batch.lengths_B).float()

    seen: list[StepBatch] = []
    prompts = [Prompt(f"p{i}", np.array([1, 2, 3], np.int32), {}) for i in range(4)]
    stream = RolloutStream(
        settings, make_plan(settings), Ranks(10), prompts, lambda: 0, 4,
        lambda step: Fetched((0, 1, 2, 3), groups) if step == 0 else Fetched((), []), seen.append,
        old_logprobs=old_logprobs,
    )  # fmt: skip
    steps: list[list[MicroBatch]] = [[] for _ in range(4)]
    for item in stream:
        steps[len(seen) - 1].append(item["micro_batch"])
    assert scored == [1] * 8
    assert [(batch.step, batch.is_reused) for batch in seen] == [(0, False), (1, True), (2, True), (3, True)]
    lengths = [sorted(n for part in step for n in part.lengths_B.tolist()) for step in steps]
    assert lengths[0] == lengths[2] != lengths[1] == lengths[3]
    assert sorted(lengths[0] + lengths[1]) == list(range(1, 17))
    assert lengths[0] != list(range(1, 9)), "the rows are mixed"
    for step in steps:
        for part in step:
            assert part.old_logprobs_T.tolist() == (-part.lengths_B.repeat_interleave(part.lengths_B)).tolist()
            torch.testing.assert_close(part.weights_T, torch.full_like(part.weights_T, 2 / sum(range(1, 17))))


def test_truncated_completions_can_be_left_out_of_the_loss():
    settings = config(mask_truncated_completions=True)
    stream = make_stream(
        settings, lambda step: Fetched((0,), [group("0", [1.0, 0, 0, 1], [8, 8, 8, 8], "length")]), steps=1
    )
    assert sum(item["micro_batch"].lengths_B.sum().item() for item in stream) == 0


def row(*versions: tuple[int, int], prompt: list[int] | None = None) -> Row:
    size = sum(n for _, n in versions)
    ids = np.arange(10, 10 + size, dtype=np.int32)
    return Row(ids, -ids.astype(np.float32), versions, None if prompt is None else np.array(prompt, np.int32))


def test_every_row_of_an_episode_trains_its_sampled_tokens_with_the_episodes_advantage():
    two_turns = Episode((row((1, 2), (-1, 3), (1, 1), (-1, 4)),), "")
    two_rows = Episode((row((1, 3)), row((2, 2), prompt=[7])), "")
    lost = Episode((row((1, 5)),), "", "env_lost")
    never_began = Episode((), "", "aborted")
    rewards = RewardOutcome("r", np.array([1, 0, np.nan, np.nan], np.float32), 0.1)
    result = GroupResult("k", (two_turns, two_rows, lost, never_began), (rewards,), "w", 0.1, 0.1)
    settings = config(loss_type="grpo", scale_rewards="none")
    batches = [item["micro_batch"] for item in make_stream(settings, lambda step: Fetched((0,), [result]), steps=1)]

    trained = {}
    for b in batches:
        for i, n in enumerate(b.lengths_B.tolist()):
            at = b.row_T == i
            key = tuple(b.target_ids_T[at].tolist())
            trained[key] = (b.advantages_T[at].tolist(), b.weights_T[at].tolist(), b.sampling_logprobs_T[at].tolist())
            assert len(key) == n
    assert set(trained) == {(10, 11, 15), (10, 11, 12), (10, 11), ()}
    assert trained[10, 11, 15] == ([0.5] * 3, pytest.approx([1 / 12] * 3), [-10, -11, -15])
    assert trained[10, 11, 12] == ([-0.5] * 3, pytest.approx([1 / 20] * 3), [-10, -11, -12])
    assert trained[10, 11] == ([-0.5] * 2, pytest.approx([1 / 20] * 2), [-10, -11])
    prompts = {tuple(b.input_ids_BS[i, :1].tolist()) for b in batches for i in range(len(b.lengths_B))}
    assert prompts == {(1,), (7,)}
    width = max(b.input_ids_BS.shape[1] for b in batches)
    assert width == 3 + 6, "what follows the last trained token is not forwarded"


def test_a_tickets_seed_is_the_same_in_every_run_and_attempt_and_its_key_is_not():
    settings = config(generation_batch_size=8)
    plan, order = make_plan(settings), PromptOrder(3, 0, shuffle=False)
    prompts = [Prompt(f"p{i}", np.array([i + 1], np.int32), {}) for i in range(3)]

    def request(session: str, number: int, attempt: int) -> GroupRequest:
        return ticket_request(settings, plan, prompts, order, session, number, attempt)

    found = [request("a", 7, 0), request("b", 7, 0), request("a", 7, 1)]
    assert len({r.seed for r in found}) == 1
    assert [r.key for r in found] == ["a/7.0", "b/7.0", "a/7.1"]
    assert {(r.prompt, r.step, r.num_generations) for r in found} == {("p1", 3, 4)}
    assert len({request("a", number, 0).seed for number in range(9)}) == 9


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([1.0, 1, 1, 1], False), ([1.0, 1, 0, 1], True), ([1.0, np.nan, 1, np.nan], False), ([np.nan] * 4, False)],
)
def test_a_group_of_equal_rewards_has_no_spread(rewards: list[float], expected: bool):
    assert has_spread(config(), group("k", rewards, [1, 2, 3, 4])) is expected


def test_rewards_that_cancel_each_other_are_spread_only_where_each_counts_for_itself():
    first, second = [1.0, 0, 1, 0], [0.0, 1, 0, 1]
    rewards = tuple(RewardOutcome(name, np.array(v, np.float32), 0.1) for name, v in (("a", first), ("b", second)))
    both = replace(group("k", first, [1, 2, 3, 4]), rewards=rewards)
    settings = {"reward_funcs": ["a", "b"], "reward_weights": [1.0, 1.0]}
    assert not has_spread(config(**settings), both)
    assert has_spread(config(**settings, multi_objective_aggregation="normalize_then_sum"), both)


def test_the_episodes_own_reward_weighs_one_unless_it_has_a_weight():
    values = np.zeros((4, 2), np.float32)
    assert reward_weights_of(config(reward_weights=[0.5]), values).tolist() == [0.5, 1.0]
    weights = config(reward_weights=[0.5, 2.0], tools=["a.b"])
    assert reward_weights_of(weights, values).tolist() == [0.5, 2.0]


def test_the_error_of_the_service_ends_the_stream_unchanged():
    def fetch(step):
        raise ServiceError("worker rlx-rollout-0 died")

    with pytest.raises(ServiceError, match=r"^worker rlx-rollout-0 died$"):
        list(make_stream(config(), fetch))


def test_requests_carry_the_sampling_of_the_yaml_and_keys_that_never_repeat():
    settings = config(temperature=0.7, top_k=-1, generation_kwargs={"stop": "END", "min_tokens": 2})
    sampling = sampling_of(settings)
    assert (sampling.temperature, sampling.top_k, sampling.stop, sampling.extra) == (
        0.7,
        0,
        ("END",),
        {"min_tokens": 2},
    )
    prompts = [Prompt("p", np.array([1], np.int32), {"answer": "2"})] * 3
    keys = [
        request.key
        for step, label in ((0, ""), (0, "eval"), (1, ""))
        for request in requests_of(settings, prompts, "run", step, label, 4)
    ]
    assert len(set(keys)) == 9


def test_the_estimator_of_the_yaml_gives_the_advantages():
    groups = [group("a", [0.0, 2.0, 4.0, 6.0], [1, 1, 1, 1]), group("b", [1.0, 1.0, 1.0, 9.0], [1, 1, 1, 1])]
    settings = config(advantage_estimator="rloo", generation_batch_size=8)
    seen: list[StepBatch] = []
    list(make_stream(settings, lambda step: Fetched(tuple(range(len(groups))), groups), seen.append, steps=1))
    assert seen[0].advantages.advantages.tolist() == pytest.approx([-4, -4 / 3, 4 / 3, 4, -8 / 3, -8 / 3, -8 / 3, 8])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_log_probability_that_is_no_number_takes_its_completion_out_of_the_loss_only(value: float):
    groups = [group("a", [0.0, 1.0, 2.0, 3.0], [2, 2, 2, 2])]
    groups[0].episodes[1].rows[0].logprobs[0] = value
    seen: list[StepBatch] = []
    stream = make_stream(
        config(loss_type="dapo"), lambda step: Fetched(tuple(range(len(groups))), groups), seen.append, steps=1
    )
    batches = [b["micro_batch"] for b in stream]
    weights = torch.cat([b.weights_T for b in batches])
    assert weights.tolist() == pytest.approx([1 / 6] * 6)
    assert torch.cat([b.sampling_logprobs_T for b in batches]).isfinite().all()
    assert seen[0].advantages.reward_mean == 1.5
    assert step_metrics(config(), seen[0])["frac_logprobs_not_finite"] == 0.25
