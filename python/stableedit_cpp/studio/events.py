"""What each event of the page does: asks the desk for a job, or shows its view. Nothing here touches the model."""

from __future__ import annotations

import gradio as gr

from stableedit_cpp.studio.desk import Desk
from stableedit_cpp.studio.jobs import Job
from stableedit_cpp.studio.reading import read_fact
from stableedit_cpp.studio.rows import Row, counts, filtered
from stableedit_cpp.studio.words import heading, work

__all__ = ["Events"]

_ROWS = 200  # of the table, and turns, that are sent to a page


class Events:
    """The functions behind the page, each with the values of its components; all may be called at once."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    # --- what changes the model: a sentence, at once ---

    def add_fact(self, prompt: str, answer: str, subject: str = "", paraphrases: str = "") -> str:
        try:
            fact = read_fact(prompt or "", answer or "", subject or "", paraphrases or "")
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return _asked(self.desk.edit([fact], f"Edit {fact.prompt!r:.60} → {fact.target!r:.40}"))

    def add_file(self, file: str | None) -> str:
        """The job's own number is that of reading it; what is edited follows as another."""
        if not file:
            raise gr.Error("choose a file of edits first", print_exception=False)
        return _asked(self.desk.edit_file(file))

    def audit(self) -> str:
        return _asked(self.desk.audit())

    def repair(self) -> str:
        return _asked(self.desk.repair())

    def revert(self, id: str) -> str:
        if not (id or "").strip():
            raise gr.Error("choose an edit of the table, or give its id", print_exception=False)
        return _asked(self.desk.revert(id.strip()))

    def rollback(self, to_turn: str | int) -> str:
        return _asked(self.desk.rollback(_turn(to_turn)))

    def export(self, kind: str) -> str:
        return _asked(self.desk.export(kind))

    def stop(self) -> None:
        """The present job ends after its turn."""
        job = self.desk.worker.current
        if job is not None:
            self.desk.worker.stop(job)

    # --- what is looked at ---

    def ask(self, prompt: str, max_new_tokens: float = 24) -> tuple[str, str]:
        """Waits for the turn in flight, if there is one."""
        if not (prompt or "").strip():
            raise gr.Error("give a prompt", print_exception=False)
        job = self.desk.ask(prompt, int(max_new_tokens))
        job.over.wait()
        if job.state != "done":
            raise gr.Error(job.said or "the studio closes", print_exception=False)
        return job.result.edited, job.result.unedited

    def work(self) -> tuple[str, object]:
        """How far the work is, and whether there is something to stop."""
        worker = self.desk.worker
        return work(worker), gr.Button(visible=worker.current is not None)

    def refresh(self, seen: int, text: str, state: str) -> list[object]:
        """All that shows the session, if it is another than the tab has seen."""
        view = self.desk.view
        if view.version == seen:
            return [gr.skip()] * 6
        turns = [list(turn) for turn in view.turns[:0:-1][:_ROWS] + view.turns[:1]]
        return [view.version, heading(view), *self.table(text, state), turns, view.charts or "nothing to draw yet"]

    def table(self, text: str, state: str) -> tuple[list[list[object]], str]:
        rows = self._rows(text, state)
        said = f"{len(rows)} of {len(self.desk.view.rows)} edits"
        said += f", the newest {_ROWS} of them shown" if len(rows) > _ROWS else ""
        return [[*row[1:], row.id] for row in rows[:_ROWS]], said

    def choose(self, text: str, state: str, chosen: gr.SelectData) -> tuple[str, str]:
        """Id and prompt of the row that was chosen."""
        id = chosen.row_value[-1]
        row = next((row for row in self._rows(text, state) if row.id == id), None)
        return id, row.prompt if row else gr.skip()

    def choose_turn(self, chosen: gr.SelectData) -> str:
        return str(chosen.row_value[0])

    def ask_whether(self, to_turn: str) -> tuple[object, str]:
        """What a rollback would take out."""
        to_turn = _turn(to_turn)
        gone = [turn for turn in self.desk.view.line if turn > to_turn]
        edits = sum(row.turn > to_turn for row in self.desk.view.rows)
        text = f"This takes {len(gone)} turns with {edits} edits out of the model. They stay in the journal, but do "
        return gr.Group(visible=True), text + "not come back unless they are edited again."

    def status(self) -> dict:
        """Where the session stands, for programs: directory, turn, number of edits by state, and whether work is done
        or waits."""
        view, worker = self.desk.view, self.desk.worker
        busy = any(not job.over.is_set() for job in list(worker.jobs))
        return {"directory": view.directory, "turn": view.turn, "edits": counts(view.rows), "busy": busy}

    def job(self, number: int) -> dict:
        """A job by the number that it was given, for programs: title, state, what came of it, and warnings."""
        job = next((job for job in list(self.desk.worker.jobs) if job.number == number), None)
        if job is None:
            raise gr.Error(f"there is no job {number}, or no longer", print_exception=False)
        return {"title": job.title, "state": job.state, "said": job.said, "notes": job.notes}

    def _rows(self, text: str, state: str) -> list[Row]:
        return filtered(self.desk.view.rows, text or "", None if state in (None, "all") else state)


def _asked(job: Job) -> str:
    return f"job {job.number}: {job.title}"


def _turn(chosen: str | int) -> int:
    try:
        return int(chosen)
    except (TypeError, ValueError):
        raise gr.Error("choose a turn of the table, or give its number", print_exception=False) from None
