"""What may be done with a session on the page: each of it a job, done by one thread; and what came of it, for all to
see."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors import AppliedTurn, EditReport
from stableedit_cpp.editors.followers import Follower
from stableedit_cpp.evaluation import generate
from stableedit_cpp.lifelong import LifelongSession, audit
from stableedit_cpp.studio.jobs import Job, Stopped, Worker
from stableedit_cpp.studio.known import Known
from stableedit_cpp.studio.reading import read_file
from stableedit_cpp.studio.shipping import ship
from stableedit_cpp.studio.view import View, view_of

__all__ = ["Answers", "Desk"]

_STRETCH = 200  # requests that are audited between two looks at what else is to be done


class Answers(NamedTuple):
    """What both models say to a prompt."""

    edited: str
    unedited: str


class Desk(Follower):
    """A session, the one thread that works on it, and the view that everybody may look at.

    What is asked for is a ``Job``; nobody waits for it who does not want to. Use it as a context manager; it closes the
    session.

    Args:
        session: open; from now on only the desk's thread touches it.
        explain: the sentence for people that an error is.

    Attributes:
        worker: the thread and its jobs. view: the newest.
    """

    def __init__(self, session: LifelongSession, explain: Callable[[Exception], str] = str) -> None:
        self.session = session
        self.worker = Worker(explain)
        self.known = Known(session.directory)
        self.known.keep([0, *session.history.line])
        self._due = 0.0
        self.view = View()
        self._publish()

    def __enter__(self) -> Desk:
        self.session.editor.followers.add(self)
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("always", UserWarning)  # each job has its own
        show = warnings.showwarning

        def note(message, *about, **named) -> None:
            if not self.worker.note(str(message)):
                show(message, *about, **named)

        warnings.showwarning = note
        self.worker.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        """The turn in flight is done before the session is closed."""
        try:
            self.worker.close()
            self.session.editor.followers.remove(self)
            self.session.close()
        finally:
            self._warnings.__exit__(None, None, None)

    # --- what may be asked for ---

    def edit(self, requests: list[EditRequest], title: str) -> Job:
        """Edit what is not done yet."""
        return self.worker.submit(title, lambda: self._edit(requests))

    def edit_file(self, path: str | Path) -> Job:
        """Read a file, at once or after the turn in flight, and edit it when its turn comes."""
        name = Path(path).name

        def work() -> str:
            requests = read_file(path, self.session.editor.check)
            self.edit(requests, f"Edit {name}")
            pending = len(self.session.pending(requests))
            done = len(requests) - pending
            return f"{_many(pending, 'edit')} to do" + (f", {done} done before" if done else "")

        return self.worker.submit(f"Read {name}", work, quick=True)

    def ask(self, prompt: str, max_new_tokens: int) -> Job:
        """Answers of the edited and of the unedited model; its result is ``Answers``. After the turn in flight."""
        return self.worker.submit(f"Ask {prompt!r:.60}", lambda: self._ask(prompt, max_new_tokens), quick=True)

    def audit(self) -> Job:
        """Look which of the current edits hold."""
        return self.worker.submit("Audit", self._audit)

    def repair(self) -> Job:
        """Solve again for what is forgotten."""
        return self.worker.submit("Repair", self._repair)

    def revert(self, id: str) -> Job:
        """Take one edit out."""
        return self.worker.submit(f"Revert {id}", lambda: self._revert(id))

    def rollback(self, to_turn: int) -> Job:
        """Go back to how the model was after a turn."""
        return self.worker.submit(f"Roll back to turn {to_turn}", lambda: self._rollback(to_turn))

    def export(self, kind: str) -> Job:
        """Write the model where the session stands; ``kind`` of ``shipping.KINDS``."""
        return self.worker.submit(f"Export: {kind}", lambda: ship(self.session, kind))

    # --- the work, in the worker's thread ---

    def begin(self) -> None:
        """Before a turn: questions are answered, and who stopped the job is heard."""
        self.worker.breathe()

    def final(self, turn: AppliedTurn) -> None:
        failed = turn.report.failed
        if failed is not None and turn.kind != "warm_up":
            lost = {one.index for one in failed}
            ids = [request.id for request in turn.requests]
            took = [id for index, id in enumerate(ids) if index not in lost]
            self.known.note_turn(self.session.history.turn, took, [ids[index] for index in sorted(lost)])
        self._publish_if_due()

    def _edit(self, requests: list[EditRequest]) -> str:
        pending = self.session.pending(requests)
        self.session.editor.check(pending)
        if not pending:
            return "all of it was edited before; what is forgotten is for a repair"
        with self._published():
            try:
                return _said(self.session.edit(pending, progress=True))
            except Stopped as stop:
                done = f"{stop.report.edits} of {_many(len(pending), 'edit')} done"
                raise Stopped(f"stopped after turn {self.session.history.turn}, {done}") from None

    def _ask(self, prompt: str, max_new_tokens: int) -> Answers:
        editor = self.session.editor
        how = {"max_new_tokens": max_new_tokens, **editor.form.asked}
        edited = generate(editor.model, editor.tokenizer, prompt, **how)
        with editor.unedited() as model:
            unedited = generate(model, editor.tokenizer, prompt, **how)
        return Answers(edited[0], unedited[0])

    def _audit(self) -> str:
        editor, turn, entries = self.session.editor, self.session.history.turn, []
        requests = self.session.current_requests()
        with self._published():
            for begin in range(0, len(requests), _STRETCH):
                self.worker.breathe()
                entries += audit(editor, requests[begin : begin + _STRETCH], progress=True).entries
                self.known.note_audit(turn, entries[begin:])
                self._publish_if_due()
            held = sum(entry.holds for entry in entries)
            if entries:
                self.known.end_audit(turn, held, len(entries))
        return f"{held} of {_many(len(entries), 'edit')} hold" if entries else "there is no edit to audit"

    def _repair(self) -> str:
        with self._published():
            try:
                report = self.session.repair(progress=True)
            except Stopped:
                raise Stopped(f"stopped after turn {self.session.history.turn}; what is repaired stays") from None
            turn, lost = self.session.history.turn, set(report.after.forgotten)
            ids = [request.id for request in self.session.current_requests()]
            held = [id for index, id in enumerate(ids) if index not in lost]
            self.known.note_turn(turn, held, [ids[index] for index in lost])
            self.known.end_audit(turn, len(held), len(ids))
        return str(report)

    def _revert(self, id: str) -> str:
        with self._published():
            return str(self.session.revert(id, progress=True))

    def _rollback(self, to_turn: int) -> str:
        with self._published():
            self.session.rollback(to_turn, progress=True)
            self.known.keep([0, *self.session.history.line])
            return f"the model is what it was after turn {to_turn}, bit for bit"

    @contextmanager
    def _published(self) -> Iterator[None]:
        """Whatever ends this context, what is known by then is kept and shown."""
        try:
            yield
        finally:
            try:
                self.known.save()
            except OSError as error:  # the journal has the edits; this can be looked at again
                warnings.warn(f"{self.known.path}: {error.strerror or error}; an audit finds it again", stacklevel=2)
            self._publish()

    def _publish_if_due(self) -> None:
        """In the midst of a job: as often as it costs no more than a twentieth of the time."""
        if time.monotonic() >= self._due:
            self._publish(charts=False)

    def _publish(self, *, charts: bool = True) -> None:
        begin = time.monotonic()
        self.view = view_of(self.session, self.known, self.view, charts=charts)
        end = time.monotonic()
        self._due = end + 20 * (end - begin)


def _said(report: EditReport) -> str:
    looked = [turn for turn in report.turns if turn.failed is not None]
    said = f"{_many(report.edits, 'edit')} in {report.seconds:.1f} s"
    said += f", {sum(len(turn.failed) for turn in looked)} did not take" if looked else ""
    return said + (f"; other answers have drifted by {report.drift:.2g} nats" if report.drift is not None else "")


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
