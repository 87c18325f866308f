"""A stream of edits that lives in a directory: it survives crashes, and every edit can be found and taken back."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from tqdm.auto import tqdm

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.data.spool import Spool
from stableedit_cpp.data.stream import LISTED, as_stream
from stableedit_cpp.editors import (
    EditInterrupted,
    Editor,
    EditorConfig,
    EditReport,
    StableEditConfig,
    make_editor,
)
from stableedit_cpp.editors.weights import Checkpoint
from stableedit_cpp.errors import DamagedJournal, SessionClosed
from stableedit_cpp.evaluation import DEFAULT_METRICS, Scores, evaluate
from stableedit_cpp.files.lock import HeldElsewhere, WriterLock
from stableedit_cpp.files.words import check_whole
from stableedit_cpp.lifelong.audit import AuditReport, audit
from stableedit_cpp.lifelong.index import Index
from stableedit_cpp.lifelong.journal.codec import encode_updates
from stableedit_cpp.lifelong.journal.opening import begin, editor_on, held, recover
from stableedit_cpp.lifelong.journal.restore import forget, restore
from stableedit_cpp.lifelong.journal.writer import Recorder
from stableedit_cpp.lifelong.naming import with_ids
from stableedit_cpp.lifelong.pending import with_ids_on_disk
from stableedit_cpp.lifelong.repair import RepairReport, repair
from stableedit_cpp.lifelong.revert import RevertReport, check_revertible, revert
from stableedit_cpp.lifelong.view import SessionView, check_directory, check_new_directory
from stableedit_cpp.model.ranks import ranks
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["LifelongSession"]


class LifelongSession(SessionView):
    """An editor whose every turn is on the disk before it counts.

    Make one with ``create`` or ``open``; use it as a context manager, or ``close()`` it. Only one process can have a
    session open. What a crash leaves behind is at most one turn short; opening it again gives the same bits.

    Attributes:
        editor: the editor; its model is edited in place.
    """

    editor: Editor
    _lock: WriterLock | HeldElsewhere | None = None
    _exact = True

    @classmethod
    def create(
        cls,
        directory: str | Path,
        model: torch.nn.Module,
        tokenizer,
        config: EditorConfig | None = None,
        *,
        detail: Literal["factors", "requests"] = "factors",
        snapshot_every: int = 10,
        keep_snapshots: int = 3,
        source: str | None = None,
    ) -> LifelongSession:
        """Begin a session with a model that was not edited yet.

        Args:
            directory: a new one, or an empty one.
            config: of StableEdit (the default) or of another editor.
            detail: "factors" writes down what each turn added and what the statistics saw, about
                ``4 (k + 2 v)`` bytes for each answer token, pass and edited module; turns are done again from that
                without running the model. "requests" writes down the requests only, and edits again; but not of turns
                that could come to other last digits then, those of an editor with anchors among them.
            snapshot_every: turns between two snapshots of the state, i.e. how many have to be done again at most.
            keep_snapshots: so many of the newest are kept, besides that of the beginning.
            source: name or path the model can be loaded from, for the command line; None takes what the model says.

        Raises:
            ValueError: for a directory with content, or a bad argument, ``detail="requests"`` with a chat template that
                writes the date among them.
            SessionWriteError: if the directory cannot be written; nothing is left of it then.
        """
        directory = Path(directory)
        ranks().everywhere("looking for a place", lambda: check_new_directory(directory))
        if detail not in ("factors", "requests"):
            raise ValueError(f"detail must be 'factors' or 'requests', not {detail!r}")
        check_whole("snapshot_every", snapshot_every)
        check_whole("keep_snapshots", keep_snapshots)
        settings = {"detail": detail, "snapshot_every": snapshot_every, "keep_snapshots": keep_snapshots}
        editor = make_editor(model, tokenizer, (config or StableEditConfig()).placed())
        if detail == "requests" and editor.form.dated(tokenizer):
            raise ValueError(
                "the chat template writes today's date into every prompt, so that turns that are edited again on "
                "another day would be others; detail must be 'factors' then"
            )
        ranks().by_lead("making a session", lambda: begin(directory, editor, settings, source))
        lock = held(directory)
        try:
            session = cls(directory, index=Index.to_write(directory))
            session._start(editor, lock)
        except BaseException:
            lock.release()
            raise
        return session

    @classmethod
    def open(
        cls,
        directory: str | Path,
        model: torch.nn.Module,
        tokenizer,
        *,
        exact: bool = True,
        progress: bool | None = None,
    ) -> LifelongSession:
        """Go on with a session.

        Args:
            model: the one the session was created with, unedited (or as this session left it); its edited weights are
                set to where the session stands.
            exact: insist on the bits that were recorded. Another machine may not reproduce them when turns have to be
                done again; False accepts that and records it.

        Raises:
            FileNotFoundError: if there is no session. SessionBusy: if another has it open.
            DamagedJournal: if turns that were done are lost; ``verify`` says more. What was in flight in a crash is cut
                off with a warning instead.
            OtherBits: see ``exact``.
            ValueError: for another model or tokenizer.
            OSError: if the directory cannot be written to.
        """
        directory = Path(directory)
        check_directory(directory)
        lock = held(directory)

        def read() -> LifelongSession:
            with tqdm(
                total=(directory / "journal").stat().st_size,
                desc="Checking the journal",
                unit="B",
                unit_scale=True,
                disable=None if progress is None else not progress,
                leave=False,
            ) as bar:
                session = cls(directory, bar.update, index=Index.to_write(directory))
            if session.writes:
                recover(session)
            return session

        try:
            session = ranks().lead_first("reading the journal", read)
            session._exact = exact
            session._start(editor_on(model, tokenizer, session, exact=exact, progress=progress), lock)
        except BaseException:
            lock.release()
            raise
        return session

    def _start(self, editor: Editor, lock: WriterLock | HeldElsewhere) -> None:
        self.editor = editor
        self._recorder = Recorder(self, editor)
        self._lock = lock

    def __enter__(self) -> LifelongSession:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @property
    def model(self) -> torch.nn.Module:
        """The edited model."""
        return self.editor.model

    def close(self) -> None:
        """Write a snapshot of what is new and let others open the session. The model stays as it is."""
        if self._lock is not None:
            try:
                self._recorder.stop()
            finally:
                self.index.detach()
                self._lock.release()
                self._lock = None

    def edit(
        self,
        requests: Iterable[EditRequest | Mapping[str, object]],
        *,
        outcomes: bool | None = None,
        progress: bool | None = None,
    ) -> EditReport:
        """Edit a stream of requests; each turn is on the disk before the next begins.

        A request supersedes a current one whose prompt it asks, as its prompt or with another answer as a variant.
        Requests without an id get one. What did not take (``outcomes``, see ``Editor.edit``) is for ``repair``: its ids
        are used.

        Returns:
            What each turn did.

        Raises:
            ValueError: for a bad request, or an id that was used before (``pending`` leaves those out).
            SessionWriteError: if the disk does not take a turn: it is taken back, the turns before it are done.
            EditInterrupted: after Ctrl-C, once the turn in flight is done.
            DriftLimitReached: see ``LocalityGuard``.
        """
        return self._run("edit", requests, outcomes, progress)

    def warm_up(
        self,
        requests: Iterable[EditRequest | Mapping[str, object]],
        *,
        outcomes: bool | None = None,
        progress: bool | None = None,
    ) -> EditReport:
        """Edit a training stream first, so that the statistics are settled; it stays in the model, but its requests are
        not among the current ones. Arguments, result and errors as ``edit``."""
        return self._run("warm_up", requests, outcomes, progress)

    def audit(
        self,
        sample: int | None = None,
        *,
        seed: int = 0,
        min_probability: float | None = None,
        trunk: TrunkCache | None = None,
        progress: bool | None = None,
    ) -> AuditReport:
        """Look which of the current requests hold: all, or a sample.

        Args:
            trunk: of ``editor.make_trunk_cache()``; makes the second audit, evaluation or repair cheaper. The others,
                their defaults, and what it raises: see ``lifelong.audit``.
        """
        self._check_open()
        settings = {"sample": sample, "seed": seed, "min_probability": min_probability}
        return audit(self.editor, self._current(), **settings, trunk=trunk, progress=progress)

    def evaluate(
        self,
        metrics: Collection[str] = (*DEFAULT_METRICS, "locality"),
        *,
        chat_template: bool | None = None,
        end_of_answer: bool = False,
        split_special_tokens: bool | None = None,
        trunk: TrunkCache | None = None,
        progress: bool | None = None,
    ) -> Scores:
        """Score the current requests; those that were superseded, reverted or rolled back are not asked.

        Args:
            metrics: see ``evaluate``; "locality" compares with the session's own unedited model.
            chat_template: ask in chats, or in plain text; None asks as the session edits.
            end_of_answer: see ``evaluate``.
            split_special_tokens: what spells a control token is text; None is as the session edits.
            trunk: see ``audit``.
        """
        self._check_open()
        form = {"chat_template": chat_template, "split_special_tokens": split_special_tokens}
        return evaluate(
            self.model,
            self.editor.tokenizer,
            self._current(),
            metrics=metrics,
            reference=self.editor.unedited if "locality" in metrics else None,
            **(self.editor.form.asked | {name: value for name, value in form.items() if value is not None}),
            end_of_answer=end_of_answer,
            max_tokens_per_forward=self.editor.config.max_tokens_per_forward,
            trunk=trunk,
            progress=progress,
        )

    def repair(
        self,
        *,
        rounds: int = 1,
        budget: int | None = None,
        min_probability: float | None = None,
        trunk: TrunkCache | None = None,
        progress: bool | None = None,
    ) -> RepairReport:
        """Solve again for the current requests that were forgotten: those that ``audit`` with the same
        ``min_probability`` finds. Each turn is recorded. Arguments, result and errors: see ``lifelong.repair``."""
        self._check_open()
        settings = {"rounds": rounds, "budget": budget, "min_probability": min_probability, "trunk": trunk}
        return repair(self.editor, self.current_requests(), **settings, progress=progress)

    def rollback(self, to_turn: int, *, progress: bool | None = None) -> None:
        """Restore weights and statistics as they were after a turn, bit for bit; 0 is before the first.

        What came after stays in the log; its requests count as never edited.

        Raises:
            ValueError: for a turn that is not in the model. OtherBits: if this machine cannot reproduce it.
            SessionWriteError: if the disk does not take the record. In all cases nothing has changed.
        """
        self._check_open()
        line = self.history.line_until(to_turn)
        cut = self.history.line[len(line) :]
        if not cut:
            raise ValueError(f"the session stands at turn {to_turn} already")

        def work(change: Checkpoint) -> None:
            restore(self, self.editor, line, exact=self._exact, progress=progress)
            self._recorder.rollback(change, {"kind": "rollback", "to_turn": to_turn, "cut": cut})

        self.editor.weights.change(work, f"a rollback to turn {to_turn}", by=self._recorder)
        self._recorder.prune()

    def revert(
        self,
        request_ids: str | Iterable[str],
        *,
        others: int | None = 200,
        seed: int = 0,
        bring_back: bool = True,
        progress: bool | None = None,
    ) -> RevertReport:
        """Take requests out of the model again, and bring back what the unedited model answered (see
        ``lifelong.revert``). A request with the same prompt that they superseded becomes current again.

        Args:
            others: so many of the other current requests, drawn by ``seed``, are held in place and scored before and
                after; None takes all. Their number decides how long it takes.
            bring_back: False only takes out what the requests added.

        Raises:
            ValueError: for an id that is not in the model, or was reverted before; or of an editor whose updates have
                no rows that belong to one request: only a rollback takes those back.
            SessionWriteError: if the disk does not take the record. In all cases nothing has changed.
        """
        self._check_open()
        ids = [request_ids] if isinstance(request_ids, str) else list(dict.fromkeys(request_ids))
        check_revertible(self.history, self.editor, ids)
        check_whole("others", others, 0, none=True)
        gone = {self.history.entries.number(id) for id in ids}
        numbers = [number for number in self.history.current_numbers() if number not in gone]
        if others is not None and others < len(numbers):
            numbers = random.Random(seed).sample(numbers, others)
        rest = list(self.history.parts(numbers))
        self._recorder.begin()

        def work(change: Checkpoint) -> RevertReport:
            report, added = revert(self, self.editor, ids, rest, bring_back=bring_back, progress=progress)
            tensors = {}
            for number, updates in enumerate(added):
                tensors |= encode_updates(updates, f"{number}/")
            content = {"kind": "revert", "requests": ids, "report": asdict(report), "updates": len(added)}
            content["again"] = report.again
            forget(self, self.editor, ids, report.again)
            self._recorder.step(change, content, tensors)
            return report

        report = self.editor.weights.change(work, f"taking out {', '.join(ids)}", by=self._recorder)
        self._recorder.snapshot_if_due()
        return report

    def _run(self, kind: str, requests: Iterable, outcomes: bool | None, progress: bool | None) -> EditReport:
        self._check_open()
        requests = as_stream(requests, progress=progress)
        done = self.history.warm_up if kind == "warm_up" else self.history.entries
        for index, request in enumerate(requests):
            if request.id in done:
                raise ValueError(
                    f"request {index} has the id {request.id!r}, which was edited before; leave out what is done "
                    "(session.pending), solve for it again (session.repair), or give it another id"
                )
        requests = with_ids_on_disk(requests, done) if isinstance(requests, Spool) else with_ids(requests, done)
        call = self.editor.warm_up if kind == "warm_up" else self.editor.edit
        try:
            return call(requests, outcomes=outcomes, progress=progress)
        except EditInterrupted as interrupt:
            raise EditInterrupted(
                f"stopped after turn {self.history.turn}, which is done: {interrupt.report.edits} of {len(requests)} "
                "requests are edited",
                interrupt.report,
            ) from None

    def _current(self) -> Sequence[EditRequest]:
        """The current requests, in memory only while they are few."""
        numbers = self.history.current_numbers()
        parts = self.history.parts(numbers)
        return list(parts) if len(numbers) <= LISTED else Spool(("", request) for request in parts)

    def _check_open(self) -> None:
        if self._lock is None:
            raise SessionClosed(f"the session {self.directory} is closed; open it again")
        if self.journal.damage is not None:  # what is in memory need not be what is on the disk
            raise DamagedJournal(f"{self.journal.path}: {self.journal.damage}")
