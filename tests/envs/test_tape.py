import numpy as np

from rlx.envs.tape import Tape
from rlx.wire import Completion


def _ids(*values: int) -> np.ndarray:
    return np.asarray(values, np.int32)


def _said(ids: np.ndarray, versions: tuple[tuple[int, int], ...]) -> Completion:
    return Completion(ids, -ids.astype(np.float32), versions, "stop", "")


def test_a_row_holds_every_token_in_order_and_trains_those_that_were_sampled():
    tape = Tape(_ids(1, 2), group_prompt=True)
    tape.sampled(_said(_ids(3, 4, 5), ((0, 1), (1, 2))))
    tape.context(_ids(6, 7))
    tape.sampled(_said(_ids(8), ((1, 1),)))
    assert tape.ids().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert len(tape) == 6
    row = tape.row()
    assert row.ids.tolist() == [3, 4, 5, 6, 7, 8]
    assert row.versions == ((0, 1), (1, 2), (-1, 2), (1, 1))
    assert row.mask.tolist() == [True, True, True, False, False, True]
    assert row.logprobs[row.mask].tolist() == [-3, -4, -5, -8]
    assert np.isnan(row.logprobs[~row.mask]).all()
    assert (row.ids.dtype, row.logprobs.dtype) == (np.int32, np.float32)
    assert row.prompt_ids is None


def test_neighbours_of_one_version_are_one_run():
    tape = Tape(_ids(1), group_prompt=False)
    tape.sampled(_said(_ids(2), ((5, 1),)))
    tape.sampled(_said(_ids(3, 4), ((5, 1), (6, 1))))
    assert tape.row().versions == ((5, 2), (6, 1))
    assert tape.row().prompt_ids.tolist() == [1]


def test_context_that_nothing_follows_is_left_out_of_the_row():
    tape = Tape(_ids(1), group_prompt=True)
    tape.sampled(_said(_ids(2), ((0, 1),)))
    tape.context(_ids(3, 4))
    assert tape.row().ids.tolist() == [2]
    assert tape.row().versions == ((0, 1),)
    assert tape.ids().tolist() == [1, 2, 3, 4]


def test_a_row_that_was_never_sampled_is_empty():
    tape = Tape(_ids(1), group_prompt=True)
    tape.context(_ids(2))
    assert (tape.num_sampled, tape.row().ids.size, tape.row().versions) == (0, 0, ())


def test_only_ids_that_begin_with_the_whole_row_extend_it():
    tape = Tape(_ids(1, 2), group_prompt=True)
    tape.sampled(_said(_ids(3), ((0, 1),)))
    assert tape.extended_by(_ids(1, 2, 3))
    assert tape.extended_by(_ids(1, 2, 3, 9))
    assert not tape.extended_by(_ids(1, 2))
    assert not tape.extended_by(_ids(1, 2, 4, 9))


def test_a_row_does_not_change_when_its_tape_goes_on():
    tape = Tape(_ids(1), group_prompt=True)
    tape.sampled(_said(_ids(2), ((0, 1),)))
    row = tape.row()
    tape.sampled(_said(_ids(3), ((0, 1),)))
    assert row.ids.tolist() == [2]
