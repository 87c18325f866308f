"""One table, for Markdown files, pages and terminals alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Cell", "Table", "label", "number", "score"]


class Cell(NamedTuple):
    """
    Attributes:
        text: what is shown. value: what a column is sorted by; None goes last. best: whether to point it out.
    """

    text: str
    value: float | str | None = None
    best: bool = False

    @property
    def shown(self) -> str:
        return f"★ {self.text}" if self.best else self.text


def label(content: object) -> Cell:
    return Cell(str(content), str(content))


def number(value: float | None, pattern: str = "{:,}") -> Cell:
    return Cell("-" if value is None else pattern.format(value), value)


def score(mean: float | None, error: float | None = None) -> Cell:
    """A mean, with its standard error where there is one."""
    cell = number(mean, "{:.3f}")
    return cell if mean is None or error is None else cell._replace(text=f"{cell.text} ± {error:.3f}")


@dataclass
class Table:
    """
    Attributes:
        rows: as long as ``columns``; the first cell of each is its header.
        caption: what the rows are and how to read a cell. name: of the table on its page.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    name: str = ""

    def is_text(self, column: int) -> bool:
        return column == 0 or any(isinstance(row[column].value, str) for row in self.rows)

    def markdown(self) -> str:
        """The caption, if there is one, and a Markdown table."""
        body = [self.columns, ["---"] * len(self.columns), *([cell.shown for cell in row] for row in self.rows)]
        lines = ["| " + " | ".join(map(_escaped, line)) + " |" for line in body]
        return "\n".join([self.caption, ""] * bool(self.caption) + lines)

    def plain(self) -> str:
        """Columns of a terminal; heads are left out where all are empty."""
        body = [list(self.columns)] * any(self.columns) + [[cell.shown for cell in row] for row in self.rows]
        widths = [max(map(len, column), default=0) for column in zip(*body, strict=True)]
        sides = ["<" if self.is_text(column) else ">" for column in range(len(self.columns))]
        places = list(zip(sides, widths, strict=True))
        return "\n".join(
            "  ".join(f"{cell:{side}{width}}" for cell, (side, width) in zip(line, places, strict=True)).rstrip()
            for line in body
        )


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
