"""The append-only journal of a session: a record counts once it is on the disk, and none that is damaged is used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import torch

from stableedit_cpp.errors import DamagedJournal
from stableedit_cpp.lifelong.journal.places import Content, Place, Places, Records
from stableedit_cpp.lifelong.journal.record import (
    START,
    Record,
    UnreadableRecord,
    encode,
    find_mark,
    read_content,
    read_record,
    read_tensors,
    text_digest,
)

__all__ = ["Damage", "Journal"]


@dataclass(frozen=True)
class Damage:
    """What is wrong with a journal, from which place on.

    Attributes:
        record, offset: the first record that cannot be used, and its first byte. size: bytes from there to the end.
        reason: what is wrong with it.
        in_flight: it had not been written to the end, so that no turn that was done is lost.
        readable: records after it that are whole, though they no longer follow from anything.
    """

    record: int
    offset: int
    size: int
    reason: str
    in_flight: bool
    readable: tuple[Record, ...] = ()

    def __str__(self) -> str:
        return f"record {self.record} at byte {self.offset} cannot be used: {self.reason}"


@dataclass
class _Head:
    """How many records were written to the end, and the digest of the last: kept in a file of its own, because a
    journal alone cannot know that its last records are missing."""

    path: Path
    records: int | None = field(default=None, init=False)  # None: the file is missing or damaged
    digest: str = field(default=START.hex(), init=False)

    def __post_init__(self) -> None:
        try:
            document = json.loads(self.path.read_bytes())
            records, digest = document["records"], document["digest"]
            if document["check"] == self._check(records, digest):
                self.records, self.digest = records, digest
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass

    def write(self, records: int, digest: str) -> None:
        document = {"records": records, "digest": digest, "check": self._check(records, digest)}
        scratch = self.path.with_suffix(".tmp")
        try:
            with scratch.open("w", encoding="ascii") as file:
                json.dump(document, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, self.path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
        self.records, self.digest = records, digest
        sync_directory(self.path.parent)

    @staticmethod
    def _check(records: int, digest: str) -> str:
        return blake2b(f"{records} {digest}".encode(), digest_size=16).hexdigest()


class Journal:
    """The journal of a directory: the files ``journal`` and ``head``.

    Attributes:
        records: all that can be used, in order; what they say is read when it is looked at. places: where they lie.
        damage: why the rest cannot be used; None if there is no rest.

    Args:
        on_read: called with the number of bytes after each record, for a progress bar.
        on_record: called with each record that is read and checked.
        known: places of the first records, of somebody who vouches that they are what they were when they were checked.
            These are not read.
    """

    def __init__(
        self,
        directory: Path,
        on_read: Callable[[int], object] | None = None,
        on_record: Callable[[Record], object] | None = None,
        known: Places | None = None,
    ) -> None:
        self.path = directory / "journal"
        # The head first: meanwhile a writer may append, and a record that is not in the head yet is no damage.
        self._head = _Head(directory / "head")
        self.places = Places() if known is None else known
        self.records = Records(self.places, self._record)
        self._last_read: tuple[int, dict] | None = None  # a session looks at its last one again and again
        with self.path.open("rb") as file:
            self.damage = self._scan(file, on_read, on_record)

    @staticmethod
    def create(directory: Path, content: dict) -> None:
        """Write a journal with its first record into an empty directory."""
        (directory / "journal").touch(exist_ok=False)
        _Head(directory / "head").write(0, START.hex())
        Journal(directory).append(content)

    @property
    def end(self) -> int:
        """Where the usable records end, in bytes."""
        return self.places.end

    def content(self, number: int) -> dict:
        """What a record says. Raises DamagedJournal if it changed since it was checked."""
        if self._last_read is None or self._last_read[0] != number:
            place, begin = self.places[number], self.places.begin(number)
            try:
                with self.path.open("rb") as file:
                    found = read_content(file, number, begin, place.end, place.tensor_bytes, place.text)
            except UnreadableRecord as error:
                raise DamagedJournal(f"{self.path}: {error}; reopen the session") from None
            self._last_read = (number, found)
        return self._last_read[1]

    def _record(self, number: int) -> Record:
        place, begin = self.places[number], self.places.begin(number)
        content = Content(partial(self.content, number))
        return Record(number, begin, place.end - begin, place.digest, content, place.tensor_bytes, place.text)

    def _take(self, record: Record) -> None:
        self.places.add(Place(record.end, record.tensor_bytes, record.digest, record.text))
        self._last_read = (record.number, record.content)

    def tensors(self, record: Record) -> dict[str, torch.Tensor]:
        """The tensors that go with a record. Raises DamagedJournal if they changed since the journal was opened."""
        try:
            with self.path.open("rb") as file:
                return read_tensors(file, record)
        except UnreadableRecord as error:
            raise DamagedJournal(f"{self.path}: {error}; reopen the session") from None

    def append(self, content: dict, tensors: dict[str, torch.Tensor] | None = None) -> Record:
        """Write a record; when this returns, it is on the disk and counts.

        Raises:
            OSError: as the system says (no space, read-only ...); the journal is then as it was.
        """
        if self.damage is not None:
            raise DamagedJournal(f"{self.path}: {self.damage}; nothing can be appended until that is cut off")
        number, offset = len(self.records), self.end
        pieces, digest = encode(number, self.places.last_digest, content, tensors or {})
        size, text = sum(map(len, pieces)), text_digest(pieces[1])
        record = Record(number, offset, size, digest, content, len(pieces[2]), text)
        with self.path.open("r+b", buffering=0) as file:
            try:
                file.seek(offset)
                for piece in pieces:
                    _write_all(file, piece)
                os.fsync(file.fileno())
                self._head.write(number + 1, digest.hex())
            except BaseException:
                self._take_back(file)
                raise
        self._take(record)
        return record

    def note(self, record: Record) -> None:
        """Know of a record that another process has appended."""
        if record.number == len(self.records):
            self._take(record)

    def cut(self, aside: Path) -> None:
        """Remove what cannot be used; its bytes are kept in the file ``aside``.

        Raises:
            OSError: as the system says; if the bytes cannot be kept, nothing is removed.
        """
        if self.damage is None:
            return
        aside.parent.mkdir(exist_ok=True)
        with self.path.open("r+b") as file:
            file.seek(self.end)
            try:
                with aside.open("wb") as kept:
                    shutil.copyfileobj(file, kept)
                    kept.flush()
                    os.fsync(kept.fileno())
            except OSError:
                aside.unlink(missing_ok=True)
                raise
            sync_directory(aside.parent)
            file.truncate(self.end)
            os.fsync(file.fileno())
        self.acknowledge()
        self.damage = None

    def stop(self, reason: str) -> None:
        """Append nothing any more, for a reason that opening the journal again takes away."""
        self.damage = Damage(len(self.records), self.end, 0, reason, in_flight=True)

    @property
    def acknowledged(self) -> bool:
        """Whether the head says what the usable records are. It may not yet, after a crash between the two."""
        return (self._head.records, self._head.digest) == (len(self.records), self.places.last_digest.hex())

    def acknowledge(self) -> None:
        """Make the head say what the usable records are."""
        if not self.acknowledged:
            self._head.write(len(self.records), self.places.last_digest.hex())

    def _take_back(self, file: BinaryIO) -> None:
        """After an append that failed half-way: the head first, so that at no moment a record seems to be lost."""
        try:
            self.acknowledge()
            file.truncate(self.end)
            os.fsync(file.fileno())
        except OSError as error:
            self.stop(f"it was not written to the end and could not be removed ({error.strerror}); reopen the session")

    def _scan(
        self,
        file: BinaryIO,
        on_read: Callable[[int], object] | None,
        on_record: Callable[[Record], object] | None,
    ) -> Damage | None:
        size = os.fstat(file.fileno()).st_size
        while self.end < size:
            try:
                record = read_record(file, self.end, len(self.records), self.places.last_digest)
            except UnreadableRecord as error:
                return self._damage(file, size, str(error))
            self._take(record)
            if on_record is not None:
                on_record(record)
            if on_read is not None:
                on_read(record.size)
        count = self._head.records
        if count is None:
            return self._damage(file, size, "the file 'head', which says how many records there are, is missing or bad")
        if count > len(self.records):
            return self._damage(file, size, f"the journal ends before it, and {count} records had been written")
        if not self._head_fits():
            return self._damage(file, size, "the file 'head' belongs to another journal")
        return None

    def _head_fits(self) -> bool:
        count = self._head.records
        if count is None or not 0 <= count <= len(self.places):
            return False
        return (self.places[count - 1].digest if count else START).hex() == self._head.digest

    def _damage(self, file: BinaryIO, size: int, reason: str) -> Damage:
        offset = self.end
        readable: list[Record] = []
        place = offset
        while (place := find_mark(file, place + 1)) is not None:
            try:
                readable.append(read_record(file, place))
                place = readable[-1].end - 1
            except UnreadableRecord:
                pass
        # In flight is only what lies behind all that the head knows of.
        return Damage(len(self.records), offset, size - offset, reason, self._head_fits(), tuple(readable))


def sync_directory(directory: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
