"""What was made of a file that its writer may not have meant: counted while it is read, and said once."""

from __future__ import annotations

import warnings
from collections.abc import Collection

__all__ = ["Notes"]

_SENTENCES = {
    "blanks": "blanks or line ends around {texts} are dropped, e.g. {first}",
    "answers": "of a list of answers ({requests}) the first is edited; any of them is right where free answers are "
    "scored",
    "lists": "of several texts in one field ({names}) the first is taken",
    "unused": "not used: {names}",
    "empty": "rows without content are skipped: {count}",
}


class Notes:
    """Counts what happens, by kind, and keeps the names that go with it.

    Args:
        source: what is read, for the beginning of each warning; None for records from memory.
    """

    def __init__(self, source: object = None) -> None:
        self._source = source
        self._counts: dict[str, int] = {}
        self._names: dict[str, dict[str, None]] = {}

    def add(self, kind: str, *names: str) -> None:
        """It happened once more, with these names, or this example."""
        self._counts[kind] = self._counts.get(kind, 0) + 1
        known = self._names.setdefault(kind, {})
        if len(known) < 20:
            known.update(dict.fromkeys(names))

    def say(self, kinds: Collection[str] = tuple(_SENTENCES), *, stacklevel: int = 2) -> None:
        """A warning for each of these kinds that happened; all is forgotten then."""
        whose = "" if self._source is None else f"{self._source}: "
        counts, self._counts = self._counts, {}
        found, self._names = self._names, {}
        for kind, count in counts.items():
            if kind not in kinds:
                continue
            names = list(found[kind])
            requests = f"{count} request{'s' * (count != 1)}"
            texts = f"{count} prompt{'s' * (count != 1)} or target{'s' * (count != 1)}"
            words = {"count": count, "requests": requests, "texts": texts}
            text = _SENTENCES[kind].format(names=", ".join(names), first=names[0] if names else "", **words)
            warnings.warn(whose + text, stacklevel=stacklevel + 1)
