"""Reads the records of JSON, JSON Lines and CSV files, gzipped or not, one by one: memory does not grow with a file."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import ijson

__all__ = ["SUFFIXES", "read_records"]

SUFFIXES = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}
_CHUNK = 1 << 16  # characters of a JSON list that are parsed at a time


def read_records(path: str | Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield ``(place, record)`` for each record of a file, where place says "record 3" or "line 3".

    Records before a damaged place are yielded before the error is raised.

    Args:
        path: ``.json`` (a list of objects), ``.jsonl`` or ``.ndjson`` (one object a line) or ``.csv`` (with a header
            line), each also with ``.gz``.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: as the operating system says, with the path.
        ValueError: for a file that is empty, not UTF-8, malformed (at which line and column) or a damaged gzip file
            (after which record).
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; expected a .json, .jsonl or .csv file")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    gzipped = bool(suffixes) and suffixes[-1] == ".gz"
    suffix = ["", *suffixes][-2 if gzipped else -1]
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: cannot tell the format from the name; expected .json, .jsonl or .csv, or these + .gz"
        )
    parse = {"json": _parse_json, "jsonl": _parse_json_lines, "csv": _parse_csv}[SUFFIXES[suffix]]
    opened = gzip.open if gzipped else open
    last = "the beginning"
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            for place, record in parse(path, file):
                last = place
                yield place, record
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason}, some way after {last}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}; readable up to {last}") from None


def _parse_json(path: Path, file: TextIO) -> Iterator[tuple[str, dict[str, object]]]:
    found = ijson.sendable_list()
    parser = ijson.items_coro(found, "item", use_float=True)
    chunks, count, empty = 0, 0, True
    while text := file.read(_CHUNK):
        if empty and text.strip():
            _check_list(path, text.lstrip()[0])
            empty = False
        broken = False
        try:
            parser.send(text.encode())
        except ijson.JSONError as error:
            broken, reason = True, _reason(error)
        for record in found:
            yield f"record {count}", _check_object(path, f"record {count}", record)
            count += 1
        if broken:
            line, column = _where_broken(file, chunks)
            raise ValueError(f"{path}, line {line}, column {column}: not valid JSON: {reason}")
        found.clear()
        chunks += 1
    if empty:
        raise ValueError(f"{path} is empty; expected a list of edit requests")
    try:
        parser.close()
    except ijson.JSONError as error:
        line, column = _where_broken(file, chunks)
        raise ValueError(f"{path}, line {line}, column {column}: not valid JSON: {_reason(error)}") from None


def _check_list(path: Path, first: str) -> None:
    """The parser would find no records in anything else."""
    if first != "[":
        kinds = {"{": "an object", '"': "text", "n": "null", "t": "true", "f": "false"}
        found = kinds.get(first, "a number" if first in "-0123456789" else f"no JSON (it begins with {first!r})")
        raise ValueError(f"{path} holds {found}; expected a list of objects, or the suffix .jsonl for one a line")


def _reason(error: ijson.JSONError) -> str:
    """The parser's message is followed by an excerpt with an arrow."""
    return str(error).splitlines()[0].partition("error: ")[2]


def _where_broken(file: TextIO, chunks: int) -> tuple[int, int]:
    """Line and column, from 1, where a file stops being JSON. The parser does not say it, so the file is read again:
    the good chunks whole, the next one character by character."""
    file.seek(0)
    events = ijson.sendable_list()
    parser = ijson.basic_parse_coro(events)
    line, column = 1, 1

    def pieces() -> Iterator[str]:
        for _ in range(chunks):
            yield file.read(_CHUNK)
        yield from file.read(_CHUNK)

    for piece in pieces():
        try:
            parser.send(piece.encode())
        except ijson.JSONError:
            break
        events.clear()
        newlines = piece.count("\n")
        line, column = line + newlines, len(piece) - piece.rfind("\n") if newlines else column + len(piece)
    return line, column


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
