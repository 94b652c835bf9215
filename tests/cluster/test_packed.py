"""Completions and requests come out of their packing as they went in."""

import pickle

import numpy as np
import pytest

from rlx.cluster.packed import ask, pack, unpack, unpack_request
from rlx.wire import Completion, Sampling


def completion(ids, num_logprobs=None, **more):
    ids = np.array(ids, np.int32)
    logprobs = -np.arange(ids.size if num_logprobs is None else num_logprobs, dtype=np.float32)
    given = {"versions": ((3, ids.size),), "finish_reason": "stop", "text": "é"} | more
    return Completion(ids=ids, logprobs=logprobs, **given)


def test_completions_of_any_lengths_come_back_as_they_were():
    sent = [completion([5, 6, 7], versions=((3, 1), (4, 2))), completion([]), completion([2**31 - 1], text="")]
    got = unpack(pickle.loads(pickle.dumps(pack(sent))))
    assert len(got) == len(sent)
    for a, b in zip(sent, got, strict=True):
        assert (a.ids.tolist(), a.logprobs.tolist()) == (b.ids.tolist(), b.logprobs.tolist())
        assert (b.ids.dtype, b.logprobs.dtype) == (np.int32, np.float32)
        assert (a.versions, a.finish_reason, a.text) == (b.versions, b.finish_reason, b.text)
    assert unpack(pack([])) == []


def test_what_an_engine_gets_wrong_is_still_seen_behind_the_packing():
    first, second = unpack(pack([completion([5, 6], num_logprobs=1), completion([8])]))
    assert (first.ids.size, first.logprobs.size) == (2, 1)
    assert (second.ids.tolist(), second.logprobs.tolist()) == ([8], [0.0])
    with pytest.raises(TypeError, match="safe"):
        pack([Completion(np.array([2**31], np.int64), np.zeros(1, np.float32), ((0, 1),), "stop", "")])


def test_a_request_comes_back_as_it_was():
    class Actor:
        class generate:
            @staticmethod
            def remote(*arguments):
                return pickle.loads(pickle.dumps(arguments))

    how = Sampling(7, temperature=0.5, stop=("a",), seed=1, extra={"min_tokens": 2})
    key, prompt, n, given = ask(Actor, "k", np.array([1, 2, 3], np.int64), 4, how)
    ids, sampling = unpack_request(prompt, given)
    assert (key, n, ids.tolist(), sampling) == ("k", 4, [1, 2, 3], how)
