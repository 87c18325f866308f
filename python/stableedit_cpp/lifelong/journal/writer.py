"""Writes down what an editor does: a record for every step, a snapshot now and then."""

from __future__ import annotations

import warnings
from hashlib import blake2b

import torch

from stableedit_cpp.editors import AppliedTurn, Editor
from stableedit_cpp.editors.followers import Follower
from stableedit_cpp.editors.interrupt import InterruptGuard, undisturbed
from stableedit_cpp.editors.weights import Checkpoint
from stableedit_cpp.errors import SessionWriteError
from stableedit_cpp.files.words import now
from stableedit_cpp.lifelong.journal.codec import encode_turn
from stableedit_cpp.lifelong.journal.record import Record
from stableedit_cpp.lifelong.journal.snapshots import is_state, state_fingerprints
from stableedit_cpp.lifelong.view import SessionView
from stableedit_cpp.model.ranks import ranks

__all__ = ["Recorder", "append", "append_moved"]

_REMEDY = "close() the session; opening it again puts the model where it stands"


def append(view: SessionView, content: dict, tensors: dict[str, torch.Tensor] | None = None) -> Record:
    """Append a record to the journal of a session, and to its history. Where processes edit together, the first of them
    writes, and all go on once it has.

    Raises:
        SessionWriteError: if the disk does not take it; the journal is then as it was.
    """
    with InterruptGuard(), undisturbed():  # Ctrl-C comes too late: what is on the disk counts
        try:
            record = ranks().gathered("recording", lambda: _written(view, content, tensors))[0]
        except OSError as error:
            what = f"turn {content['turn']}" if "turn" in content else f"a {content['kind']}"
            raise SessionWriteError(
                f"{view.journal.path}: cannot record {what} ({error.strerror}), so it was taken back; the session "
                "stands as before and can go on once the disk takes it"
            ) from None
        try:
            view.journal.note(record)
            view.history.add(record)
        except BaseException as error:
            view.journal.stop(f"it is on the disk, but not in the session's memory ({error!r}); reopen the session")
            raise
    return record


def _written(view: SessionView, content: dict, tensors: dict[str, torch.Tensor] | None) -> Record | None:
    return view.journal.append({**content, "time": now()}, tensors) if view.writes else None


def append_moved(view: SessionView, editor: Editor) -> None:
    """Record the editor's state as that of the session's turn, if it is another: the turns were done again with other
    bits, which the caller has accepted."""
    state = editor.state_dict()
    if not is_state(state, view.history.states[view.history.turn]):
        reason = "the turns before were done again with other bits, on another machine or library"
        content = {"kind": "moved", "turn": view.history.turn, "state": state_fingerprints(state), "reason": reason}
        append(view, content)


class Recorder(Follower):
    """Records the turns of an editor in a session, from the moment it is made until ``stop``."""

    def __init__(self, view: SessionView, editor: Editor) -> None:
        self.view = view
        self.editor = editor
        self._config_digest = blake2b(editor.config.to_json().encode(), digest_size=16).hexdigest()
        numbers = set(view.snapshots.numbers())
        held = [turn for turn in view.history.line if view.history.number(turn) in numbers]
        self._snapshot_turn = held[-1] if held else 0
        editor.followers.add(self)

    def stop(self) -> None:
        """Write a snapshot of what is new, and listen no longer."""
        try:
            if self.view.history.turn != self._snapshot_turn:
                self.snapshot()
        finally:
            self.editor.followers.remove(self)

    def begin(self) -> None:
        """Refuse a turn on something else than what the last record left."""
        if not is_state(self.editor.state_dict(), self.view.history.states[self.view.history.turn]):
            raise ValueError(
                f"weights or statistics of the editor are no longer those after turn {self.view.history.turn} of the "
                f"session {self.view.directory}; {_REMEDY}"
            )

    def before(self, change: str) -> None:
        """Refuse what the session does not do itself."""
        raise ValueError(
            f"the session {self.view.directory} follows this editor, and {change} would be missing in its journal; "
            f"use the session's own methods, or {_REMEDY}"
        )

    def applied(self, turn: AppliedTurn) -> None:
        if any(request.id is None for request in turn.requests):
            raise ValueError("a request of a session needs an id; call the session's edit, not that of its editor")

    def record(self, turn: AppliedTurn) -> None:
        """Write a turn down. If this raises, the turn is taken back."""
        with turn.report.timed("journal"):
            # What a guard changed cannot be done again from the requests, nor to the last digit what depends on which
            # prompts shared a batch: those that a trunk cache did not hold in a repair, anchors that were new.
            unsteady = turn.kind == "repair" or turn.report.back_offs > 0 or self.editor.config.anchors > 0
            factors = unsteady or self.view.manifest["detail"] == "factors"
            content, tensors = encode_turn(turn, factors=factors)
            if turn.kind == "edit":
                before = {request.id: self.view.history.superseded_by(request) for request in turn.requests}
                content["supersedes"] = {new: ", ".join(old) for new, old in before.items() if old}
            self._append_step(content, tensors)

    def final(self, turn: AppliedTurn) -> None:
        with turn.report.timed("journal"):
            self.snapshot_if_due()

    def step(self, change: Checkpoint, content: dict, tensors: dict[str, torch.Tensor]) -> None:
        """Record a change of the weights that the session made itself; once it is written down, it stands."""
        with InterruptGuard(), undisturbed():
            self._append_step(content, tensors)
            change.settle()

    def rollback(self, change: Checkpoint, content: dict) -> None:
        """Record that weights and statistics went back to an earlier turn; once it is written down, that stands."""
        with InterruptGuard(), undisturbed():
            append(self.view, content)
            change.settle()
            append_moved(self.view, self.editor)

    def snapshot_if_due(self) -> None:
        """Write the whole state, if the last snapshot is so old."""
        line = self.view.history.line
        since = len(line) - (line.index(self._snapshot_turn) + 1 if self._snapshot_turn in line else 0)
        if since >= self.view.manifest["snapshot_every"]:
            self.snapshot()

    def snapshot(self) -> None:
        """Write the whole state. The turns in it are recorded already, so that a failure is no error but a warning."""
        turn = self.view.history.turn
        if not self.view.writes:
            self._snapshot_turn = turn
            return
        number = self.view.history.number(turn)
        try:
            self.begin()  # a snapshot of anything else would be of no use
            self.view.snapshots.save(number, self.editor.state_dict())
            self._snapshot_turn = turn
            self.prune()
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            warnings.warn(
                f"{self.view.snapshots.directory}: cannot write a snapshot after turn {turn} ({reason}); the turns are "
                "in the journal, and opening the session takes longer",
                stacklevel=2,
            )

    def prune(self) -> None:
        """Remove snapshots that are too many, or of turns that were rolled back."""
        if not self.view.writes:
            return
        history = self.view.history
        self.view.snapshots.prune({0, *map(history.number, history.line)})

    def _append_step(self, content: dict, tensors: dict[str, torch.Tensor]) -> None:
        stamp = {"turn": self.view.history.next_turn, "threads": torch.get_num_threads(), "config": self._config_digest}
        append(self.view, {**content, **stamp, "state": state_fingerprints(self.editor.state_dict())}, tensors)
