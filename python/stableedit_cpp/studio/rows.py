"""The table of edits: a row a request, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stableedit_cpp.lifelong import RequestEntry
from stableedit_cpp.studio.known import Found

__all__ = ["STATES", "Row", "counts", "filtered", "row_of"]

STATES = ("holds", "forgotten", "not looked at", "superseded", "reverted")


class Row(NamedTuple):
    """
    Attributes:
        state: one of ``STATES``. since: what goes with it: the turn after which somebody looked or that reverted it,
            the request that superseded it.
    """

    id: str
    prompt: str
    target: str
    state: str
    since: str
    turn: int


def row_of(entry: RequestEntry, found: Mapping[str, Found]) -> Row:
    about = (entry.id, entry.request.prompt, entry.request.target)
    if not entry.current:
        state, _, since = entry.state.partition(" ")
        return Row(*about, state, since, entry.turn)
    seen = found.get(entry.id)
    if seen is None:
        return Row(*about, "not looked at", "", entry.turn)
    sure = "" if seen.probability is None else f", p {seen.probability:.2f}"
    return Row(*about, "holds" if seen.holds else "forgotten", f"after turn {seen.turn}{sure}", entry.turn)


def filtered(rows: Sequence[Row], text: str = "", state: str | None = None) -> list[Row]:
    """Those of a state that have every word of a text, in any case, in id, prompt or answer; the newest first."""
    words = text.casefold().split()

    def fits(row: Row) -> bool:
        return state in (None, row.state) and all(word in "\n".join(row[:3]).casefold() for word in words)

    return [row for row in reversed(rows) if fits(row)]


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many rows have each state; of the states that there are."""
    states = [row.state for row in rows]
    return {state: states.count(state) for state in STATES if state in states}
