"""Rows of CSV files as spreadsheets write them: any delimiter, a line "sep=;", empty rows and columns."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from stableedit_cpp.data.notes import Notes

__all__ = ["parse_table"]

_DELIMITERS = ",;\t|"
_QUOTED = re.compile(r'"[^"]*"')


def parse_table(path: Path, file: TextIO, notes: Notes) -> Iterator[tuple[str, dict[str, object]]]:
    """``("line 3", record)`` for each row below the header; an empty cell is None.

    The delimiter is the one that cuts the header into the most columns. Rows without content are passed over, and so
    are columns without name and content. A row may end before the columns do: spreadsheets leave out empty cells.

    Raises:
        ValueError: for a header that names two columns alike, cells in columns without a name, a row of one cell where
            there are several columns, or what is not CSV; with the line.
    """
    delimiter, skipped = _delimiter(file)
    reader = csv.reader(file, strict=True, delimiter=delimiter)
    line = 0
    try:
        names = next((row for row in reader if _filled(row)), None)
        if names is None:
            return
        names = [name.strip("\ufeff \t\u00a0") for name in names]
        twice = next((name for name in names if name and names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{path}: two columns have the name {twice!r}")
        line = reader.line_num
        for row in reader:
            line = reader.line_num
            place = f"line {line + skipped}"
            if not _filled(row):
                if row:  # not a line without anything
                    notes.add("empty")
                continue
            if any(cell.strip() for cell in row[len(names) :]):
                raise ValueError(f"{path}, {place}: more cells than the header has columns")
            if len(row) == 1 < len(names):
                raise ValueError(f"{path}, {place}: fewer cells than the header has columns")
            unnamed = next((cell for name, cell in zip(names, row, strict=False) if not name and cell.strip()), None)
            if unnamed is not None:
                raise ValueError(f"{path}, {place}: the cell {unnamed!r:.40} stands in a column without a name")
            cells = [*row, *[""] * (len(names) - len(row))]
            yield place, {name: cell or None for name, cell in zip(names, cells, strict=False) if name}
    except csv.Error as error:
        begins = f"the row begins after line {line + skipped}"  # that of the last good row
        raise ValueError(f"{path}, line {reader.line_num + skipped}: not valid CSV: {error} ({begins})") from None


def _filled(row: list[str]) -> bool:
    return any(cell.strip() for cell in row)


def _delimiter(file: TextIO) -> tuple[str, int]:
    """The delimiter, and how many lines before the header say it; the file stands behind these."""
    first = file.readline()
    said = re.fullmatch(r"\s*\"?sep=(.)\"?[,;\s]*", first, re.IGNORECASE | re.DOTALL)
    if said and said[1] not in "\r\n":
        return said[1], 1
    header = first
    while not header.strip() and (more := file.readline()):
        header = more
    file.seek(0)
    bare = _QUOTED.sub("", header)
    return max(_DELIMITERS, key=lambda delimiter: (bare.count(delimiter), -_DELIMITERS.index(delimiter))), 0
