"""Errors have kinds, and older code still catches what it caught."""

import pytest

import stableedit_cpp as se
from stableedit_cpp import errors
from stableedit_cpp.lifelong import JournalDamaged, SessionLocked, SnapshotDamaged
from stableedit_cpp.model.capture import NotFiniteError

EARLIER = {
    "DamagedJournal": ValueError,
    "DamagedSnapshot": ValueError,
    "DriftLimitReached": RuntimeError,
    "ModelBroken": ValueError,
    "OtherBits": ValueError,
    "RankLost": RuntimeError,
    "RanksDiffer": ValueError,
    "SessionBusy": ValueError,
    "SessionClosed": ValueError,
    "SessionWriteError": OSError,
}


@pytest.mark.parametrize("name", sorted(set(errors.__all__) - {"StableEditError"}))
def test_every_kind_is_public_and_is_what_it_was_before_it_had_a_name(name):
    kind = getattr(errors, name)
    assert getattr(se, name) is kind and kind.__doc__
    assert issubclass(kind, se.StableEditError) and issubclass(kind, EARLIER[name])
    error = kind("a sentence", 0.5) if name == "DriftLimitReached" else kind("a sentence")
    assert str(error) == "a sentence" and error.report is None


def test_earlier_names_are_the_same_classes():
    assert (SessionLocked, JournalDamaged, SnapshotDamaged, NotFiniteError) == (
        se.SessionBusy,
        se.DamagedJournal,
        se.DamagedSnapshot,
        se.ModelBroken,
    )


def test_ctrl_c_is_none_of_them():
    assert issubclass(se.EditInterrupted, KeyboardInterrupt) and not issubclass(se.EditInterrupted, se.StableEditError)
