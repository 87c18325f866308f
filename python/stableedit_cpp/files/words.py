"""What to say about a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["with_nearest"]


def with_nearest(name: str, known: Iterable[str]) -> str:
    """The name, the known one that it most resembles, and the list of all that are known; the end of a message."""
    known = list(known)
    near = difflib.get_close_matches(str(name).lower(), known, n=1)
    return f"{name!r}" + (f", did you mean {near[0]!r}?" if near else ";") + f" known are: {', '.join(known)}"
