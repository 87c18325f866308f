"""What became of each request, by its id: looked up in the index, and read from the journal, when it is asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.lifelong.index import Index

__all__ = ["Entries", "RequestEntry", "WarmUp"]

_Value = TypeVar("_Value")
_PAGE = 1000


@dataclass
class RequestEntry:
    """An edit request and what became of it.

    Attributes:
        turn: the one it was edited in. repairs: turns that repaired it.
        superseded_by: id of the last request that asks its prompt, where that replaces it (``data.superseding``).
        reverted_in: turn of the revert that took it out.
    """

    id: str
    request: EditRequest
    turn: int
    repairs: list[int] = field(default_factory=list)
    superseded_by: str | None = None
    reverted_in: int | None = None

    @property
    def state(self) -> str:
        if self.reverted_in is not None:
            return f"reverted in turn {self.reverted_in}"
        return f"superseded by {self.superseded_by}" if self.superseded_by else "current"

    @property
    def current(self) -> bool:
        return self.state == "current"


class _ById(Mapping[str, _Value]):
    """Requests of one kind by id, in the order in which they were edited.

    Args:
        request: reads one, by the number of its record and its place in it.
    """

    warm_up: int

    def __init__(self, index: Index, request: Callable[[int, int], EditRequest]) -> None:
        self._index, self._request = index, request

    def __getitem__(self, id: str) -> _Value:
        row = self._row(id)
        if row is None:
            raise KeyError(id)
        return self._value(id, *row)

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and self._row(id) is not None

    def __iter__(self) -> Iterator[str]:
        last = -1
        query = "SELECT number, id FROM requests WHERE number > ? AND warm_up = ? ORDER BY number LIMIT ?"
        while page := self._index.rows.execute(query, (last, self.warm_up, _PAGE)).fetchall():
            for last, id in page:  # noqa: B007 - the next page begins behind it
                yield id

    def __len__(self) -> int:
        query = "SELECT count(*) FROM requests WHERE warm_up = ?"
        return self._index.rows.execute(query, (self.warm_up,)).fetchone()[0]

    def number(self, id: str) -> int:
        """Of a request, among all that were edited."""
        return self._row(id)[0]

    def _row(self, id: str) -> tuple | None:
        query = (
            "SELECT number, turn, record, place, superseded_by, reverted_in FROM requests WHERE id = ? AND warm_up = ?"
        )
        return self._index.rows.execute(query, (id, self.warm_up)).fetchone()

    @abstractmethod
    def _value(self, id: str, number: int, turn: int, record: int, place: int, *what: int | None) -> _Value:
        """What a row of the index is."""


class Entries(_ById[RequestEntry]):
    """The edits."""

    warm_up = 0

    def _value(self, id: str, number: int, turn: int, record: int, place: int, *what: int | None) -> RequestEntry:
        superseded, reverted = what
        rows = self._index.rows
        query = "SELECT turn FROM repairs WHERE number = ? ORDER BY turn"
        repairs = [turn for (turn,) in rows.execute(query, (number,))]
        if superseded is not None:
            (superseded,) = rows.execute("SELECT id FROM requests WHERE number = ?", (superseded,)).fetchone()
        return RequestEntry(id, self._request(record, place), turn, repairs, superseded, reverted)


class WarmUp(_ById[EditRequest]):
    """The requests of warm-ups."""

    warm_up = 1

    def _value(self, id: str, number: int, turn: int, record: int, place: int, *what: int | None) -> EditRequest:
        return self._request(record, place)
