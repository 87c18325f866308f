"""What a file really is, whatever its name says: by its first bytes; and the encoding of a text."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from pathlib import Path

__all__ = ["encoding_of", "first_bytes", "kind_of"]

_LOOKED_AT = 1 << 16  # bytes at the beginning that tell the encoding
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_KINDS = (
    (b"PK\x03\x04", "workbook"),
    (b"PAR1", "parquet"),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook of the old kind (.xls); save it in Excel as .xlsx or 'CSV UTF-8'"),
    (b"%PDF", "a PDF"),
    (b"SQLite format 3", "an SQLite database; export the table as CSV"),
    (b"version https://git-lfs", "a pointer of Git LFS in place of the data; fetch it with: git lfs pull"),
    (b"<!doctype html", "a web page, not the data that it may link to"),
    (b"<html", "a web page, not the data that it may link to"),
)
# A letter of Windows-1252 in a word of Latin letters: not a capital behind a small one, nor a row of foreign letters,
# which are what texts of other encodings look like.
_UNLIKELY = re.compile(
    r"[a-z\u00df-\u00ff][\u00c0-\u00de\u0160\u017d\u0178\u0152]|[\u00a1-\u00ff]{3}|[\x00-\x08\x0e-\x1f]"
)


def first_bytes(path: Path) -> bytes:
    """Up to 64 KiB, unpacked where it is packed; of a damaged file what can be read."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    found = bytearray()
    with (gzip.open if packed else open)(path, "rb") as file:
        try:
            while len(found) < _LOOKED_AT and (chunk := file.read(1 << 14)):
                found += chunk
        except (gzip.BadGzipFile, EOFError, zlib.error):  # said where it is read
            pass
    return bytes(found)


def kind_of(first: bytes) -> str | None:
    """``"workbook"``, ``"parquet"``, or what else it is, in words for people; None for a text.

    Args:
        first: bytes at the beginning of the file.
    """
    lower = first[:64].lstrip().lower()
    return next((kind for mark, kind in _KINDS if first.startswith(mark) or lower.startswith(mark.lower())), None)


def encoding_of(first: bytes) -> str | None:
    """The encoding of a text from its first bytes: by its mark, or UTF-8, UTF-16, Windows-1252; None if none fits."""
    for mark, name in _MARKS:
        if first.startswith(mark):
            return name
    if first[1:2] == b"\0" and first[3:4] == b"\0":
        return "utf-16-le"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(first)
        return "utf-8"
    except UnicodeDecodeError:
        pass
    try:
        text = first.decode("cp1252")
    except UnicodeDecodeError:
        return None
    return None if _UNLIKELY.search(text) else "cp1252"
