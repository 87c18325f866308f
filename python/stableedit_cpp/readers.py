"""Reads edit requests from JSON, JSON Lines and CSV files, gzipped or not."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TextIO

from stableedit_cpp.requests import EditRequest

__all__ = ["read_records", "read_requests"]

_SUFFIXES = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}


def read_requests(path: str | Path, limit: int | None = None) -> list[EditRequest]:
    """Read edit requests from a file.

    Args:
        path: ``.json`` (a list of objects), ``.jsonl`` (one object a line) or ``.csv`` (with a header line), each also
            with ``.gz``. Field names are those of EditRequest or of a published data set (see ``formats``).
        limit: read at most this many.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: as the operating system says, with the path.
        ValueError: for a file that is empty, not UTF-8, malformed (which line), lacks a field or repeats an id
            (which record).
    """
    requests: list[EditRequest] = []
    seen: dict[str, str] = {}
    for place, record in islice(read_records(path), limit):
        try:
            request = EditRequest.from_record(record)
        except ValueError as error:
            raise ValueError(f"{path}, {place}: {error}") from None
        if request.id is not None:
            if request.id in seen:
                raise ValueError(f"{path}, {place}: the id {request.id!r} was used before, in {seen[request.id]}")
            seen[request.id] = place
        requests.append(request)
    if not requests:
        raise ValueError(f"{path} holds no edit requests")
    return requests


def read_records(path: str | Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield ``(place, record)`` for each record of a file, where place says "record 3" or "line 3".

    JSON Lines and CSV are streamed; a JSON list is parsed as a whole. Raises as ``read_requests``.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; expected a .json, .jsonl or .csv file")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    gzipped = bool(suffixes) and suffixes[-1] == ".gz"
    suffix = ["", *suffixes][-2 if gzipped else -1]
    if suffix not in _SUFFIXES:
        raise ValueError(
            f"{path}: cannot tell the format from the name; expected .json, .jsonl or .csv, or these + .gz"
        )
    parse = {"json": _parse_json, "jsonl": _parse_json_lines, "csv": _parse_csv}[_SUFFIXES[suffix]]
    opened = gzip.open if gzipped else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield from parse(path, file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start} of what was read") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}") from None


def _parse_json(path: Path, file: TextIO) -> Iterator[tuple[str, dict[str, object]]]:
    text = file.read()
    if not text.strip():
        raise ValueError(f"{path} is empty; expected a list of edit requests")
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    if not isinstance(records, list):
        raise ValueError(f"{path} holds a JSON {type(records).__name__}; expected a list of objects")
    for index, record in enumerate(records):
        yield f"record {index}", _check_object(path, f"record {index}", record)


def _parse_json_lines(path: Path, file: TextIO) -> Iterator[tuple[str, dict[str, object]]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, column {error.colno}: not valid JSON: {error.msg}") from None
        yield f"line {number}", _check_object(path, f"line {number}", record)


def _parse_csv(path: Path, file: TextIO) -> Iterator[tuple[str, dict[str, object]]]:
    reader = csv.DictReader(file, strict=True)
    try:
        for row in reader:
            place = f"line {reader.line_num}"
            if None in row:
                raise ValueError(f"{path}, {place}: more cells than the header has columns")
            if None in row.values():
                raise ValueError(f"{path}, {place}: fewer cells than the header has columns")
            yield place, {name: cell or None for name, cell in row.items()}
    except csv.Error as error:
        # The DictReader's own line number is still that of the last good row.
        row = f"the row begins after line {reader.line_num}"
        raise ValueError(f"{path}, line {reader.reader.line_num}: not valid CSV: {error} ({row})") from None


def _check_object(path: Path, place: str, record: object) -> dict[str, object]:
    if not isinstance(record, dict):
        raise ValueError(f"{path}, {place}: expected an object with named fields, found {type(record).__name__}")
    return record
