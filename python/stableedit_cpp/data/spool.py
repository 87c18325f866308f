"""Requests on the disk: those of a stream that is checked as a whole before it is worked on, however long it is.

SQLite keeps them in a temporary file that is gone with the process (where: ``TMPDIR``), and a few tens of megabytes of
it in memory.
"""

from __future__ import annotations

import pickle
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from itertools import groupby, islice
from operator import itemgetter

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.data.statements import Statement, statements_of

__all__ = ["Seen", "Spool", "scratch_database"]

_FIELDS = tuple(field.name for field in fields(EditRequest))
_CHUNK = 1000  # requests that are written or read at once
_TABLES = """
CREATE TABLE requests (number INTEGER PRIMARY KEY, place TEXT, request BLOB);
CREATE TABLE statements (question BLOB, number INTEGER, own INTEGER, answer BLOB);
"""


def scratch_database() -> sqlite3.Connection:
    """An empty database in a temporary file, which grows on the disk and not in memory. Any thread may use it."""
    database = sqlite3.connect("", check_same_thread=False)
    database.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-32000;")
    return database


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(
            f"the requests of the stream cannot be kept in a temporary file ({error}); it takes about twice the bytes "
            "of their texts, in the directory that TMPDIR names"
        ) from error


class Seen:
    """Where each name was first seen, on the disk: what a dict does for few names."""

    def __init__(self) -> None:
        self._database = scratch_database()
        self._database.execute("CREATE TABLE seen (name TEXT PRIMARY KEY, place) WITHOUT ROWID")

    def get(self, name: str) -> object:
        """None for one that was not seen."""
        row = self._database.execute("SELECT place FROM seen WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def __contains__(self, name: object) -> bool:
        return self.get(name) is not None

    def __setitem__(self, name: str, place: object) -> None:
        with _room():
            self._database.execute("INSERT OR REPLACE INTO seen VALUES (?, ?)", (name, place))

    def add(self, name: str) -> None:
        self[name] = 0


class Spool(Sequence[EditRequest]):
    """A sequence of requests that is on the disk; those that are looked at are read anew each time.

    Args:
        placed: each with where it comes from, "line 3" say.

    Raises:
        OSError: if the temporary file cannot be written; and what ``placed`` raises.
    """

    def __init__(self, placed: Iterable[tuple[str, EditRequest]]) -> None:
        self._database = scratch_database()
        self._database.executescript(_TABLES)
        self._length = 0
        items = iter(placed)
        while part := list(islice(items, _CHUNK)):
            self._add(part)

    def _add(self, part: Sequence[tuple[str, EditRequest]]) -> None:
        rows, statements = [], []
        for number, (place, request) in enumerate(part, start=self._length):
            values = vars(request)
            rows.append((number, place, pickle.dumps([values[name] for name in _FIELDS], protocol=5)))
            statements += [(one.question, number, one.own, one.answer) for one in statements_of(request)]
        with _room(), self._database:
            self._database.executemany("INSERT INTO requests VALUES (?, ?, ?)", rows)
            self._database.executemany("INSERT INTO statements VALUES (?, ?, ?, ?)", statements)
        self._length += len(part)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | slice) -> EditRequest | list[EditRequest]:
        if isinstance(index, slice):
            begin, end, step = index.indices(self._length)
            return self._read(begin, end) if step == 1 else [self[i] for i in range(begin, end, step)]
        index = range(self._length)[index]
        return self._read(index, index + 1)[0]

    def __iter__(self) -> Iterator[EditRequest]:
        for begin in range(0, self._length, _CHUNK):
            yield from self._read(begin, begin + _CHUNK)

    def places(self, begin: int, end: int) -> list[str]:
        """Where these requests come from."""
        rows = self._database.execute("SELECT place FROM requests WHERE number >= ? AND number < ?", (begin, end))
        return [place for (place,) in rows]

    def questions(self) -> Iterator[list[tuple[int, Statement]]]:
        """All statements of one question after the other, each with the number of its request, in their order."""
        rows = self._database.execute("SELECT question, number, own, answer FROM statements ORDER BY question, number")
        for question, group in groupby(rows, itemgetter(0)):
            yield [(number, Statement(question, bool(own), answer)) for _, number, own, answer in group]

    def different(self) -> array:
        """Numbers of requests with different questions of their own: of those with one question the last, in the order
        of the first."""
        last = array("q", [-1]) * len(self)
        for group in self.questions():
            numbers = [number for number, statement in group if statement.own]
            if numbers:
                last[numbers[0]] = numbers[-1]
        return array("q", (number for number in last if number >= 0))

    def _read(self, begin: int, end: int) -> list[EditRequest]:
        rows = self._database.execute("SELECT request FROM requests WHERE number >= ? AND number < ?", (begin, end))
        return [_request(pickle.loads(data)) for (data,) in rows]


def _request(values: list[object]) -> EditRequest:
    """As it was: it was checked when it was made."""
    request = object.__new__(EditRequest)
    vars(request).update(zip(_FIELDS, values, strict=True))
    return request
