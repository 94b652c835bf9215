"""What benchmarks and other tests rely on in the fake engine, beside the contract of every engine."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from rlx.errors import RequestTooLong, ServiceUnavailable
from rlx.rollout.fake_engine import END, FakeEngine
from rlx.wire import Sampling

PROMPT = np.arange(1, 9, dtype=np.int32)
LONG = Sampling(max_tokens=50)


async def started(*arguments, **settings):
    engine = FakeEngine(*arguments, **settings)
    await engine.start()
    return engine


async def first_step(engine):
    while not engine.load().running:  # noqa: ASYNC110 - it is nobody's event
        await asyncio.sleep(0)


async def test_deterministic_samples_depend_on_the_request_alone():
    alone = await started(deterministic=True)
    busy = await started(deterministic=True, seed=7)
    [[a, b], _, [c, d]] = await asyncio.gather(
        busy.generate("x", PROMPT, 2, LONG),
        busy.generate("y", PROMPT, 5, LONG),
        busy.generate("z", PROMPT, 2, LONG),
    )
    again = await alone.generate("x", PROMPT, 2, LONG)
    assert [x.ids.tolist() for x in again] == [a.ids.tolist(), b.ids.tolist()]
    assert len({x.ids.tobytes() for x in (a, b, c, d)}) == 4


async def test_lengths_come_from_the_trace_and_log_probs_stay_honest():
    engine = await started(length_of=lambda request_id, index: len(request_id) + 10 * index, stride=4)
    completions = await engine.generate("abc", PROMPT, 3, Sampling(max_tokens=20))
    assert [(c.ids.size, c.finish_reason) for c in completions] == [(3, "stop"), (13, "stop"), (20, "length")]
    for c in completions:
        scored = await engine.prompt_logprobs(np.concatenate([PROMPT, c.ids]))
        np.testing.assert_allclose(scored[PROMPT.size - 1 :], c.logprobs, atol=1e-5)


async def test_with_a_trace_the_token_that_ends_is_like_any_other():
    engine = await started(length_of=lambda *_: 60_000, stride=1000)
    [c] = await engine.generate("a", PROMPT, 1, Sampling(60_000))
    assert END in c.ids[:-1]


async def test_a_step_takes_what_a_batch_of_its_size_takes():
    sizes = []

    def decode_s(batch):
        sizes.append(batch)
        return 0.001 * batch

    engine = await started(decode_s=decode_s, length_of=lambda request_id, index: 20)
    start = time.monotonic()
    await asyncio.gather(engine.generate("a", PROMPT, 1, LONG), engine.generate("b", PROMPT, 2, LONG))
    assert sizes == [3] * 20
    assert time.monotonic() - start >= 0.06
    assert engine.load().generated_tokens == 60
    assert engine.load().busy_s >= 0.059


async def test_sequences_beyond_the_limit_wait_for_their_turn():
    engine = await started(seconds_per_token=0.001, length_of=lambda *_: 10, max_num_seqs=2)
    task = asyncio.create_task(engine.generate("a", PROMPT, 5, LONG))
    await first_step(engine)
    assert (engine.load().running, engine.load().waiting) == (2, 3)
    assert len(await task) == 5
    assert (engine.load().running, engine.load().waiting) == (0, 0)


async def test_a_full_cache_preempts_the_youngest():
    engine = await started(seconds_per_token=0.001, length_of=lambda *_: 12, kv_tokens=40)
    task = asyncio.create_task(engine.generate("a", PROMPT, 4, LONG))
    await first_step(engine)
    assert 0.5 < engine.load().kv_cache_usage <= 1
    assert {c.ids.size for c in await task} == {12}
    assert engine.load().preemptions == 2
    assert engine.load().kv_cache_usage == 0


async def test_closing_ends_what_runs_and_starting_again_makes_a_fresh_process():
    engine = await started(seconds_per_token=0.01)
    running = asyncio.create_task(engine.generate("a", PROMPT, 2, LONG))
    await asyncio.sleep(0)
    await engine.close()
    with pytest.raises(ServiceUnavailable, match="closed"):
        await running
    with pytest.raises(ServiceUnavailable, match="closed"):
        await engine.generate("b", PROMPT, 2, LONG)
    await engine.start()
    assert len(await engine.generate("c", PROMPT, 2, Sampling(3))) == 2
    assert engine.load().running == engine.in_flight == 0


async def test_a_prompt_without_room_is_too_long_and_the_context_bounds_the_completion():
    engine = await started(max_model_len=12, length_of=lambda *_: 40)
    [c] = await engine.generate("a", PROMPT, 1, LONG)
    assert (c.ids.size, c.finish_reason) == (4, "length")
    with pytest.raises(RequestTooLong, match="12 tokens"):
        await engine.generate("b", np.arange(12, dtype=np.int32), 1, LONG)


async def test_a_decode_time_that_raises_reaches_the_caller():
    engine = await started(decode_s=lambda batch: 1 / (batch - 2))
    with pytest.raises(ZeroDivisionError):
        await engine.generate("a", PROMPT, 2, LONG)
