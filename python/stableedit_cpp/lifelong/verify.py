"""Looks a session directory over, without its model, and repairs what can be repaired."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stableedit_cpp.errors import DamagedSnapshot
from stableedit_cpp.files.lock import WriterLock
from stableedit_cpp.lifelong.history import STEPS
from stableedit_cpp.lifelong.index import Index, remove_index
from stableedit_cpp.lifelong.journal.journal import Damage
from stableedit_cpp.lifelong.journal.snapshots import Snapshots
from stableedit_cpp.lifelong.journal.writer import append
from stableedit_cpp.lifelong.view import SessionView, check_directory

__all__ = ["VerifyReport", "verify"]


@dataclass
class VerifyReport:
    """What is wrong with a session. ``str()`` is for people.

    Attributes:
        records, snapshots: how many were checked.
        problems: a sentence each.
        repairs: what ``repair`` did about them, or would do.
        repaired: whether it did.
    """

    directory: str
    records: int = 0
    snapshots: int = 0
    problems: list[str] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)
    repaired: bool = False

    @property
    def sound(self) -> bool:
        return not self.problems or self.repaired

    def __str__(self) -> str:
        lines = [f"{self.directory}: {self.records} records and {self.snapshots} snapshots checked"]
        lines += [f"  problem: {problem}" for problem in self.problems] or ["  all sound"]
        lines += [f"  {'done' if self.repaired else 'with --repair'}: {repair}" for repair in self.repairs]
        return "\n".join(lines)


def verify(directory: str | Path, *, repair: bool = False) -> VerifyReport:
    """Check every record and every snapshot.

    Args:
        repair: the consent to go on without what is lost: the journal is cut off where it stops being usable (the bytes
            are kept aside, and the requests that can still be read in them are written to a file, to be edited again),
            and snapshots that cannot be used are removed.

    Raises:
        FileNotFoundError: if there is no session. DamagedJournal: if its first record is lost.
        SessionBusy, OSError: with ``repair``, as ``LifelongSession.open``.
    """
    directory = Path(directory)
    check_directory(directory)
    lock = WriterLock(directory) if repair else None
    try:
        # Before the journal: a snapshot that a writer adds meanwhile is of a record that is not read any more.
        numbers = Snapshots(directory / "snapshots", keep=1).numbers()
        if repair:
            remove_index(directory)
        return _verify(SessionView(directory, index=Index.private()), numbers, repair)
    finally:
        if lock is not None:
            lock.release()


def _verify(view: SessionView, numbers: Sequence[int], repair: bool) -> VerifyReport:
    report = VerifyReport(str(view.directory), len(view.journal.records))
    damage = view.journal.damage if repair else view.damage  # to repair it, we are the writer
    aside = (
        view.directory / "removed" / f"record-{damage.record}-at-{damage.offset}-{time.time_ns()}" if damage else None
    )
    if damage is not None:
        report.problems.append(f"{view.journal.path}: {damage}; {_lost(damage)}")
        report.repairs.append(
            f"cut the journal off at byte {damage.offset} and keep the {damage.size} bytes in {aside}"
        )
        requests = _requests(damage)
        if requests:
            report.repairs.append(f"write {len(requests)} lost requests to {aside}.jsonl, to be edited again")
    bad = _bad_snapshots(view, numbers, report)
    if repair and report.problems:
        if damage is not None:
            _cut(view, damage, aside)
        for path in bad:
            path.unlink()
        report.repaired = True
    return report


def _bad_snapshots(view: SessionView, numbers: Sequence[int], report: VerifyReport) -> list[Path]:
    known = {view.history.number(turn): turn for turn in range(view.history.next_turn)}
    bad = []
    for number in numbers:
        path = view.snapshots.path(number)
        try:
            if number not in known:
                raise DamagedSnapshot(f"the snapshot {path} is of a record that the journal does not have")
            view.snapshots.load(number, view.history.states[known[number]])
        except DamagedSnapshot as error:
            if not path.exists():  # a writer has newer ones
                continue
            bad.append(path)
            report.problems.append(f"{error}")
            report.repairs.append(f"remove {path}")
        report.snapshots += 1
    return bad


def _lost(damage: Damage) -> str:
    if damage.in_flight:
        return "it was in flight, no turn that was done is lost"
    turns = [record.content["turn"] for record in damage.readable if record.content["kind"] in STEPS]
    text = "that record and all that followed it are lost"
    return text + f", turn {turns[0]} to {turns[-1]} among them" if turns else text


def _requests(damage: Damage) -> list[dict]:
    """Requests of the records that can still be read after the damage."""
    return [
        fields
        for record in damage.readable
        if record.content["kind"] == "edit"
        for fields in record.content["requests"]
    ]


def _cut(view: SessionView, damage: Damage, aside: Path) -> None:
    aside.parent.mkdir(exist_ok=True)
    requests = _requests(damage)
    if requests:
        lines = "".join(json.dumps(fields, ensure_ascii=False) + "\n" for fields in requests)
        aside.with_name(aside.name + ".jsonl").write_text(lines, encoding="utf-8")
    view.journal.cut(aside)
    reason = f"cut off with consent: {damage}"
    append(view, {"kind": "recovered", "reason": reason, "bytes": damage.size, "aside": aside.name})
