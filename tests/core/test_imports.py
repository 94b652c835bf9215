"""The search for cycles while libraries are imported."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from rlx.imports import loading

IN_A_PROCESS = """
import gc
from rlx.imports import begin_loading, loaded
usually = gc.get_threshold()
begin_loading()
assert gc.isenabled() and gc.get_threshold()[0] > 10 * usually[0]
loaded()
assert gc.get_threshold() == usually and gc.get_freeze_count() > 1000
"""


def test_nothing_is_searched_while_libraries_load_and_again_also_after_one_that_does_not_load():
    with loading():
        assert not gc.isenabled()
        with loading():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), loading():
        import no_such_library  # noqa: F401
    assert gc.isenabled()


def test_a_process_of_another_program_searches_seldom_until_it_has_loaded():
    subprocess.run([sys.executable, "-c", IN_A_PROCESS], check=True, timeout=60)
