"""The index of a session: what its history is answered from, so that no record has to be read for it.

It says nothing that the journal does not say. A session's own lies beside its journal, in the file ``index.sqlite``,
and is made anew from the journal where it is missing, damaged, or not that of the journal as it is; whoever only looks
on has a copy of it, or one made for the occasion, in a temporary file.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from threading import get_ident
from typing import TypeVar

from stableedit_cpp.data.spool import scratch_database
from stableedit_cpp.lifelong.journal.places import Place, Places
from stableedit_cpp.model.ranks import ranks

__all__ = ["FILE", "Index", "remove_index"]

FILE = "index.sqlite"
_VERSION = 1
# Statements of one question lie one upon the other by the number of their request. gone_in: the turn of the revert that
# took one from the top. cut: the record of the rollback that took a step out.
_TABLES = """
CREATE TABLE stamp (records INTEGER, size INTEGER, changed INTEGER);
INSERT INTO stamp VALUES (0, 0, 0);
CREATE TABLE records (number INTEGER PRIMARY KEY, end INTEGER, tensor_bytes INTEGER, digest BLOB, text BLOB);
CREATE TABLE steps (turn INTEGER PRIMARY KEY, record INTEGER, cut INTEGER);
CREATE TABLE states (turn INTEGER PRIMARY KEY, record INTEGER);
CREATE TABLE requests (number INTEGER PRIMARY KEY, warm_up INTEGER, id TEXT, turn INTEGER, record INTEGER,
    place INTEGER, content BLOB, superseded_by INTEGER, reverted_in INTEGER);
CREATE INDEX requests_by_id ON requests (id, warm_up);
CREATE TABLE statements (question BLOB, number INTEGER, warm_up INTEGER, own INTEGER, answer BLOB, gone_in INTEGER);
CREATE INDEX statements_by_question ON statements (question);
CREATE INDEX statements_by_number ON statements (number);
CREATE TABLE repairs (number INTEGER, turn INTEGER, PRIMARY KEY (number, turn)) WITHOUT ROWID;
PRAGMA user_version = 1;
"""
_Result = TypeVar("_Result")


class Index:
    """A database with the tables of an index.

    Attributes:
        rows: what is in it, to be read by any thread; within ``change`` its thread may change it.

    Args:
        directory: of the session whose own it is, which outlives the process; None for a private one.
    """

    def __init__(self, rows: sqlite3.Connection, directory: Path | None = None) -> None:
        self._rows = rows
        self._directory = directory
        self._changed: sqlite3.Connection | None = None
        self._changing: int | None = None  # a thread

    @property
    def rows(self) -> sqlite3.Connection:
        return self._changed if self._changing == get_ident() else self._rows

    @classmethod
    def private(cls) -> Index:
        """An empty one in a temporary file."""
        index = cls(scratch_database())
        index.rows.executescript(_TABLES)
        return index

    @classmethod
    def to_write(cls, directory: Path) -> Index:
        """The session's own for the process that writes, and a copy for those that edit together with it."""
        return cls.on_disk(directory) if ranks().lead else cls.copy_of(directory)

    @classmethod
    def on_disk(cls, directory: Path) -> Index:
        """A session's own, for who holds its lock; a private one where the disk or file system does not let it be.

        Between changes the file is open for reading only, so that a file system can be made read-only meanwhile.
        """
        for _ in range(2):
            try:
                with contextlib.closing(sqlite3.connect(directory / FILE)) as rows:
                    if not rows.execute("SELECT * FROM sqlite_master").fetchone():
                        rows.executescript("BEGIN;" + _TABLES + "COMMIT;")
                    if _is_index(rows):
                        return cls(_reading(directory), directory)
            except sqlite3.OperationalError:  # no room, or no locks on this file system
                break
            except sqlite3.DatabaseError:
                pass
            with contextlib.suppress(OSError):
                remove_index(directory)
        return cls.private()

    @classmethod
    def copy_of(cls, directory: Path) -> Index:
        """A private copy of a session's own, as it was last written; an empty one where that cannot be read."""
        index = cls(scratch_database())
        try:
            with contextlib.closing(_reading(directory)) as own:
                if _is_index(own):
                    own.backup(index.rows)
                    return index
        except sqlite3.Error:
            pass
        return cls.private()

    def fits(self, journal: Path, *, growing: bool) -> bool:
        """Whether it is that of a journal: of the file as it was when this was last written, or, while that is
        ``growing``, of its beginning."""
        found = journal.stat()
        records, size, changed = self.rows.execute("SELECT * FROM stamp").fetchone()
        if records == 0:
            return False
        return (found.st_size, found.st_mtime_ns) == (size, changed) or (growing and found.st_size >= size)

    def change(self, work: Callable[[], _Result]) -> _Result:
        """Let ``work`` change what is in it, all or nothing, and write it down as that of the journal as it is then.

        Where the disk does not take it, ``work`` is done again on a private copy, which is the index from then on: the
        session's own is found to be older than the journal when it is opened again.
        """
        if self._directory is None or self._changing == get_ident():
            return work()
        try:
            with contextlib.closing(sqlite3.connect(self._directory / FILE, isolation_level=None)) as changed:
                changed.execute("PRAGMA cache_size=-32000")
                changed.execute("BEGIN IMMEDIATE")
                self._changed, self._changing = changed, get_ident()
                try:
                    result = work()
                finally:
                    self._changed = self._changing = None
                records = "(SELECT coalesce(max(number) + 1, 0) FROM records)"
                stamp = _stamped(self._directory / "journal")
                changed.execute(f"UPDATE stamp SET records = {records}, size = ?, changed = ?", stamp)
                changed.execute("COMMIT")
                return result
        except sqlite3.OperationalError:
            self.detach()
        return work()

    def clear(self) -> None:
        """Forget everything; within ``change``."""
        for table in ("records", "steps", "states", "requests", "statements", "repairs"):
            self.rows.execute(f"DELETE FROM {table}")
        self.rows.execute("UPDATE stamp SET records = 0, size = 0, changed = 0")

    def places(self) -> Places:
        """Where the records lie that it knows."""
        places = Places()
        for row in self.rows.execute("SELECT end, tensor_bytes, digest, text FROM records ORDER BY number"):
            places.add(Place(*row))
        return places

    def detach(self) -> None:
        """Go on with a private copy of it; for who gives the session's lock back."""
        if self._directory is not None:
            copy, before = scratch_database(), self._rows
            before.backup(copy)
            self._rows, self._directory = copy, None
            before.close()


def remove_index(directory: Path) -> None:
    """Remove a session's index; it is made anew when the session is opened."""
    for name in (FILE, f"{FILE}-journal"):
        (directory / name).unlink(missing_ok=True)


def _reading(directory: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{(directory / FILE).absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False)


def _is_index(rows: sqlite3.Connection) -> bool:
    version = rows.execute("PRAGMA user_version").fetchone()[0]
    return version == _VERSION and rows.execute("SELECT count(*) FROM stamp").fetchone()[0] == 1


def _stamped(journal: Path) -> tuple[int, int]:
    """Size and time of change of the journal, a time that no write of anybody else will give it: the system's own clock
    for that moves in steps."""
    with contextlib.suppress(OSError):
        moment = time.time_ns()
        os.utime(journal, ns=(moment, moment))
    found = journal.stat()
    return found.st_size, found.st_mtime_ns
