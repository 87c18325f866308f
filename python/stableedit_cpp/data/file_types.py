"""Reads the records of files one by one: memory does not grow with a file."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from stableedit_cpp.data.contents import encoding_of, first_bytes, kind_of
from stableedit_cpp.data.frames import read_parquet, read_workbook
from stableedit_cpp.data.json_files import parse_json, parse_json_lines
from stableedit_cpp.data.notes import Notes
from stableedit_cpp.data.tables import parse_table

__all__ = ["SUFFIXES", "read_records"]

SUFFIXES = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv", ".tab": "csv"}
SUFFIXES |= {".xlsx": "workbook", ".xlsm": "workbook", ".parquet": "parquet", ".pq": "parquet"}
_EXPECTED = "expected .json, .jsonl, .csv, .tsv, .xlsx or .parquet"
_SAVE = "save it in Excel as 'CSV UTF-8 (Comma delimited)', or in an editor as UTF-8"


def read_records(path: str | Path, notes: Notes | None = None) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield ``(place, record)`` for each record of a file, where place says "record 3" or "line 3".

    Records before a damaged place are yielded before the error is raised.

    Args:
        path: ``.json`` (a list of objects), ``.jsonl`` or ``.ndjson`` (one object a line), ``.csv`` or ``.tsv`` (with a
            header line, as spreadsheets write it), each also with ``.gz``; ``.xlsx`` (the first sheet) or ``.parquet``.
            A workbook, Parquet file or packed file is one under any of these names, too.
        notes: is told of rows that were passed over; None warns of them at the end.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: as the operating system says, with the path.
        ValueError: for a file that is empty, in an encoding that cannot be told, malformed (at which line and column),
            something else than its name says, or a damaged gzip file (after which record).
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; expected a .json, .jsonl or .csv file")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    gzipped = bool(suffixes) and suffixes[-1] == ".gz"
    suffix = ["", *suffixes][-2 if gzipped else -1]
    first = first_bytes(path)
    content = kind_of(first)
    if suffix not in SUFFIXES and content not in ("workbook", "parquet"):
        if content is not None:
            raise ValueError(f"{path} is {content}")
        raise ValueError(f"{path}: cannot tell the format from the name; {_EXPECTED}, or these + .gz")
    kind = content or SUFFIXES[suffix]
    own = notes or Notes(path)
    if kind == "workbook":
        yield from read_workbook(path, own)
    elif kind == "parquet":
        yield from read_parquet(path)
    elif kind in ("json", "jsonl", "csv"):
        yield from _read_text(path, kind, gzipped, first, own)
    else:
        raise ValueError(f"{path} is {kind}")
    if notes is None:
        own.say()


def _read_text(
    path: Path, kind: str, gzipped: bool, first: bytes, notes: Notes
) -> Iterator[tuple[str, dict[str, object]]]:
    with path.open("rb") as file:
        gzipped = gzipped or file.read(2) == b"\x1f\x8b"
    encoding = encoding_of(first)
    if encoding == "cp1252":  # to guess right is not certain, and a wrong letter would be learned
        raise ValueError(f"{path} is not UTF-8 text but, it seems, Windows-1252 (Western European); {_SAVE}")
    parse = {"json": parse_json, "jsonl": parse_json_lines}.get(kind)
    last = "the beginning"
    try:
        with (gzip.open if gzipped else open)(path, "rt", encoding=encoding or "utf-8", newline="") as file:
            for place, record in parse_table(path, file, notes) if parse is None else parse(path, file):
                last = place
                yield place, record
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason}, some way after {last}; {_SAVE}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}; readable up to {last}") from None
