"""How a session reads: its state in a few lines, and a line for every record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["LogEntry", "SessionStatus", "describe"]


@dataclass(frozen=True)
class SessionStatus:
    """Where a session stands. ``str()`` is for people, ``asdict`` for JSON.

    Attributes:
        turn: the last step in the model. edits, warm_up: requests that were edited and are in the line of the model.
        current, superseded, reverted: how many of the edits are what.
        turns_since_snapshot: so many have to be done again after a crash.
        damage: what is wrong with the journal, if anything.
        writer: who has it open for writing.
    """

    directory: str
    model: str | None
    editor: str
    detail: str
    created: str
    turn: int
    edits: int
    warm_up: int
    current: int
    superseded: int
    reverted: int
    records: int
    journal_bytes: int
    snapshots: int
    snapshot_bytes: int
    turns_since_snapshot: int
    damage: str | None
    writer: str | None

    def __str__(self) -> str:
        lines = [
            f"session       {self.directory} ({self.editor}, {self.model or 'model of no recorded name'})",
            f"created       {self.created}, journal of {self.detail}",
            f"turn          {self.turn}",
            f"requests      {self.current} current, {self.superseded} superseded, {self.reverted} reverted; "
            f"{self.warm_up} of the warm-up",
            f"journal       {self.records} records, {_size(self.journal_bytes)}",
            f"snapshots     {self.snapshots}, {_size(self.snapshot_bytes)}; {self.turns_since_snapshot} turns since "
            "the last",
            f"writer        {'open ' + self.writer if self.writer else 'none'}",
        ]
        return "\n".join([*lines, f"DAMAGED       {self.damage}"] if self.damage else lines)


@dataclass(frozen=True)
class LogEntry:
    """One record of the journal, for people. ``turn`` is None for what changes no weights."""

    record: int
    time: str
    kind: str
    turn: int | None
    in_model: bool
    text: str

    def __str__(self) -> str:
        turn = "" if self.turn is None else f"turn {self.turn}"
        return f"{self.record:>5}  {self.time}  {turn:<10}{self.kind:<10}{self.text}"


def describe(content: dict) -> str:
    """What a record says, in a line."""
    return _TEXTS[content["kind"]](content)


def _turn_text(content: dict) -> str:
    report = content["report"]
    text = f"{report['requests']} requests, {content['passes']} pass{'es' * (content['passes'] != 1)}"
    text += f" ({report['held']} held already)" if report.get("held") else ""
    text += f", efficacy before {report['efficacy_before']:.2f}"
    for new, old in content.get("supersedes", {}).items():
        text += f"; {new} supersedes {old}"
    return text


_TEXTS: dict[str, Callable[[dict], str]] = {
    "created": lambda content: f"{content['config']['editor']} on {content['model']['source']}",
    "warm_up": _turn_text,
    "edit": _turn_text,
    "repair": _turn_text,
    "revert": lambda content: f"took out {', '.join(content['requests'])}",
    "rollback": lambda content: (
        f"back to turn {content['to_turn']}; out of the model: turns " + ", ".join(map(str, content["cut"]))
    ),
    "recovered": lambda content: f"{content['reason']}; {content['bytes']} bytes are kept in {content['aside']}",
    "moved": lambda content: content["reason"],
}


def _size(count: float) -> str:
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        del units[0]
    return f"{count:.3g} {units[0]}"
