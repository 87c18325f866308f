"""Writes down what an editor does: a record for every step, a snapshot now and then."""

from __future__ import annotations

import time
import warnings
from hashlib import blake2b

import torch

from stableedit_cpp.editors import AppliedTurn, Editor
from stableedit_cpp.editors.interrupt import InterruptGuard
from stableedit_cpp.errors import SessionWriteError
from stableedit_cpp.files.words import now
from stableedit_cpp.lifelong.journal.codec import encode_turn
from stableedit_cpp.lifelong.journal.record import Record
from stableedit_cpp.lifelong.journal.snapshots import state_digests
from stableedit_cpp.lifelong.view import SessionView

__all__ = ["Recorder", "append"]


def append(view: SessionView, content: dict, tensors: dict[str, torch.Tensor] | None = None) -> Record:
    """Append a record to the journal of a session, and to its history.

    Raises:
        SessionWriteError: if the disk does not take it; the journal is then as it was.
    """
    with InterruptGuard():  # Ctrl-C comes too late: what is on the disk counts
        try:
            record = view.journal.append({**content, "time": now()}, tensors)
        except OSError as error:
            what = f"turn {content['turn']}" if "turn" in content else f"a {content['kind']}"
            raise SessionWriteError(
                f"{view.journal.path}: cannot record {what} ({error.strerror}), so it was taken back; the session "
                "stands as before and can go on once the disk takes it"
            ) from None
        view.history.add(record)
    return record


class Recorder:
    """Records the turns of an editor in a session, from the moment it is made until ``stop``."""

    def __init__(self, view: SessionView, editor: Editor) -> None:
        self.view = view
        self.editor = editor
        self._config_digest = blake2b(editor.config.to_json().encode(), digest_size=16).hexdigest()
        numbers = view.snapshots.numbers()
        held = [turn for turn in view.history.line if view.history.steps[turn].record.number in numbers]
        self._snapshot_turn = held[-1] if held else 0
        editor.on_turn = self.turn

    def stop(self) -> None:
        """Write a snapshot of what is new, and listen no longer."""
        self.editor.on_turn = None
        if self.view.history.turn != self._snapshot_turn:
            self.snapshot()

    def turn(self, turn: AppliedTurn) -> None:
        """Record a turn that was applied. The editor calls this; if it raises, the turn is taken back."""
        if any(request.id is None for request in turn.requests):
            raise ValueError("a request of a session needs an id; call the session's edit, not that of its editor")
        start = time.perf_counter()
        # What a guard refused, and what a repair found in a trunk cache, cannot be done again from the requests alone.
        factors = self.view.manifest["detail"] == "factors" or turn.kind == "repair" or self.editor.guard is not None
        content, tensors = encode_turn(turn, factors=factors)
        if turn.kind == "edit":
            before = {request.id: self.view.history.predecessor(request.question) for request in turn.requests}
            content["supersedes"] = {new: old for new, old in before.items() if old is not None}
        self.step(content, tensors)
        turn.report.seconds["journal"] = time.perf_counter() - start

    def step(self, content: dict, tensors: dict[str, torch.Tensor]) -> None:
        """Record a change of the weights that was made, and now and then the whole state."""
        history = self.view.history
        stamp = {"turn": history.next_turn, "threads": torch.get_num_threads(), "config": self._config_digest}
        append(self.view, {**content, **stamp, "state": state_digests(self.editor.state_dict())}, tensors)
        line = history.line
        since = len(line) - (line.index(self._snapshot_turn) + 1 if self._snapshot_turn in line else 0)
        if since >= self.view.manifest["snapshot_every"]:
            self.snapshot()

    def snapshot(self) -> None:
        """Write the whole state. The turns in it are recorded already, so a disk that does not take it is no error."""
        turn = self.view.history.turn
        number = self.view.history.steps[turn].record.number if turn else 0
        try:
            self.view.snapshots.save(number, self.editor.state_dict())
        except OSError as error:
            warnings.warn(
                f"{self.view.snapshots.directory}: cannot write a snapshot after turn {turn} ({error.strerror}); the "
                "turns are in the journal, and opening the session takes longer",
                stacklevel=2,
            )
        else:
            self._snapshot_turn = turn
            self.prune()

    def prune(self) -> None:
        """Remove snapshots that are too many, or of turns that were rolled back."""
        steps = self.view.history.steps
        self.view.snapshots.prune([0, *(steps[turn].record.number for turn in self.view.history.line)])
