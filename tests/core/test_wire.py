"""The wire format: what is encoded comes back, and damaged bytes are a WireError, never anything else."""

from __future__ import annotations

import contextlib
import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rlx.episode import Episode, Row, StepReward
from rlx.errors import WireError
from rlx.frame import decode_frame, encode_frame
from rlx.rollout.manifest import WeightManifest
from rlx.safetensors_layout import TensorSpec
from rlx.wire import GroupRequest, GroupResult, GroupTimes, RewardOutcome, Sampling

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines are shared
FINITE = st.floats(allow_nan=False, allow_infinity=False)
SECONDS = st.floats(0, 1e6)
TOKEN = st.integers(0, 2**31 - 1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
FLOATS = st.floats(width=32)


def token_ids(min_size: int = 0) -> st.SearchStrategy[np.ndarray]:
    return arrays.arrays(np.int32, st.integers(min_size, 12), elements=TOKEN)


@st.composite
def rows(draw) -> Row:
    counts = draw(st.lists(st.integers(1, 5), max_size=3))
    size = sum(counts)
    return Row(
        ids=draw(arrays.arrays(np.int32, size, elements=TOKEN)),
        logprobs=draw(arrays.arrays(np.float32, size, elements=FLOATS)),
        versions=tuple((draw(st.integers(-1, 10**6)), count) for count in counts),
        prompt_ids=draw(st.none() | token_ids()),
    )


EPISODES = st.builds(
    Episode,
    rows=st.lists(rows(), max_size=3).map(tuple),
    text=st.text(),
    status=st.sampled_from(["ok", "truncated", "timeout", "env_lost", "aborted"]),
    completion=st.none() | st.text() | st.lists(st.dictionaries(st.text(), JSON, max_size=2), max_size=2),
    reward=st.none() | FINITE,
    step_rewards=st.lists(st.builds(StepReward, FINITE, st.text(), st.none() | st.integers(0, 9)), max_size=3).map(
        tuple
    ),
    extra=st.dictionaries(st.text(), JSON, max_size=2),
    metrics=st.dictionaries(st.text(), FINITE, max_size=2),
    turns=st.integers(0, 99),
    attempts=st.integers(1, 3),
    exact=st.booleans(),
    error=st.text(),
    process=st.text(),
    turn_times=st.lists(st.tuples(FINITE, FINITE), max_size=3).map(tuple),
)


@st.composite
def results(draw) -> GroupResult:
    sampled = draw(st.lists(EPISODES, min_size=1, max_size=4))
    rewards = draw(st.lists(st.tuples(st.text(), SECONDS), max_size=3))
    return GroupResult(
        key=draw(st.text()),
        episodes=tuple(sampled),
        rewards=tuple(
            RewardOutcome(
                name,
                draw(arrays.arrays(np.float32, len(sampled), elements=FLOATS)),
                seconds,
                draw(
                    st.dictionaries(st.text(), st.lists(JSON, min_size=len(sampled), max_size=len(sampled)), max_size=2)
                ),
                draw(st.sampled_from(["ok", "exception", "timeout", "crash", "invalid"])),
                draw(st.integers(0, 4)),
                draw(st.text()),
                draw(st.text()),
                draw(FINITE),
            )
            for name, seconds in rewards
        ),
        worker=draw(st.text()),
        generation_s=draw(SECONDS),
        reward_s=draw(SECONDS),
        metrics=draw(st.dictionaries(st.text(), FINITE, max_size=3)),
        times=draw(st.none() | st.builds(GroupTimes, FINITE, FINITE, FINITE, FINITE)),
    )


REQUESTS = st.builds(
    GroupRequest,
    key=st.text(),
    prompt=st.text() | st.lists(st.fixed_dictionaries({"role": st.text(), "content": JSON}), max_size=3),
    prompt_ids=token_ids(),
    num_generations=st.integers(1, 10**6),
    sampling=st.builds(
        Sampling,
        max_tokens=st.integers(1, 10**6),
        temperature=FINITE,
        top_k=st.integers(0, 1000),
        stop=st.lists(st.text(), max_size=3).map(tuple),
        seed=st.none() | st.integers(0, 2**31),
        regex=st.none() | st.text(),
        extra=st.dictionaries(st.text(), JSON, max_size=2),
    ),
    columns=st.dictionaries(st.text(), JSON, max_size=3),
    step=st.integers(0, 10**9),
    deadline_s=SECONDS,
    seed=st.integers(0, 2**31),
)


def same_result(a: GroupResult, b: GroupResult) -> None:
    for x, y in zip(a.episodes, b.episodes, strict=True):
        assert replace(x, rows=()) == replace(y, rows=())
        for p, q in zip(x.rows, y.rows, strict=True):
            np.testing.assert_array_equal(p.ids, q.ids)
            np.testing.assert_array_equal(p.logprobs, q.logprobs)
            assert p.versions == q.versions
            assert (p.prompt_ids is None) == (q.prompt_ids is None)
            np.testing.assert_array_equal(p.prompt_ids, q.prompt_ids)
    for r, t in zip(a.rewards, b.rewards, strict=True):
        np.testing.assert_array_equal(r.values, t.values)
        assert (r.name, r.seconds, r.extra, r.outcome, r.failed, r.error) == (
            t.name, t.seconds, t.extra, t.outcome, t.failed, t.error,
        )  # fmt: skip
    assert (a.key, a.worker, a.generation_s, a.reward_s, a.metrics) == (
        b.key, b.worker, b.generation_s, b.reward_s, b.metrics,
    )  # fmt: skip


def only_a_wire_error(decode, data: bytes) -> None:
    """Decode, whatever it gives; any exception but WireError fails the test."""
    with contextlib.suppress(WireError):
        decode(data)


@FUZZ
@given(REQUESTS)
def test_a_request_comes_back_as_it_was(request):
    back = GroupRequest.decode(request.encode())
    np.testing.assert_array_equal(back.prompt_ids, request.prompt_ids)
    fields = ("key", "prompt", "num_generations", "sampling", "columns", "step", "deadline_s", "seed")
    assert [getattr(back, name) for name in fields] == [getattr(request, name) for name in fields]


@FUZZ
@given(results())
def test_a_result_comes_back_as_it_was_nan_included(result):
    same_result(GroupResult.decode(result.encode()), result)


@FUZZ
@given(results())
def test_a_result_for_people_is_json(result):
    assert json.loads(json.dumps(result.to_json()))["key"] == result.key


@FUZZ
@given(st.data())
def test_a_truncated_frame_is_a_wire_error(data):
    frame, decode = data.draw(
        REQUESTS.map(lambda r: (r.encode(), GroupRequest.decode))
        | results().map(lambda r: (r.encode(), GroupResult.decode))
    )
    cut = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(WireError):
        decode(frame[:cut])


@FUZZ
@given(st.data())
def test_a_frame_with_bytes_appended_is_a_wire_error(data):
    frame = data.draw(results()).encode() + data.draw(st.binary(min_size=1, max_size=9))
    with pytest.raises(WireError):
        GroupResult.decode(frame)


@FUZZ
@given(results(), st.data())
def test_a_flipped_byte_gives_another_result_or_a_wire_error(result, data):
    frame = bytearray(result.encode())
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    only_a_wire_error(GroupResult.decode, bytes(frame))


@FUZZ
@given(JSON | st.fixed_dictionaries({"blocks": JSON | st.lists(st.lists(JSON, min_size=3, max_size=3))}), st.binary())
def test_any_json_as_a_header_decodes_or_is_a_wire_error(header, payload):
    head = json.dumps(header).encode()
    frame = b"RLX1" + struct.pack("<I", len(head)) + head + payload
    for decode in (decode_frame, GroupRequest.decode, GroupResult.decode):
        only_a_wire_error(decode, frame)


@FUZZ
@given(
    st.dictionaries(st.sampled_from(["key", "prompt", "prompt_ids", "n", "sampling", "columns", "deadline_s"]), JSON)
)
def test_any_json_as_a_request_is_a_request_or_a_wire_error(body):
    body.setdefault("sampling", {"max_tokens": 1})
    only_a_wire_error(GroupRequest.from_json, {"key": "k", "prompt": "", "prompt_ids": [1], "n": 1, **body})


@FUZZ
@given(JSON)
def test_any_json_as_a_manifest_is_a_manifest_or_a_wire_error(body):
    only_a_wire_error(WeightManifest.from_json, body)


@pytest.mark.parametrize("header", [b"[" * 100_000, b"[1]", b'{"blocks": 3}', b"null", b"\xff"])
def test_a_header_that_is_no_table_of_blocks_is_a_wire_error(header):
    with pytest.raises(WireError, match="header"):
        decode_frame(b"RLX1" + struct.pack("<I", len(header)) + header)


@pytest.mark.parametrize("bad", [2**31, -(2**31) - 1, 2**70, "7 8", None, [1], float("nan")])
def test_a_prompt_id_that_is_no_int32_is_a_wire_error(bad):
    with pytest.raises(WireError, match="not a group request"):
        GroupRequest.from_json(
            {"key": "k", "prompt": "", "prompt_ids": [1, bad], "n": 1, "sampling": {"max_tokens": 1}}
        )


def test_a_thousand_tokens_cost_eight_bytes_each_and_the_arrays_are_views():
    size = 1000
    row = Row(np.arange(size, dtype=np.int32), np.zeros(size, np.float32), ((1, size),))
    frame = GroupResult("k", (Episode((row,), ""),), (), "w", 0.0, 0.0).encode()
    assert len(frame) < 8 * size + 300
    back = GroupResult.decode(frame).episodes[0].rows[0].ids
    assert not back.flags.owndata
    assert not back.flags.writeable


def test_versions_that_do_not_partition_the_tokens_are_a_wire_error():
    row = Row(np.array([1, 2], np.int32), np.zeros(2, np.float32), ((1, 1),))
    with pytest.raises(WireError, match="partition"):
        GroupResult.decode(GroupResult("k", (Episode((row,), ""),), (), "w", 0.0, 0.0).encode())


@pytest.mark.parametrize("array", [np.zeros(2, np.float64), np.zeros((2, 2), np.int32), np.array(3, np.int32)])
def test_a_block_of_another_kind_is_not_encoded(array):
    with pytest.raises(WireError, match="block 'x'"):
        encode_frame({}, {"x": array})


def test_a_manifest_comes_back_as_it_was_through_json():
    manifest = WeightManifest(3, 8, "00ff", (TensorSpec("w", "F32", (2, 1)), TensorSpec("s", "BF16", ())))
    assert WeightManifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_the_mask_marks_what_has_a_version():
    row = Row(np.arange(6, dtype=np.int32), np.zeros(6, np.float32), ((4, 2), (-1, 3), (5, 1)))
    assert row.mask.tolist() == [True, True, False, False, False, True]
    assert row.num_sampled == 3
    assert Episode((row, row), "").num_sampled == 6
    assert Episode((row,), "").weight_versions == (4, 5)


def test_a_body_without_a_field_is_told_which():
    with pytest.raises(WireError, match=r"^not a group request: the field 'sampling' is missing$"):
        GroupRequest.from_json({})
    with pytest.raises(WireError, match=r"^not a weight manifest: the field 'tensors' is missing$"):
        WeightManifest.from_json({})
