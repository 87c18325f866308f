"""Brings an editor to the state after some turn: from a snapshot, and from there turn by turn."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from tqdm.auto import tqdm

from stableedit_cpp.editors import AppliedTurn, Editor
from stableedit_cpp.errors import DamagedSnapshot, OtherBits
from stableedit_cpp.lifelong.history import Step
from stableedit_cpp.lifelong.journal.codec import decode_requests, decode_turn, decode_updates
from stableedit_cpp.lifelong.journal.snapshots import is_state
from stableedit_cpp.lifelong.view import SessionView

__all__ = ["applied_turn", "forget", "restore"]


def restore(
    view: SessionView,
    editor: Editor,
    line: Sequence[int],
    *,
    exact: bool = True,
    progress: bool | None = None,
) -> None:
    """Make weights and statistics those after the last turn of ``line``, bit for bit; part of a change of the weights.

    Args:
        exact: raise if that fails; else accept the difference, which another processor or library makes in the last
            digits.

    Raises:
        OtherBits: see ``exact``. DamagedSnapshot: if there is no snapshot to begin from.
    """
    done = _load_snapshot(view, editor, line)
    shown = None if progress is None else not progress
    for turn in tqdm(line[done:], desc="Replaying", unit="turn", disable=shown, leave=False):
        step = view.history.steps[turn]
        _redo(view, editor, step)
        if exact and not is_state(editor.state_dict(), view.history.states[step.turn]):
            raise OtherBits(
                f"{view.directory}: doing turn {step.turn} again gives other bits than were recorded, as it can on "
                "another machine or device, or with another version of a library or of this program; open the session "
                "where it was written, or with exact=False (--inexact) to accept the difference"
            )


def applied_turn(view: SessionView, editor: Editor, turn: int) -> AppliedTurn:
    """What a turn of requests did, row by row. From a journal without factors it is computed again, which takes the
    editor through earlier states and back to the present one; part of a change of the weights."""
    step = view.history.steps[turn]
    if step.record.content["factors"]:
        return _decode(view, editor, step)
    before = editor.checkpoint()
    seen: list[AppliedTurn] = []
    try:
        restore(view, editor, view.history.line_until(turn)[:-1])
        editor.followers.within = seen.append
        _redo(view, editor, step)
    finally:
        editor.followers.within = None
        before.restore()
    return seen[0]


def _load_snapshot(view: SessionView, editor: Editor, line: Sequence[int]) -> int:
    """Load the newest usable snapshot; returns how many steps of the line it holds."""
    numbers = [0, *map(view.history.number, line)]
    for number in reversed(view.snapshots.numbers()):
        if number in numbers:
            done = numbers.index(number)
            try:
                state = view.snapshots.load(number, view.history.states[line[done - 1] if done else 0])
            except DamagedSnapshot as error:
                warnings.warn(f"{error}; using an earlier one", stacklevel=2)
                continue
            editor.load_state_dict(state)
            return done
    if is_state(editor.state_dict(), view.history.states[0]):
        return 0
    raise DamagedSnapshot(
        f"{view.directory}: there is no usable snapshot to begin from; open the session with its unedited model"
    )


def forget(view: SessionView, editor: Editor, ids: Sequence[str], again: Sequence[tuple[str, str]]) -> None:
    """Replay requests no more, by id; those that answer a question again instead, each with it, from now on."""
    entries = view.history.entries
    editor.forget([entries[id].request for id in ids], [(entries[id].request, question) for id, question in again])


def _redo(view: SessionView, editor: Editor, step: Step) -> None:
    content = step.record.content
    with _threads(content["threads"]):
        if step.kind == "revert":
            tensors = view.journal.tensors(step.record)
            for number in range(content["updates"]):
                editor.weights.add(decode_updates(tensors, _homes(editor), f"{number}/"))
            forget(view, editor, content["requests"], content.get("again", []))
        elif content["factors"]:
            editor.replay(_decode(view, editor, step))
        else:
            editor.edit_again(decode_requests(content), content["kind"], content["passes"])


def _decode(view: SessionView, editor: Editor, step: Step) -> AppliedTurn:
    devices = {module.name: module.device for module in editor.modules}
    return decode_turn(step.record.content, view.journal.tensors(step.record), _homes(editor), devices)


def _homes(editor: Editor) -> dict[str, torch.device]:
    return {module.name: module.home for module in editor.modules}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """With another number of threads, sums are taken in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
