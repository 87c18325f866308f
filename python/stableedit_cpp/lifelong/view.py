"""What a session directory says, without its model: for status, log and verification, also while another writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.errors import DamagedJournal
from stableedit_cpp.files.lock import writer
from stableedit_cpp.files.words import check_format
from stableedit_cpp.lifelong.history import STEPS, History
from stableedit_cpp.lifelong.journal.journal import Journal
from stableedit_cpp.lifelong.journal.record import Record
from stableedit_cpp.lifelong.journal.snapshots import Snapshots

__all__ = ["FORMAT", "LogEntry", "SessionStatus", "SessionView", "check_directory", "check_new_directory"]

FORMAT = {"format": "stableedit-session", "version": 1}


@dataclass(frozen=True)
class SessionStatus:
    """Where a session stands. ``str()`` is for people, ``asdict`` for JSON.

    Attributes:
        turn: the last step in the model. edits, warm_up: requests that were edited and are in the line of the model.
        current, superseded, reverted: how many of the edits are what.
        turns_since_snapshot: so many have to be done again after a crash.
        damage: what is wrong with the journal, if anything.
        writer: who has it open for writing.
    """

    directory: str
    model: str | None
    editor: str
    detail: str
    created: str
    turn: int
    edits: int
    warm_up: int
    current: int
    superseded: int
    reverted: int
    records: int
    journal_bytes: int
    snapshots: int
    snapshot_bytes: int
    turns_since_snapshot: int
    damage: str | None
    writer: str | None

    def __str__(self) -> str:
        lines = [
            f"session       {self.directory} ({self.editor}, {self.model or 'model of no recorded name'})",
            f"created       {self.created}, journal of {self.detail}",
            f"turn          {self.turn}",
            f"requests      {self.current} current, {self.superseded} superseded, {self.reverted} reverted; "
            f"{self.warm_up} of the warm-up",
            f"journal       {self.records} records, {_size(self.journal_bytes)}",
            f"snapshots     {self.snapshots}, {_size(self.snapshot_bytes)}; {self.turns_since_snapshot} turns since "
            "the last",
            f"writer        {'open ' + self.writer if self.writer else 'none'}",
        ]
        return "\n".join([*lines, f"DAMAGED       {self.damage}"] if self.damage else lines)


@dataclass(frozen=True)
class LogEntry:
    """One record of the journal, for people. ``turn`` is None for what changes no weights."""

    record: int
    time: str
    kind: str
    turn: int | None
    in_model: bool
    text: str

    def __str__(self) -> str:
        turn = "" if self.turn is None else f"turn {self.turn}"
        return f"{self.record:>5}  {self.time}  {turn:<10}{self.kind:<10}{self.text}"


class SessionView:
    """A session directory, read only.

    Attributes:
        directory: where it is. journal: its records. history: what they add up to. snapshots: its snapshots.
        manifest: what it was created with.

    Args:
        on_read: called with a number of bytes while the journal is read.

    Raises:
        FileNotFoundError: if there is no session. DamagedJournal: if not even its first record can be used.
    """

    def __init__(self, directory: str | Path, on_read: Callable[[int], object] | None = None) -> None:
        self.directory = Path(directory)
        check_directory(self.directory)
        self.journal = Journal(self.directory, on_read)
        if not self.journal.records:
            raise DamagedJournal(
                f"{self.journal.path}: {self.journal.damage}; without its first record a session is lost"
            )
        self.manifest = self.journal.records[0].content
        check_format(self.manifest, **FORMAT, what=f"the session {directory}", writer="`stableedit session create`")
        self.history = History(self.journal.records)
        self.snapshots = Snapshots(self.directory / "snapshots", self.manifest["keep_snapshots"])

    def current_requests(self) -> list[EditRequest]:
        """The edits that hold, in order: neither reverted, nor superseded by a later one with the same prompt, nor
        rolled back. Their ids are set."""
        return self.history.current()

    def pending(
        self, requests: Iterable[EditRequest | Mapping[str, object]], *, warm_up: bool = False
    ) -> list[EditRequest]:
        """What is left of a file of requests, with ids: what is done is left out, what was reverted or superseded since
        is not.

        A request is known again by its prompt and target and, if it has one, its id; the second of the same in the file
        is the second that was edited. One that is asked for again, or whose id another request had, gets a new id: that
        with a number, "pope-2".
        """
        return self.history.pending(requests, warm_up=warm_up)

    def status(self) -> SessionStatus:
        """Where the session stands."""
        states = [entry.state.split()[0] for entry in self.history.entries.values()]
        snapshots = self.snapshots.numbers()
        line = [0, *(self.history.steps[turn].record.number for turn in self.history.line)]
        last = max((line.index(number) for number in snapshots if number in line), default=0)
        return SessionStatus(
            directory=str(self.directory),
            model=self.manifest["model"]["source"],
            editor=self.manifest["config"]["editor"],
            detail=self.manifest["detail"],
            created=self.manifest["time"],
            turn=self.history.turn,
            edits=len(states),
            warm_up=len(self.history.warm_up),
            current=states.count("current"),
            superseded=states.count("superseded"),
            reverted=states.count("reverted"),
            records=len(self.journal.records),
            journal_bytes=self.journal.end,
            snapshots=len(snapshots),
            snapshot_bytes=sum(self.snapshots.path(number).stat().st_size for number in snapshots),
            turns_since_snapshot=len(line) - 1 - last,
            damage=str(self.journal.damage) if self.journal.damage else None,
            writer=writer(self.directory),
        )

    def log(self) -> list[LogEntry]:
        """What happened, record by record; also what was rolled back since."""
        return [self._entry(record) for record in self.journal.records]

    def _entry(self, record: Record) -> LogEntry:
        content = record.content
        kind, turn = content["kind"], content.get("turn")
        in_model = kind not in STEPS or turn in self.history.line
        text = _TEXTS[kind](content)
        if not in_model:
            text += f" [rolled back in record {self.history.cut[turn]}]"
        return LogEntry(record.number, content["time"], kind, turn, in_model, text)


def check_directory(directory: Path) -> None:
    """Raise FileNotFoundError unless there is a session."""
    if not (directory / "journal").exists():
        raise FileNotFoundError(f"{directory} is no session directory: it has no file 'journal'")


def check_new_directory(directory: Path) -> None:
    """Raise ValueError unless a session can be made there."""
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not an empty directory; choose another for the session")


def _turn_text(content: dict) -> str:
    report = content["report"]
    text = f"{report['requests']} requests, {content['passes']} pass{'es' * (content['passes'] != 1)}"
    text += f", efficacy before {report['efficacy_before']:.2f}"
    for new, old in content.get("supersedes", {}).items():
        text += f"; {new} supersedes {old}"
    return text


_TEXTS: dict[str, Callable[[dict], str]] = {
    "created": lambda content: f"{content['config']['editor']} on {content['model']['source']}",
    "warm_up": _turn_text,
    "edit": _turn_text,
    "repair": _turn_text,
    "revert": lambda content: f"took out {', '.join(content['requests'])}",
    "rollback": lambda content: (
        f"back to turn {content['to_turn']}; out of the model: turns " + ", ".join(map(str, content["cut"]))
    ),
    "recovered": lambda content: f"{content['reason']}; {content['bytes']} bytes are kept in {content['aside']}",
    "moved": lambda content: content["reason"],
}


def _size(count: float) -> str:
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        del units[0]
    return f"{count:.3g} {units[0]}"
