"""A session as the page shows it at one moment."""

from __future__ import annotations

from dataclasses import dataclass, field

from stableedit_cpp.lifelong import LifelongSession
from stableedit_cpp.lifelong.history import STEPS
from stableedit_cpp.studio.charts import charts_of, drift_points
from stableedit_cpp.studio.known import Known
from stableedit_cpp.studio.rows import Row, row_of

__all__ = ["View", "view_of"]

_LOG = 1000  # records of which the page has a line


@dataclass(frozen=True)
class View:
    """A session at one moment; nothing of it changes any more.

    Attributes:
        version: another number, another view. line: the turns in the model. rows: the edits, in order.
        turns: the unedited model, 0, and the last of the line, when, and what each did.
        charts: HTML. directory, model, editor: for the heading.
    """

    version: int = 0
    directory: str = ""
    model: str = ""
    editor: str = ""
    line: list[int] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    turns: list[tuple[int, str, str]] = field(default_factory=list)
    charts: str = ""

    @property
    def turn(self) -> int:
        """The last in the model."""
        return self.line[-1] if self.line else 0


def view_of(session: LifelongSession, known: Known, old: View, *, charts: bool) -> View:
    """The session as it is now.

    Args:
        old: the view before. charts: False leaves those of that as they are.
    """
    rows = [row_of(entry, known.found) for entry in session.history.entries.values()]
    manifest = session.manifest
    turns = [(0, _minute(manifest["time"]), "the unedited model")]
    turns += [
        (entry.turn, _minute(entry.time), f"{entry.kind.replace('_', '-')}: {entry.text}")
        for entry in session.log(_LOG)
        if entry.kind in STEPS and entry.in_model
    ]
    drawn = charts_of(drift_points(session), rows, known.audits) if charts else old.charts
    names = (str(session.directory), str(manifest["model"]["source"]), manifest["config"]["editor"])
    return View(old.version + 1, *names, list(session.history.line), rows, turns, drawn)


def _minute(time: str) -> str:
    return time[:16].replace("T", " ")
