"""Whatever fails, wherever: model, statistics, history and journal of a session agree, and it goes on."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import stableedit_cpp as se
from stableedit_cpp.lifelong import LifelongSession, SessionView
from stableedit_cpp.lifelong.journal.snapshots import is_state
from support.sessions import assert_same_bits, config_of, create, reopen, state_of, stream, without_closing

PACKAGE = str(Path(se.__file__).parent)
WORK = {
    "edit": lambda session: session.edit(stream(3, 50), progress=False),
    "repair": lambda session: session.repair(budget=3, progress=False),
    "revert": lambda session: session.revert(["f1", "f4"], progress=False),
    "rollback": lambda session: session.rollback(1, progress=False),
}


class Failure(MemoryError):
    """What can come from anywhere."""


def calls_of(work: Callable[[], object], fail_at: int | None = None) -> int:
    """Do some work and count its calls of functions of the package; the call number ``fail_at`` fails."""
    count = 0

    def hear(frame, event, _argument):
        nonlocal count
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            count += 1
            if count == fail_at:
                raise Failure(frame.f_code.co_name)

    before = sys.gettrace()
    sys.settrace(hear)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.fixture
def begun(tokenizer, tmp_path) -> Callable[[str], LifelongSession]:
    def begin(name: str) -> LifelongSession:
        session = create(tmp_path / name, tokenizer, config=config_of(max_passes=2), snapshot_every=2)
        session.edit(stream(9), progress=False)
        return session

    return begin


@pytest.mark.parametrize("samples", [5, pytest.param(25, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", WORK)
def test_a_failure_anywhere(kind, samples, begun, tokenizer):
    """All of the work is done or nothing of it, in the model as on the disk. Where a failure comes between the two, the
    session refuses to go on, and opening it again brings the model to what is on the disk."""
    session = begun("whole")
    count = calls_of(lambda: WORK[kind](session))
    without_closing(session)
    whole = state_of(session.editor)

    source = random.Random(kind)
    for number in sorted(source.sample(range(1, count + 1), samples)):
        session = begun(str(number))
        before, turn = state_of(session.editor), session.history.turn
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a snapshot cannot be written
            try:
                calls_of(lambda: WORK[kind](session), fail_at=number)  # noqa: B023
            except Failure as failure:
                print(number, failure)  # what to look at where this test fails
        disk = SessionView(session.directory)
        assert disk.journal.damage is None
        done = disk.history.turn != turn
        held = is_state(session.editor.state_dict(), disk.history.states[disk.history.turn])
        if session.journal.damage is not None or not held:
            assert done
            for other in (WORK["edit"], WORK["repair"], lambda session: session.revert("f0")):
                with pytest.raises(ValueError, match=r"reopen the session|opening it again"):
                    other(session)
        else:
            assert disk.history.line == session.history.line
            assert disk.history.entries == session.history.entries
            assert_same_bits(state_of(session.editor), whole if done else before)
            if not done:
                WORK[kind](session)
                assert_same_bits(state_of(session.editor), whole)
        without_closing(session)
        assert_same_bits(state_of(reopen(session.directory, tokenizer).editor), whole)
