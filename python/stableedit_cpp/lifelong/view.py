"""What a session directory says, without its model: for status, log and verification, also while another writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.errors import DamagedJournal
from stableedit_cpp.files.lock import writer
from stableedit_cpp.files.words import check_format
from stableedit_cpp.lifelong.history import STEPS, History
from stableedit_cpp.lifelong.journal.journal import Damage, Journal
from stableedit_cpp.lifelong.journal.record import Record
from stableedit_cpp.lifelong.journal.snapshots import Snapshots
from stableedit_cpp.lifelong.status import LogEntry, SessionStatus, describe
from stableedit_cpp.model.ranks import ranks

__all__ = ["FORMAT", "SessionView", "check_directory", "check_new_directory"]

# Version 1 had digests of the state in its records, which the reader tells by their length.
FORMAT = {"format": "stableedit-session", "version": 2}


class SessionView:
    """A session directory, read only.

    Attributes:
        directory: where it is. journal: its records. history: what they add up to. snapshots: its snapshots.
        manifest: what it was created with.
        writes: whether this process is the one that writes, of those that edit together (``data_parallel``).

    Args:
        on_read: called with a number of bytes while the journal is read.

    Raises:
        FileNotFoundError: if there is no session. DamagedJournal: if not even its first record can be used.
    """

    def __init__(self, directory: str | Path, on_read: Callable[[int], object] | None = None) -> None:
        self.directory = Path(directory)
        self.writes = ranks().lead
        check_directory(self.directory)
        written = writer(self.directory) is not None
        self.journal = Journal(self.directory, on_read)
        self._written = written or (self.journal.damage is not None and writer(self.directory) is not None)
        if not self.journal.records:
            raise DamagedJournal(
                f"{self.journal.path}: {self.journal.damage}; without its first record a session is lost"
            )
        self.manifest = self.journal.records[0].content
        known = FORMAT | ({"version": 1} if self.manifest.get("version") == 1 else {})
        check_format(self.manifest, **known, what=f"the session {directory}", writer="`stableedit session create`")
        self.history = History(self.journal.records)
        self.snapshots = Snapshots(self.directory / "snapshots", self.manifest["keep_snapshots"])

    @property
    def damage(self) -> Damage | None:
        """What is wrong with the journal, for those who look on: a record in flight is no damage while somebody has
        the session open for writing, who is just writing it."""
        damage = self.journal.damage
        return None if damage is not None and damage.in_flight and self._written else damage

    def current_requests(self) -> list[EditRequest]:
        """The edits that hold, in order: neither reverted, nor superseded by a later one that asks the same, nor rolled
        back; without those variants that a later one answers otherwise. Their ids are set."""
        return self.history.current()

    def pending(
        self, requests: Iterable[EditRequest | Mapping[str, object]], *, warm_up: bool = False
    ) -> list[EditRequest]:
        """What is left of a file of requests, with ids: what is done is left out, what was reverted or superseded since
        is not.

        A request is known again by its prompt, its target, its variants and, if it has one, its id; the second of the
        same in the file is the second that was edited. One that is asked for again, or whose id another request had,
        gets a new id: that with a number, "pope-2".
        """
        return self.history.pending(requests, warm_up=warm_up)

    def status(self) -> SessionStatus:
        """Where the session stands."""
        states = [entry.state.split()[0] for entry in self.history.entries.values()]
        snapshots = self.snapshots.sizes()
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
            snapshot_bytes=sum(snapshots.values()),
            turns_since_snapshot=len(line) - 1 - last,
            damage=str(self.damage) if self.damage else None,
            writer=writer(self.directory),
        )

    def log(self) -> list[LogEntry]:
        """What happened, record by record; also what was rolled back since."""
        return [self._entry(record) for record in self.journal.records]

    def _entry(self, record: Record) -> LogEntry:
        content = record.content
        kind, turn = content["kind"], content.get("turn")
        in_model = kind not in STEPS or turn in self.history.line
        text = describe(content)
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
