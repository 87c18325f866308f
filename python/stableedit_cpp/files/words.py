"""What messages and records say in the same words everywhere: names, whole numbers, times, formats."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable, Mapping

__all__ = ["check_format", "check_whole", "nearest", "now", "with_nearest"]


def nearest(name: object, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for the known name that it most resembles, or nothing."""
    near = difflib.get_close_matches(str(name).lower(), list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def with_nearest(name: str, known: Iterable[str]) -> str:
    """The name, the known one that it most resembles, and the list of all that are known; the end of a message."""
    known = list(known)
    return f"{name!r}{nearest(name, known) or ';'} known are: {', '.join(known)}"


def check_whole(name: str, value: object, least: int = 1, *, none: bool = False) -> None:
    """Refuse what is no whole number of at least ``least``; ``True`` is none.

    Args:
        name: what the value is of, in the message.
        none: whether None will do as well.

    Raises:
        ValueError: with the name and the value.
    """
    if value is None and none:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number, at least {least}{', or None' * none}, not {value!r}")


def now() -> str:
    """The local time with its offset, to the second, as all records have it: 2026-01-31T12:00:00+0100."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def check_format(document: object, format: str, version: int, what: str, writer: str) -> None:
    """Refuse a document that is not ``{"format": format, "version": version, ...}``.

    Args:
        what: the file, in the message. writer: what writes such files.

    Raises:
        ValueError: for another format, or a version that this program does not read.
    """
    if not isinstance(document, Mapping) or document.get("format") != format:
        raise ValueError(f"{what} is not of the format {format!r} that {writer} writes")
    if str(document.get("version")) != str(version):
        raise ValueError(f"{what} has version {document.get('version')!r}; this stableedit reads version {version}")
