"""Errors that come from an actor."""

from __future__ import annotations

import pytest
from ray.exceptions import RayTaskError

from rlx.cluster.calls import translated
from rlx.errors import ModelError, ServiceError, ServiceUnavailable, UserCodeError, WeightSyncError


@pytest.mark.parametrize(
    ("kind", "has_log"),
    [(ServiceUnavailable, True), (ModelError, True), (UserCodeError, False), (WeightSyncError, False)],
)
def test_what_an_engine_died_of_comes_with_the_place_of_its_log(kind, has_log):
    with pytest.raises(kind) as raised, translated("worker w", "; its log: out/logs/w.log"):
        raise RayTaskError("generate", "a traceback", kind("the cause"))
    assert str(raised.value) == ("the cause; its log: out/logs/w.log" if has_log else "the cause")


def test_a_defect_is_told_in_its_first_line_and_its_traceback_has_no_colours():
    with pytest.raises(ServiceError) as raised, translated("worker w"):
        raise RayTaskError("generate", "\x1b[36mray::generate()\x1b[39m\n  line 7", KeyError("a"))
    assert str(raised.value) == "worker w failed: KeyError: 'a'\nray::generate()\n  line 7"
