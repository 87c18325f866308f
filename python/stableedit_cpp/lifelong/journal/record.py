"""One record of a journal: how it lies in the file, and what can be wrong with it.

    header   mark, version, number, sizes, digest of the record before    80 bytes with their own checksum
    content  JSON, then tensors as a safetensors file (or nothing)
    digest   BLAKE2b-256 of header and content                            32 bytes

The digest of each record goes into the header of the next, so that a record that was taken out, put in or exchanged
is found like one that was changed.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

import safetensors.torch
import torch

__all__ = [
    "START",
    "Record",
    "UnreadableRecord",
    "encode",
    "find_mark",
    "read_content",
    "read_record",
    "read_tensors",
    "text_digest",
]

MARK = b"SEjr"
VERSION = 1
# Mark, version, number, bytes of JSON, bytes of tensors, digest of the record before; then a checksum of these.
_FIELDS = struct.Struct("<4sIQQQ32s")
_CHECK_SIZE = 16
HEADER_SIZE = _FIELDS.size + _CHECK_SIZE
_DIGEST_SIZE = 32
_CHUNK = 1 << 20
START = bytes(_DIGEST_SIZE)  # stands for the record before the first


class UnreadableRecord(ValueError):
    """Why the bytes at some place of a journal are not the record that belongs there; ``torn`` if they only stop too
    early."""

    def __init__(self, reason: str, *, torn: bool = False) -> None:
        super().__init__(reason)
        self.torn = torn


@dataclass(frozen=True)
class Record:
    """A record that is in the journal, whole and in its place.

    Attributes:
        number: from 0. offset, size: bytes of the file. digest: of header and content.
        content: what it says. tensor_bytes: size of the tensors that go with it, which ``read_tensors`` reads.
        text: digest of the content as it is written.
    """

    number: int
    offset: int
    size: int
    digest: bytes
    content: Mapping[str, object] = field(compare=False)  # its digest is compared
    tensor_bytes: int
    text: bytes = b""

    @property
    def end(self) -> int:
        return self.offset + self.size


def encode(number: int, previous: bytes, content: dict, tensors: dict[str, torch.Tensor]) -> tuple[list[bytes], bytes]:
    """The pieces of a record in the order of the file, and its digest."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    data = safetensors.torch.save(tensors) if tensors else b""
    fields = _FIELDS.pack(MARK, VERSION, number, len(text), len(data), previous)
    pieces = [fields + _checksum(fields), text, data]
    digest = hashlib.blake2b(digest_size=_DIGEST_SIZE)
    for piece in pieces:
        digest.update(piece)
    return [*pieces, digest.digest()], digest.digest()


def read_record(file: BinaryIO, offset: int, number: int | None = None, previous: bytes | None = None) -> Record:
    """Read and check the record that begins at ``offset``.

    Args:
        number, previous: what it must be: its number, and the digest of the record before it; None: whatever it is.

    Raises:
        UnreadableRecord: saying what is wrong with it.
    """
    file.seek(offset)
    header = file.read(HEADER_SIZE)
    if len(header) < HEADER_SIZE:
        raise UnreadableRecord(f"it ends after {len(header)} of the {HEADER_SIZE} bytes of its header", torn=True)
    fields = header[: _FIELDS.size]
    mark, version, found, text_size, data_size, before = _FIELDS.unpack(fields)
    if mark != MARK:
        raise UnreadableRecord("it does not begin with the mark of a record")
    if header[_FIELDS.size :] != _checksum(fields):
        raise UnreadableRecord("the checksum of its header is wrong")
    if version != VERSION:
        raise UnreadableRecord(f"it has the format version {version}, and this program reads version {VERSION}")
    if number is not None and found != number:
        raise UnreadableRecord(f"it says that it is record {found}")
    if previous is not None and before != previous:
        raise UnreadableRecord("it does not follow the record before it")
    digest = hashlib.blake2b(header, digest_size=_DIGEST_SIZE)
    text = bytearray()
    for chunk in _chunks(file, text_size):
        text += chunk
        digest.update(chunk)
    for chunk in _chunks(file, data_size):
        digest.update(chunk)
    size = HEADER_SIZE + text_size + data_size + _DIGEST_SIZE
    stored = file.read(_DIGEST_SIZE)
    if len(stored) < _DIGEST_SIZE:
        raise UnreadableRecord(f"it ends after {file.tell() - offset} of its {size} bytes", torn=True)
    if stored != digest.digest():
        raise UnreadableRecord("its checksum is wrong")
    return Record(found, offset, size, stored, json.loads(text.decode()), data_size, text_digest(text))


def read_content(file: BinaryIO, number: int, offset: int, end: int, tensor_bytes: int, expected: bytes) -> dict:
    """What a record says that was checked before; its tensors are not read.

    Args:
        number: of the record. offset, end: where it lies. expected: its ``text_digest``.

    Raises:
        UnreadableRecord: if it is no longer what it was.
    """
    file.seek(offset + HEADER_SIZE)
    text = file.read(end - offset - HEADER_SIZE - tensor_bytes - _DIGEST_SIZE)
    if text_digest(text) != expected:
        raise UnreadableRecord(f"record {number} at byte {offset} has changed since it was checked")
    return json.loads(text.decode())


def text_digest(text: bytes | bytearray) -> bytes:
    """16 bytes, of a record's content as it is written."""
    return hashlib.blake2b(text, digest_size=16).digest()


def read_tensors(file: BinaryIO, record: Record) -> dict[str, torch.Tensor]:
    """The tensors of a record, read and checked anew.

    Raises:
        UnreadableRecord: if the record is no longer what it was.
    """
    file.seek(record.offset)
    data = file.read(record.size - _DIGEST_SIZE)
    if hashlib.blake2b(data, digest_size=_DIGEST_SIZE).digest() != record.digest:
        raise UnreadableRecord(f"record {record.number} at byte {record.offset} has changed since it was checked")
    return safetensors.torch.load(data[len(data) - record.tensor_bytes :]) if record.tensor_bytes else {}


def find_mark(file: BinaryIO, offset: int) -> int | None:
    """Where the next record seems to begin, at ``offset`` or later."""
    file.seek(offset)
    overlap = b""
    while chunk := file.read(_CHUNK):
        found = (overlap + chunk).find(MARK)
        if found >= 0:
            return offset - len(overlap) + found
        offset += len(chunk)
        overlap = (overlap + chunk)[-(len(MARK) - 1) :]
    return None


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (chunk := file.read(min(size, _CHUNK))):
        size -= len(chunk)
        yield chunk


def _checksum(fields: bytes) -> bytes:
    return hashlib.blake2b(fields, digest_size=_CHECK_SIZE).digest()
