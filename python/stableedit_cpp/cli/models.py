"""``stableedit models``: the architectures that were tried, what is edited in them, and what works."""

from __future__ import annotations

import argparse
import json
from importlib.resources import files

from stableedit_cpp.cli.options import show
from stableedit_cpp.files.table import Cell, Table, label
from stableedit_cpp.files.words import with_nearest

__all__ = ["model_table", "run", "tried_architectures"]

_COLUMNS = ("architecture", "modules", "with a step size", "edit", "evaluate", "trunk cache", "session", "export")


def run(options: argparse.Namespace) -> int:
    known = tried_architectures()
    rows = known["architectures"]
    if options.name is not None:
        wanted = _plain(options.name)
        names = [row["architecture"] for row in rows]
        rows = [row for row in rows if wanted in _plain(row["architecture"]) or wanted in _plain(row["class"])]
        if not rows:
            raise ValueError(
                f"no architecture that was tried is called {with_nearest(options.name, names)}; others are edited "
                "where their layers are found by their shape, or with --edit-modules"
            )
    table, notes = model_table(rows)
    show(options, known | {"architectures": rows}, "\n".join([table.plain(), "", *notes]).rstrip())
    return 0


def tried_architectures() -> dict[str, object]:
    """``architectures``, a row each, and the ``versions`` they were tried with."""
    return json.loads((files("stableedit_cpp.cli") / "architectures.json").read_text(encoding="utf-8"))


def model_table(rows: list[dict]) -> tuple[Table, list[str]]:
    """What docs/models.md and the command show of such rows: the table, and the reasons that its numbers stand for."""
    reasons = list(dict.fromkeys(why for row in rows for why in row["why"].values()))

    def cell(row: dict, column: str) -> Cell:
        why = row["why"].get(column)
        return label(row[column] if why is None else f"{row[column]} ({reasons.index(why) + 1})")

    table = Table(_COLUMNS, [[cell(row, column) for column in _COLUMNS] for row in rows])
    return table, [f"{number}. {why}" for number, why in enumerate(reasons, 1)]


def _plain(name: str) -> str:
    """Without what people leave out or put otherwise: ``qwen3-moe`` is Qwen3Moe."""
    return "".join(filter(str.isalnum, name)).lower()
