"""Plain text from files of any size and from the hub, piece by piece: for statistics that want much of it."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from stableedit_cpp.data.reading import source_records

__all__ = ["iter_texts", "text_of"]

_FIELDS = ("Text", "text")
_PIECE = 1 << 15  # characters of a running text that are handed over at a time, up to the end of the line


def iter_texts(source: str | Path, field: str | None = None) -> Iterator[tuple[str, str]]:
    """Yield ``(place, text)`` for each text of a source, in memory that does not grow with it.

    A record is a text of its own. A running text comes in pieces of some 32,000 characters that end with a line, the
    same at every reading.

    Args:
        source: ``.txt`` with a running text; ``.json``, ``.jsonl`` or ``.csv`` with a text in each record; each also
            with ``.gz``; or a data set of the hub (see ``read_hub_records``).
        field: of the records that has the text; None takes ``Text`` or ``text``.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: as the operating system says, with the path.
        ValueError: for a file that is damaged or has no text, or a record without the field.
    """
    nothing = True
    for place, text in _running(Path(source)) if _is_running(source) else _records(source, field):
        if text.strip():
            nothing = False
            yield place, text
    if nothing:
        raise ValueError(f"{source} has no text")


def text_of(record: Mapping[str, object], field: str | None = None) -> str:
    """The text of a record.

    Raises:
        ValueError: if it has no such field with a text.
    """
    names = _FIELDS if field is None else (field,)
    text = next((record[name] for name in names if isinstance(record.get(name), str)), None)
    if text is None:
        raise ValueError(f"there is no field {' or '.join(names)}; its fields are {', '.join(record)}")
    return text


def _is_running(source: str | Path) -> bool:
    name = str(source).lower()
    return name.removesuffix(".gz").endswith(".txt")


def _records(source: str | Path, field: str | None) -> Iterator[tuple[str, str]]:
    for place, record in source_records(source):
        try:
            yield place, text_of(record, field)
        except ValueError as error:
            raise ValueError(f"{source}, {place}: {error}") from None


def _running(path: Path) -> Iterator[tuple[str, str]]:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    number = 1
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            while piece := file.read(_PIECE):
                piece += file.readline(_PIECE)
                yield f"from line {number}", piece
                number += piece.count("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason}, some way after line {number}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}; readable up to line {number}") from None
