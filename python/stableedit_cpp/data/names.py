"""Names of fields as people write them: "Prompt", " target", "Rephrase Prompt"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

__all__ = ["plain_name", "with_known_names"]


def plain_name(name: str) -> str:
    """A name in small letters, with ``_`` for blanks and hyphens, and without blanks or marks around it."""
    return re.sub(r"[\s\-_]+", "_", name.strip("\ufeff\u200b\"' \t\r\n\u00a0").casefold())


def with_known_names(record: Mapping[str, object], known: frozenset[str]) -> Mapping[str, object]:
    """The record, with those of its fields called by a known name that have it but for case, blanks and hyphens.

    A field that has a known name to the letter keeps it; of two fields that would get one name, neither gets it.
    """
    changes = _changes(tuple(map(str, record)), known)
    return {changes.get(str(name), name): value for name, value in record.items()} if changes else record


@lru_cache(maxsize=256)
def _changes(names: tuple[str, ...], known: frozenset[str]) -> dict[str, str]:
    wanted = _by_plain_name(known)
    meant = {name: wanted[plain_name(name)] for name in names if name not in known and plain_name(name) in wanted}
    given = [*meant.values(), *names]
    return {name: known_name for name, known_name in meant.items() if given.count(known_name) == 1}


@lru_cache(maxsize=64)
def _by_plain_name(known: Iterable[str]) -> dict[str, str]:
    return {plain_name(name): name for name in known}
