"""Base and difference make the new bytes, bit by bit; what is damaged or does not fit is refused, and nothing is left."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlx.errors import WeightBaseMismatch, WeightSyncError
from rlx.rollout import delta
from rlx.rollout.delta import apply, encode

BF16_SPECIALS = np.array([0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF, 0x0001, 0x8001], np.uint16)
"""0, -0, the infinities, three NaNs, the subnormals next to 0."""


def applied(folder: Path, base: bytes, data: bytes) -> bytes:
    (folder / "base").write_bytes(base)
    apply(folder / "base", data, folder / "out")
    return (folder / "out").read_bytes()


def difference(base: np.ndarray, new: np.ndarray) -> bytes:
    data = encode(base.tobytes(), new.tobytes(), base.itemsize).data
    assert data is not None
    return data


def one_percent(dtype: type, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An array, and one with a hundredth of its elements moved by ±1."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, np.iinfo(dtype).max, size, dtype)
    new = base.copy()
    at = rng.choice(size, size // 100, replace=False)
    new[at] += rng.choice(np.array([1, np.iinfo(dtype).max], dtype), at.size)
    return base, new


@st.composite
def edits(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """A base of any bits, and the same with any elements replaced by any bits, NaNs and zeros of either sign often."""
    dtype = draw(st.sampled_from([np.uint16, np.uint32]))
    base = draw(
        hnp.arrays(dtype, st.integers(1, 2000), elements=st.integers(0, int(np.iinfo(dtype).max)), fill=st.just(7))
    )
    places = draw(st.lists(st.integers(0, base.size - 1), max_size=40))
    special = st.sampled_from(BF16_SPECIALS.tolist()).map(lambda x: x << (8 * base.itemsize - 16))
    values = draw(
        st.lists(st.integers(0, int(np.iinfo(dtype).max)) | special, min_size=len(places), max_size=len(places))
    )
    new = base.copy()
    for place, value in zip(places, values, strict=True):
        new[place] = value
    return base, new


@settings(max_examples=100, deadline=None)
@given(edits(), st.sampled_from([1, 2, 254, 255, 256, 511, 2**20]))
def test_base_and_difference_make_the_new_bytes_whatever_the_bits(
    pair: tuple[np.ndarray, np.ndarray], piece: int
) -> None:
    base, new = pair
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(delta, "_ELEMENTS", piece)
        patch.setattr(delta, "MAX_CHANGED", 1.0)
        found = encode(base.tobytes(), new.tobytes(), base.itemsize)
        assert found.changed_fraction == np.count_nonzero(base != new) / base.size
        if found.data is not None:
            assert len(found.data) < new.nbytes
            assert applied(Path(folder), base.tobytes(), found.data) == new.tobytes()


def test_not_a_number_and_minus_zero_survive_bit_by_bit(tmp_path: Path) -> None:
    base = np.zeros(10_000, np.uint16)
    for turn in range(BF16_SPECIALS.size):
        new = base.copy()
        new[100 : 100 + BF16_SPECIALS.size] = np.roll(BF16_SPECIALS, turn)
        assert applied(tmp_path, base.tobytes(), difference(base, new)) == new.tobytes()
        base = new


@pytest.mark.parametrize(("dtype", "least"), [(np.uint16, 100), (np.uint32, 150)])
def test_one_percent_changed_is_a_hundredth_of_the_bytes(tmp_path: Path, dtype: type, least: int) -> None:
    base, new = one_percent(dtype, 300_000)
    data = difference(base, new)
    assert new.nbytes / len(data) > least
    assert applied(tmp_path, base.tobytes(), data) == new.tobytes()


def test_a_file_of_several_pieces_comes_back_whole_in_order(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(delta, "_ELEMENTS", 1000)
    monkeypatch.setattr(delta, "_THREADS", 4)
    base, new = one_percent(np.uint16, 100_500)
    assert applied(tmp_path, base.tobytes(), difference(base, new)) == new.tobytes()


def test_nothing_changed_is_almost_no_bytes(tmp_path: Path) -> None:
    base, _ = one_percent(np.uint16, 300_000)
    data = difference(base, base)
    assert len(data) < 100
    assert applied(tmp_path, base.tobytes(), data) == base.tobytes()


def test_everything_is_sent_where_too_much_changed_or_sizes_differ() -> None:
    base, new = one_percent(np.uint16, 10_000)
    assert encode(base.tobytes(), new.tobytes()[:-2]).data is None
    assert encode(b"", b"").data is None
    assert encode(b"odd", b"ODD").data is None
    most = encode(base.tobytes(), (base + 1).astype(np.uint16).tobytes())
    assert (most.data, most.changed_fraction) == (None, 1.0)
    half = base.copy()
    half[::2] += 1
    assert encode(base.tobytes(), half.tobytes()) == delta.Difference(None, 0.5)
    assert encode(b"\0\0", b"\1\0").data is None, "one element of one"


def test_another_base_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    base, new = one_percent(np.uint16, 10_000)
    data = difference(base, new)
    wrong = base.copy()
    wrong[77] ^= 1
    with pytest.raises(WeightBaseMismatch, match=xxhash.xxh3_128_hexdigest(wrong.tobytes())):
        applied(tmp_path, wrong.tobytes(), data)
    with pytest.raises(WeightBaseMismatch, match="for 20000 bytes, the weights here are 19998"):
        applied(tmp_path, base.tobytes()[:-2], data)
    assert not (tmp_path / "out").exists()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_is_refused_before_anything_is_written(data: st.DataObject) -> None:
    base, new = one_percent(np.uint16, 5000)
    whole = difference(base, new)
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = data.draw(
        st.sampled_from(
            [whole[:place], whole + whole[:1], whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :]]
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(WeightSyncError, match="damaged"):
            applied(Path(folder), base.tobytes(), damaged)
        assert not (Path(folder) / "out").exists()


def sealed(rest: bytes) -> bytes:
    return delta._SEAL.pack(delta._MAGIC, delta._digest(rest)) + rest


def test_a_difference_that_lies_under_a_good_checksum_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    base, new = one_percent(np.uint16, 5000)
    rest = difference(base, new)[delta._SEAL.size :]
    head, first = delta._HEADER.size, delta._HEADER.size + delta._PIECE.size
    count, length = delta._PIECE.unpack_from(rest, head)

    def piece(packed: bytes, changed: int = count) -> bytes:
        return sealed(rest[:head] + delta._PIECE.pack(changed, len(packed)) + packed)

    lies = {
        "format 2": sealed(b"\2" + rest[1:]),
        "longer than it can be": sealed(rest[:head] + delta._PIECE.pack(count, length + 1) + rest[first:]),
        "follow the last piece": sealed(rest + b"?"),
        "positions for": piece(rest[first:], count - 1),
        "cannot be unpacked": piece(b"no deflate stream"),
        "out of bounds": piece(delta._pack(np.array([5000]), np.array([1], np.uint16)), 1),
        "make weights with the fingerprint": piece(delta._pack(np.array([0]), np.array([1], np.uint16)), 1),
        "is damaged": b"",
    }
    for said, lie in lies.items():
        with pytest.raises(WeightSyncError, match=said):
            applied(tmp_path, base.tobytes(), lie)
        assert not (tmp_path / "out").exists()


def test_a_stream_that_would_swell_beyond_its_piece_is_cut(tmp_path: Path) -> None:
    base, new = one_percent(np.uint16, 5000)
    rest = difference(base, new)[delta._SEAL.size :]
    bomb = delta._pack(np.array([2**30]), np.array([1], np.uint16))
    head = rest[: delta._HEADER.size]
    with pytest.raises(WeightSyncError, match="cannot be unpacked"):
        applied(tmp_path, base.tobytes(), sealed(head + delta._PIECE.pack(1, len(bomb)) + bomb))
