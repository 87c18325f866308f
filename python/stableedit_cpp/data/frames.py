"""Rows of tables that are in memory, or in files of a table's own kind: DataFrames, workbooks of Excel, Parquet."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from stableedit_cpp.data.notes import Notes

__all__ = ["is_table", "read_parquet", "read_workbook", "rows_of"]

_EXTRA = "install it with: pip install 'stableedit-cpp[tables]'"


def is_table(items: object) -> bool:
    """Whether it is a DataFrame (pandas, polars) or an Arrow table."""
    return (
        hasattr(items, "to_dicts")
        or hasattr(items, "to_pylist")
        or (hasattr(items, "columns") and hasattr(items, "to_dict"))
    )


def rows_of(items: Iterable) -> Iterable:
    """The rows of a DataFrame (pandas, polars) or an Arrow table as dicts; anything else is handed back.

    A column of whole numbers in which pandas has a gap holds 1889.0 for 1889; it is read as it was meant.
    """
    if hasattr(items, "to_dicts"):  # polars
        return items.to_dicts()
    if hasattr(items, "to_pylist"):  # Arrow
        return items.to_pylist()
    if not (hasattr(items, "columns") and hasattr(items, "to_dict")):
        return items
    rows = items.to_dict("records")
    for column in items.columns:
        values = [row[column] for row in rows]
        gaps = [value for value in values if isinstance(value, float) and value != value]
        if gaps and all(value != value or (isinstance(value, float) and value.is_integer()) for value in values):
            for row in rows:
                row[column] = int(row[column]) if row[column] == row[column] else None
    return rows


def read_workbook(path: Path, notes: Notes) -> Iterator[tuple[str, dict[str, object]]]:
    """``("row 3", record)`` for each row of the first sheet that has any, below its header.

    Raises:
        ValueError: if openpyxl is not installed, or the file is no workbook.
    """
    try:
        import openpyxl
    except ImportError:
        raise ValueError(f"{path} is an Excel workbook, which is read with openpyxl; {_EXTRA}") from None
    try:
        with path.open("rb") as file:  # openpyxl goes by the name otherwise
            book = openpyxl.load_workbook(file, read_only=True, data_only=True)
            sheet = next((sheet for sheet in book.worksheets if any(_filled(row) for row in _rows(sheet))), None)
            if sheet is None:
                raise ValueError(f"{path} holds no edit requests: its sheets are empty")
            rows = enumerate(_rows(sheet), start=1)
            names = next(row for _, row in rows if _filled(row))
            for number, row in rows:
                if not _filled(row):
                    notes.add("empty")
                    continue
                yield f"row {number}", _record(path, number, names, row)
    except (zipfile.BadZipFile, KeyError, OSError, EOFError) as error:
        raise ValueError(
            f"{path} is an Excel workbook that cannot be read ({error}); save it in Excel as 'CSV UTF-8'"
        ) from None


def _rows(sheet) -> Iterator[tuple]:
    sheet.reset_dimensions()  # of some writers they are wrong
    return sheet.iter_rows(values_only=True)


def _filled(row: Iterable) -> bool:
    return any(cell is not None and str(cell).strip() for cell in row)


def _record(path: Path, number: int, names: tuple, row: tuple) -> dict[str, object]:
    cells: dict[str, object] = {}
    for index, cell in enumerate(row):
        name = names[index] if index < len(names) else None
        if name is not None and str(name).strip():
            if str(name) in cells:
                raise ValueError(f"{path}: two columns have the name {str(name)!r}")
            cells[str(name)] = cell if cell != "" else None
        elif cell is not None and str(cell).strip():
            raise ValueError(f"{path}, row {number}: the cell {cell!r:.40} stands in a column without a name")
    return dict.fromkeys((str(name) for name in names if name is not None and str(name).strip()), None) | cells


def read_parquet(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """``("record 3", record)`` for each row of a Parquet file, a batch at a time.

    Raises:
        ValueError: if pyarrow is not installed, or the file is damaged.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path} is a Parquet file, which is read with pyarrow; {_EXTRA}") from None
    try:
        with parquet.ParquetFile(path) as file:
            batches = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            for number, row in enumerate(batches):
                yield f"record {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no complete Parquet file: {str(error).splitlines()[0]}") from None
