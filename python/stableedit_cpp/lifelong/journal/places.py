"""Where the records of a journal lie in its file, without what they say: 72 bytes of memory each."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from stableedit_cpp.lifelong.journal.record import START, Record

__all__ = ["Content", "Place", "Places", "Records"]

_DIGEST, _TEXT = 32, 16


class Place(NamedTuple):
    """Of one record.

    Attributes:
        end: first byte after it. tensor_bytes: size of its tensors.
        digest: of the record, 32 bytes. text: of its content alone, 16 bytes, which can so be read without the tensors.
    """

    end: int
    tensor_bytes: int
    digest: bytes
    text: bytes


class Places:
    """The places of the records 0, 1, 2 and so on."""

    def __init__(self) -> None:
        self._ends, self._tensor_bytes = array("Q"), array("Q")
        self._digests = bytearray()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> Place:
        begin = number * (_DIGEST + _TEXT)
        digests = bytes(self._digests[begin : begin + _DIGEST + _TEXT])
        return Place(self._ends[number], self._tensor_bytes[number], digests[:_DIGEST], digests[_DIGEST:])

    def add(self, place: Place) -> None:
        self._ends.append(place.end)
        self._tensor_bytes.append(place.tensor_bytes)
        self._digests += place.digest + place.text

    def begin(self, number: int) -> int:
        """First byte of a record."""
        return self._ends[number - 1] if number else 0

    @property
    def end(self) -> int:
        """First byte after the last record."""
        return self._ends[-1] if self._ends else 0

    @property
    def last_digest(self) -> bytes:
        """What the next record follows."""
        return self[len(self) - 1].digest if self else START


class Content(Mapping[str, object]):
    """What a record says, read when it is looked at.

    Args:
        read: gives it.
    """

    def __init__(self, read: Callable[[], Mapping[str, object]]) -> None:
        self._read = read

    def __getitem__(self, name: str) -> object:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


class Records(Sequence[Record]):
    """The records of a journal; what each says is read from the file when it is looked at.

    Args:
        read: gives a record by its number.
    """

    def __init__(self, places: Places, read: Callable[[int], Record]) -> None:
        self._places, self._read = places, read

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        numbers = range(len(self))[index]
        return [self._read(number) for number in numbers] if isinstance(index, slice) else self._read(numbers)

    def __iter__(self) -> Iterator[Record]:
        return map(self._read, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None
