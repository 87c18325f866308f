"""What a session directory says, without its model: for status, log and verification, also while another writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.errors import DamagedJournal
from stableedit_cpp.files.lock import writer
from stableedit_cpp.files.words import check_format
from stableedit_cpp.lifelong.history import STEPS, History
from stableedit_cpp.lifelong.index import Index
from stableedit_cpp.lifelong.journal.journal import Damage, Journal
from stableedit_cpp.lifelong.journal.record import START, Record, UnreadableRecord, read_record
from stableedit_cpp.lifelong.journal.snapshots import Snapshots
from stableedit_cpp.lifelong.status import LogEntry, SessionStatus, describe
from stableedit_cpp.model.ranks import ranks

__all__ = ["FORMAT", "SessionView", "check_directory", "check_new_directory", "manifest_of"]

# Version 1 had digests of the state in its records, which the reader tells by their length.
FORMAT = {"format": "stableedit-session", "version": 2}


class SessionView:
    """A session directory, read only.

    Attributes:
        directory: where it is. journal: its records. history: what they add up to. index: of that.
        snapshots: its snapshots. manifest: what it was created with.
        writes: whether this process is the one that writes, of those that edit together (``data_parallel``).

    Args:
        on_read: called with a number of bytes while the journal is read.
        index: of the session; None takes a copy of its own, so that only those records are read that are not in it. An
            empty one has every record read and checked.

    Raises:
        FileNotFoundError: if there is no session. DamagedJournal: if not even its first record can be used.
    """

    def __init__(
        self,
        directory: str | Path,
        on_read: Callable[[int], object] | None = None,
        *,
        index: Index | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.writes = ranks().lead
        check_directory(self.directory)
        written = writer(self.directory) is not None
        looking_on = index is None
        self.index = Index.copy_of(self.directory) if index is None else index
        if self.index.fits(self.directory / "journal", growing=written and looking_on):
            self._read(on_read)
        else:
            self.index.change(lambda: self.index.clear() or self._read(on_read))
        self._written = written or (self.journal.damage is not None and writer(self.directory) is not None)
        if not self.journal.records:
            raise DamagedJournal(
                f"{self.journal.path}: {self.journal.damage}; without its first record a session is lost"
            )
        self.manifest = dict(self.journal.records[0].content)
        _check_format(self.directory, self.manifest)
        self.snapshots = Snapshots(self.directory / "snapshots", self.manifest["keep_snapshots"])

    def _read(self, on_read: Callable[[int], object] | None) -> None:
        """Read what is not in the index."""
        self.history = History(index=self.index, record=lambda number: self.journal.records[number])
        self.journal = Journal(self.directory, on_read, self._take, self.index.places())

    def _take(self, record: Record) -> None:
        if record.number == 0:
            _check_format(self.directory, record.content)
        self.history.add(record)

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
    ) -> Sequence[EditRequest]:
        """What is left of a file of requests, with ids: what is done is left out, what was reverted or superseded since
        is not.

        A request is known again by its prompt, its target, its variants and, if it has one, its id; the second of the
        same in the file is the second that was edited. One that is asked for again, or whose id another request had,
        gets a new id: that with a number, "pope-2". Of a long stream (``open_requests``) what is left is on the disk,
        too.
        """
        return self.history.pending(requests, warm_up=warm_up)

    def status(self) -> SessionStatus:
        """Where the session stands."""
        counts = self.history.counts()
        snapshots = self.snapshots.sizes()
        line = [0, *map(self.history.number, self.history.line)]
        last = max((line.index(number) for number in snapshots if number in line), default=0)
        return SessionStatus(
            directory=str(self.directory),
            model=self.manifest["model"]["source"],
            editor=self.manifest["config"]["editor"],
            detail=self.manifest["detail"],
            created=self.manifest["time"],
            turn=self.history.turn,
            **counts,
            records=len(self.journal.records),
            journal_bytes=self.journal.end,
            snapshots=len(snapshots),
            snapshot_bytes=sum(snapshots.values()),
            turns_since_snapshot=len(line) - 1 - last,
            damage=str(self.damage) if self.damage else None,
            writer=writer(self.directory),
        )

    def log(self, last: int | None = None) -> list[LogEntry]:
        """What happened, record by record; also what was rolled back since.

        Args:
            last: only so many records, those at the end.
        """
        records = self.journal.records
        begin = 0 if last is None else max(0, len(records) - last)
        return [self._entry(records[number]) for number in range(begin, len(records))]

    def _entry(self, record: Record) -> LogEntry:
        content = record.content
        kind, turn = content["kind"], content.get("turn")
        in_model = kind not in STEPS or turn not in self.history.cut
        text = describe(content)
        if not in_model:
            text += f" [rolled back in record {self.history.cut[turn]}]"
        return LogEntry(record.number, content["time"], kind, turn, in_model, text)


def manifest_of(directory: str | Path) -> Mapping[str, object]:
    """What a session was created with: its first record, and no other is read. Raises as ``SessionView``."""
    directory = Path(directory)
    check_directory(directory)
    try:
        with (directory / "journal").open("rb") as file:
            manifest = read_record(file, 0, 0, START).content
    except UnreadableRecord:
        return SessionView(directory).manifest  # which says what is wrong with it
    _check_format(directory, manifest)
    return manifest


def _check_format(directory: Path, manifest: Mapping[str, object]) -> None:
    known = FORMAT | ({"version": 1} if manifest.get("version") == 1 else {})
    check_format(manifest, **known, what=f"the session {directory}", writer="`stableedit session create`")


def check_directory(directory: Path) -> None:
    """Raise FileNotFoundError unless there is a session."""
    if not (directory / "journal").exists():
        raise FileNotFoundError(f"{directory} is no session directory: it has no file 'journal'")


def check_new_directory(directory: Path) -> None:
    """Raise ValueError unless a session can be made there."""
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not an empty directory; choose another for the session")
