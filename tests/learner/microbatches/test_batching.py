"""Cutting a step into micro-batches, and what a micro-batch holds."""

import numpy as np
import pytest
import torch

from rlx.learner.microbatches.batching import PADDED, Layout, Sample, collate
from rlx.learner.microbatches.splitting import num_tokens, split


def sample(prompt: list[int], completion: list[int], advantage: float = 0.0, masked: bool = False) -> Sample:
    logprobs = -np.arange(1, len(completion) + 1, dtype=np.float32)
    ids = np.array(prompt, np.int32), np.array(completion, np.int32)
    return Sample(*ids, logprobs, advantage, 0.25, masked)


def samples_of(lengths: list[int]) -> list[Sample]:
    return [sample([i + 1], [1] * n) for i, n in enumerate(lengths)]


def test_a_micro_batch_by_hand() -> None:
    batch = collate([sample([5, 6], [7, 8, 9], 1.5), sample([4], [3], -2.0)])
    assert batch.input_ids_BS.tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]]
    assert batch.target_ids_T.tolist() == [7, 8, 9, 3]
    assert batch.row_T.tolist() == [0, 0, 0, 1]
    assert batch.col_T.tolist() == [1, 2, 3, 0]
    assert batch.lengths_B.tolist() == [3, 1]
    assert batch.sampling_logprobs_T.tolist() == [-1, -2, -3, -1]
    assert batch.advantages_T.tolist() == [1.5, 1.5, 1.5, -2]
    assert batch.weights_T.tolist() == [0.25] * 4
    assert batch.first_col == 0
    assert {batch.input_ids_BS.dtype, batch.target_ids_T.dtype, batch.col_T.dtype} == {torch.int64}
    assert {batch.sampling_logprobs_T.dtype, batch.advantages_T.dtype, batch.weights_T.dtype} == {torch.float32}


def test_masked_and_empty_completions_hold_a_row_and_train_no_token() -> None:
    batch = collate([sample([5, 6], [7, 8, 9], masked=True), sample([4], []), sample([2, 3], [1])])
    assert batch.input_ids_BS.tolist() == [[5, 6, 0], [4, 0, 0], [2, 3, 1]]
    assert batch.lengths_B.tolist() == [0, 0, 1]
    assert (batch.row_T.tolist(), batch.col_T.tolist()) == ([2], [1])
    nothing = collate([sample([5, 6], [7], masked=True), sample([4], [])])
    assert nothing.target_ids_T.shape == (0,)
    assert nothing.first_col == 1


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="empty prompt"):
        collate([sample([], [1])])


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 1), (1, 8), (2, 4), (4, 2), (8, 1), (3, 2)])
def test_every_sample_lands_once_in_parts_of_equal_size(world_size: int, micro_batches: int) -> None:
    samples = samples_of(np.random.default_rng(0).integers(0, 50, 24).tolist())
    ranks = split(samples, world_size, micro_batches)
    assert [len(parts) for parts in ranks] == [micro_batches] * world_size
    parts = [part for parts in ranks for part in parts]
    assert {len(part) for part in parts} == {24 // (world_size * micro_batches)}
    assert sorted(int(s.prompt_ids[0]) for part in parts for s in part) == list(range(1, 25))


def test_sizes_differ_by_at_most_one_where_samples_do_not_divide() -> None:
    sizes = [len(part) for parts in split(samples_of([5] * 11), 2, 2) for part in parts]
    assert (sum(sizes), max(sizes) - min(sizes)) == (11, 1)


@pytest.mark.parametrize("layout", [PADDED, Layout(packed=True), Layout(packed=True, share_prompts=True)])
@pytest.mark.parametrize("budget", [None, 1, 40, 200])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_rank_makes_as_many_forward_passes_and_no_sample_is_lost(
    world_size: int, budget: int | None, layout: Layout
) -> None:
    """Ranks compute together: with one micro-batch less, a rank would leave the others waiting."""
    rng = np.random.default_rng(world_size)
    for count in (1, 2, 3, 5, 7, 12, 31):
        samples = samples_of(rng.integers(0, 60, count).tolist())
        ranks = split(samples, world_size, 4, budget, layout)
        assert len({len(parts) for parts in ranks}) == 1
        parts = [part for parts in ranks for part in parts]
        assert all(len(part) > 0 for part in parts)
        given = {id(s) for s in samples}
        assert sorted(id(s) for part in parts for s in part if id(s) in given) == sorted(given)
        added = [s for part in parts for s in part if id(s) not in given]
        assert all(s.masked and s.token_weight == 0 and s.num_trained == 0 for s in added)
        if count >= world_size and budget is None:
            assert not added
        if budget is not None:
            assert all(num_tokens(part, layout) <= budget or len(part) == 1 for part in parts)


def test_neighbours_in_length_share_a_micro_batch_and_ranks_share_the_padded_tokens() -> None:
    ranks = split(samples_of([1, 9, 3, 5, 6, 4, 9, 2]), 2, 2)
    lengths = [[[s.num_trained for s in part] for part in parts] for parts in ranks]
    assert lengths == [[[9, 9], [2, 1]], [[6, 5], [4, 3]]]


def test_padding_stays_below_a_sixth_and_ranks_within_a_tenth_of_each_other() -> None:
    samples = samples_of((np.random.default_rng(1).exponential(60, 256).astype(int) + 1).tolist())
    padded = [sum(len(p) * max(1 + s.num_trained for s in p) for p in parts) for parts in split(samples, 4, 8)]
    assert sum(padded) < sum(1 + s.num_trained for s in samples) * 7 / 6
    assert max(padded) < min(padded) * 1.1


def test_splitting_is_deterministic_and_keeps_the_order_of_equal_lengths() -> None:
    samples = samples_of([4] * 8)
    assert split(samples, 2, 2) == split(samples, 2, 2)
    assert [int(s.prompt_ids[0]) for s in split(samples, 1, 2)[0][0]] == [1, 2, 3, 4]
