"""Records of JSON and JSON Lines files, one by one. NaN, which pandas and Python write, reads as null."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TextIO

import ijson

__all__ = ["parse_json", "parse_json_lines"]

_CHUNK = 1 << 16  # characters of a JSON list that are parsed at a time
_END_OF_TEXT = re.compile(r'(?:[^"\\]|\\.)*"', re.DOTALL)
_TEXT_OR_NAN = re.compile(r'"(?:[^"\\]|\\.)*("|\Z)|-?Infinity|NaN', re.DOTALL)


class _WithoutNaN:
    """A file of JSON in which numbers that JSON does not have are an empty object or null, of the same length."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.seek(0)

    def seek(self, place: int) -> None:
        self._file.seek(place)
        self._inside = False  # a text that began in an earlier chunk

    def read(self, size: int) -> str:
        text = self._file.read(size)
        while text and text[-1] in "\\-NaInfity" and (more := self._file.read(1)):  # perhaps not all of a word
            text += more
        begin = 0
        if self._inside:
            end = _END_OF_TEXT.match(text)
            if end is None:
                return text
            begin, self._inside = end.end(), False
        return text[:begin] + _TEXT_OR_NAN.sub(self._replaced, text[begin:])

    def _replaced(self, match: re.Match) -> str:
        if match[0][0] == '"':
            self._inside = match[1] == ""
            return match[0]
        return ("{}" if match[0] == "NaN" else "null").ljust(len(match[0]))


def parse_json(path: Path, file: TextIO | _WithoutNaN) -> Iterator[tuple[str, dict[str, object]]]:
    """``("record 3", record)`` for each object of a list.

    Raises:
        ValueError: for no list, an item that is no object, or what is not JSON, at which line and column.
    """
    found = ijson.sendable_list()
    parser = ijson.items_coro(found, "item", use_float=True)
    chunks, count, empty, before = 0, 0, True, ""
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
            around = before[-8:] + text + file.read(8)
            if not isinstance(file, _WithoutNaN) and ("NaN" in around or "Infinity" in around):
                for place, record in islice(parse_json(path, _WithoutNaN(file)), count, None):
                    yield place, {name: None if value == {} else value for name, value in record.items()}
                return
            line, column = _where_broken(file, chunks)
            raise ValueError(f"{path}, line {line}, column {column}: not valid JSON: {reason}")
        found.clear()
        chunks, before = chunks + 1, text
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


def parse_json_lines(path: Path, file: TextIO) -> Iterator[tuple[str, dict[str, object]]]:
    """``("line 3", record)`` for each line that holds an object; blank lines are passed over. Errors as above."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, column {error.colno}: not valid JSON: {error.msg}") from None
        yield f"line {number}", _check_object(path, f"line {number}", record)


def _check_object(path: Path, place: str, record: object) -> dict[str, object]:
    if not isinstance(record, dict):
        raise ValueError(f"{path}, {place}: expected an object with named fields, found {type(record).__name__}")
    return record
