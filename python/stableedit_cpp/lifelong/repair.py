"""Solves again for edits that were forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stableedit_cpp.data.request import EditRequest, as_requests
from stableedit_cpp.data.superseding import current_parts
from stableedit_cpp.editors.edit_report import EditReport
from stableedit_cpp.editors.editor import Editor
from stableedit_cpp.files.words import check_whole
from stableedit_cpp.lifelong.audit import AuditReport, audit
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["RepairReport", "repair"]


@dataclass(frozen=True)
class RepairReport:
    """What a repair did.

    Attributes:
        audits: before the first round, and after each; all over the same requests.
        rounds: what each round did to the weights.
        left_out: forgotten requests that the budget did not reach, in the last round.
    """

    audits: list[AuditReport]
    rounds: list[EditReport]
    left_out: int

    @property
    def before(self) -> AuditReport:
        return self.audits[0]

    @property
    def after(self) -> AuditReport:
        return self.audits[-1]

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {
            "audits": [found.to_dict() for found in self.audits],
            "rounds": [done.to_dict() for done in self.rounds],
            "left_out": self.left_out,
        }

    def __str__(self) -> str:
        solved = sum(done.edits for done in self.rounds)
        left = f"; the budget left out {self.left_out}" if self.left_out else ""
        return f"before: {self.before}\nafter:  {self.after}\n{solved} solved again in {len(self.rounds)} rounds{left}"


def repair(
    editor: Editor,
    requests: Iterable[EditRequest | Mapping[str, object]],
    *,
    rounds: int = 1,
    budget: int | None = None,
    min_probability: float | None = None,
    trunk: TrunkCache | None = None,
    progress: bool | None = None,
) -> RepairReport:
    """Audit what was edited and solve again for what does not hold, in turns like those of the stream.

    A repair disturbs a few edits that held, hence rounds. Statistics and past keys follow the rules of a retry within a
    turn (``retries_feed_statistics``; keys are not added twice). A turn is all or nothing, as always.

    Args:
        requests: what was edited, in the order of the stream; see ``audit`` for superseded ones.
        rounds: at most so many; it ends early when everything holds.
        budget: solve again for at most so many requests in all, those nearest to holding first; None has no limit.
        min_probability: see ``audit``.
        trunk: a trunk cache that holds these requests already; None makes one for the time of the repair.
        progress: show bars; None shows them on a terminal.

    Raises:
        ValueError: for a bad request or argument.
        EditInterrupted: after Ctrl-C, once the turn in flight is finished.
    """
    check_whole("rounds", rounds)
    check_whole("budget", budget, none=True)
    requests = as_requests(requests)
    parts = current_parts(requests)  # a repair must not bring back what a later request answers otherwise
    if trunk is None:
        trunk = editor.make_trunk_cache()
    arguments = {"min_probability": min_probability, "trunk": trunk, "progress": progress}
    audits, done, left_out = [audit(editor, requests, **arguments)], [], 0
    rest = len(requests) * rounds if budget is None else budget
    while len(done) < rounds and audits[-1].forgotten and rest > 0:
        nearest = sorted(audits[-1].entries, key=lambda entry: -entry.probability)
        chosen = sorted([entry.index for entry in nearest if not entry.holds][:rest])
        left_out = len(audits[-1].forgotten) - len(chosen)
        rest -= len(chosen)
        again = [parts[index] for index in chosen]
        done.append(editor.repair(again, trunk=trunk, outcomes=False, progress=progress))  # the audit says more
        audits.append(audit(editor, requests, **arguments))
    return RepairReport(audits, done, left_out)
