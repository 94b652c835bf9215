"""Which samples share a micro-batch, and which rank computes it: one optimizer step, cut so that ranks end together.

Not here: the tensors of a micro-batch (`batching.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from rlx.learner.microbatches.batching import PADDED, Layout, Sample, by_prompt, groups_in_row


def split(
    samples: Sequence[Sample],
    world_size: int,
    micro_batches: int,
    token_budget: int | None = None,
    layout: Layout = PADDED,
) -> list[list[list[Sample]]]:
    """`result[rank][i]`: micro-batch i of a rank. Every sample lands in exactly one; all ranks have as many
    micro-batches.

    Without a `token_budget` a rank has `micro_batches` of them, or one per sample where it has fewer samples than that;
    their numbers of samples differ by one at most. With a `token_budget`, a micro-batch takes samples until it forwards
    that many tokens, padding included; a longer sample is alone in its own. Ranks compute together and so need as many
    micro-batches each: where whole samples do not make that many, some hold a copy of a sample that trains nothing.

    Neighbours in length share a micro-batch, so that padding is small; where prompts are shared, neighbours in the
    group. The costliest micro-batches go first, each to the rank that has the least cost so far, so that the ranks end
    together and a too large batch shows at once.
    """
    ordered = _neighbours(samples, layout)
    if token_budget is None:
        ordered += [_filler(samples)] * (world_size - len(samples))
        num_slots = world_size * min(micro_batches, len(ordered) // world_size)
        bounds = [len(ordered) * i // num_slots for i in range(num_slots + 1)]
        parts = [ordered[start:stop] for start, stop in pairwise(bounds)]
    else:
        parts = _fill(ordered, token_budget, world_size, layout)
    parts.sort(key=lambda part: cost(part, layout), reverse=True)
    ranks: list[list[list[Sample]]] = [[] for _ in range(world_size)]
    costs = [0.0] * world_size
    for part in parts:
        rank = min((r for r in range(world_size) if len(ranks[r]) < len(parts) // world_size), key=lambda r: costs[r])
        ranks[rank].append(part)
        costs[rank] += cost(part, layout)
    return ranks


def _filler(samples: Sequence[Sample]) -> Sample:
    """The prompt alone of the sample with the shortest."""
    shortest = min(samples, key=lambda s: len(s.prompt_ids))
    return replace(shortest, masked=True, token_weight=0.0, old_logprobs=None)


def _neighbours(samples: Sequence[Sample], layout: Layout) -> list[Sample]:
    """The longest first; where prompts are shared, the samples of a prompt side by side, the longest group first."""
    by_length = sorted(samples, key=lambda s: s.num_forwarded, reverse=True)
    if not layout.share_prompts:
        return by_length
    groups = sorted(by_prompt(by_length), key=lambda group: sum(s.num_forwarded for s in group), reverse=True)
    return [sample for group in groups for sample in group]


def _fill(ordered: list[Sample], token_budget: int, world_size: int, layout: Layout) -> list[list[Sample]]:
    """Micro-batches of at most `token_budget` tokens, as few as that needs, as many for every rank, of equal sizes as
    far as samples can be parted."""
    count = -(-len(_take(ordered, token_budget, layout)) // world_size) * world_size
    low, high = 1, token_budget
    while high - low > max(1, token_budget // 64):
        middle = (low + high) // 2
        low, high = (low, middle) if len(_take(ordered, middle, layout)) <= count else (middle, high)
    parts = _take(ordered, high, layout)
    while len(parts) % world_size:
        if all(len(part) == 1 for part in parts):
            parts.append([_filler(ordered)])
            continue
        whole = max((part for part in parts if len(part) > 1), key=lambda part: cost(part, layout))
        half = len(whole) // 2
        parts.append(whole[half:])
        del whole[half:]
    return parts


def _take(ordered: list[Sample], most_tokens: int, layout: Layout) -> list[list[Sample]]:
    """Cut into parts of at most so many tokens; a longer sample is a part of its own."""
    parts: list[list[Sample]] = []
    open_group: list[Sample] = []  # end of the last part: those that may share a prompt with the next sample
    before = 0  # tokens of that part in front of the open group
    for sample in ordered:
        stays = not layout.packed or (
            layout.share_prompts and bool(open_group) and sample.prompt_key == open_group[0].prompt_key
        )
        if open_group and not stays:
            before, open_group = before + num_tokens(open_group, layout), []
        if parts and before + num_tokens([*open_group, sample], layout) <= most_tokens:
            parts[-1].append(sample)
            open_group.append(sample)
        else:
            parts.append([sample])
            before, open_group = 0, [sample]
    return parts


def num_tokens(samples: Sequence[Sample], layout: Layout) -> int:
    """Tokens that one micro-batch of these samples forwards, padding included."""
    if not layout.packed:
        return len(samples) * max(s.num_forwarded for s in samples)
    return sum(length for length, _ in _extents(samples, layout))


def cost(samples: Sequence[Sample], layout: Layout) -> float:
    """What one micro-batch costs, in units of one token without attention."""
    if layout.packed:
        return sum(n + layout.pair_cost * n * (seen + n / 2) for n, seen in _extents(samples, layout))
    longest = max(s.num_forwarded for s in samples)
    return len(samples) * (longest + layout.pair_cost * longest**2 / 2)


def _extents(samples: Sequence[Sample], layout: Layout) -> Iterable[tuple[int, int]]:
    """Length of each segment of a packed row, and of the prefix that it sees."""
    for group, shared in groups_in_row(samples, layout):
        prompt = len(group[0].prompt_ids)
        if shared:
            yield prompt, 0
        for sample in group:
            yield (sample.num_forwarded - prompt, prompt) if shared else (sample.num_forwarded, 0)
