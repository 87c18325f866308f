"""Which edits hold, as far as anybody has looked; kept beside the journal, which says nothing of it."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable
from pathlib import Path
from typing import NamedTuple

from stableedit_cpp.files.atomic import write_json
from stableedit_cpp.files.words import check_format, now
from stableedit_cpp.lifelong import AuditEntry

__all__ = ["Found", "Known", "Looked"]

_FORMAT = {"format": "stableedit-studio", "version": 1}
_FILE = "studio.json"


class Found(NamedTuple):
    """What was seen of a request last.

    Attributes:
        turn: after which. holds: whether it did. probability: of its least likely answer token; None where only the
            turn that edited it was asked whether it took.
    """

    turn: int
    holds: bool
    probability: float | None = None


class Looked(NamedTuple):
    """An audit: after which turn, how many of so many requests held, and when."""

    turn: int
    held: int
    requests: int
    time: str


class Known:
    """What is known of a session's requests.

    What was seen after a turn that was rolled back since is forgotten: turn numbers are never used twice.

    Raises:
        ValueError: for a file of another format.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / _FILE
        self.found: dict[str, Found] = {}
        self.audits: list[Looked] = []
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.path} is not valid JSON ({error}); without it, edits are audited anew") from None
        check_format(document, **_FORMAT, what=str(self.path), writer="`stableedit studio`")
        self.found = {id: Found(*values) for id, values in document["found"].items()}
        self.audits = [Looked(*values) for values in document["audits"]]

    def note_turn(self, turn: int, took: Iterable[str], failed: Iterable[str]) -> None:
        """What became of the requests of a turn."""
        self.found |= {id: Found(turn, True) for id in took} | {id: Found(turn, False) for id in failed}

    def note_audit(self, turn: int, entries: Iterable[AuditEntry]) -> None:
        """What an audit, or a part of one, saw after a turn."""
        self.found |= {entry.id: Found(turn, entry.holds, round(entry.probability, 6)) for entry in entries}

    def end_audit(self, turn: int, held: int, requests: int) -> None:
        """An audit is over."""
        self.audits.append(Looked(turn, held, requests, now()))

    def keep(self, line: Container[int]) -> None:
        """Forget what was seen after turns that are not in the model."""
        self.found = {id: found for id, found in self.found.items() if found.turn in line}
        self.audits = [looked for looked in self.audits if looked.turn in line]

    def save(self) -> None:
        """
        Raises:
            OSError: if it cannot be written; what was there is as it was.
        """
        write_json(self.path, {**_FORMAT, "found": self.found, "audits": self.audits})
