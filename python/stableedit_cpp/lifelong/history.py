"""What the records of a journal add up to: the steps that are in the model, and what became of each request."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.lifelong.journal.record import Record

__all__ = ["STEPS", "History", "RequestEntry", "Step"]

# A step is what changes the weights, and what a turn number counts: also a repair and a revert are steps.
STEPS = ("warm_up", "edit", "repair", "revert")


@dataclass(frozen=True)
class Step:
    """A change of the weights: a turn of a warm-up, of edits or of repairs, or a revert."""

    turn: int
    kind: str
    record: Record


@dataclass
class RequestEntry:
    """An edit request and what became of it.

    Attributes:
        turn: the one it was edited in. repairs: turns that repaired it.
        superseded_by: id of a later request with the same prompt that is current or superseded itself.
        reverted_in: turn of the revert that took it out.
    """

    id: str
    request: EditRequest
    turn: int
    repairs: list[int] = field(default_factory=list)
    superseded_by: str | None = None
    reverted_in: int | None = None

    @property
    def state(self) -> str:
        if self.reverted_in is not None:
            return f"reverted in turn {self.reverted_in}"
        return f"superseded by {self.superseded_by}" if self.superseded_by else "current"

    @property
    def current(self) -> bool:
        return self.state == "current"


class History:
    """Reads the records of a journal in order.

    Attributes:
        steps: all there ever were, by turn number. line: turn numbers of those that are in the model, in order.
        states: digests of the state after each turn, 0 included, by name of its tensors.
        cut: by turn number, the number of the rollback record that took a step out.
        entries: the requests of the edits that are in the line, by id, in order.
        warm_up: ids of the warm-up requests in the line.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.steps: dict[int, Step] = {}
        self.line: list[int] = []
        self.states: dict[int, dict[str, str]] = {}
        self.cut: dict[int, int] = {}
        self._forget_requests()
        for record in records:
            self.add(record)

    @property
    def turn(self) -> int:
        """The last turn in the model."""
        return self.line[-1] if self.line else 0

    @property
    def next_turn(self) -> int:
        """Turn numbers are never used twice, not even those of steps that were rolled back."""
        return len(self.steps) + 1

    def add(self, record: Record) -> None:
        content = record.content
        if "state" in content:
            self.states[content["turn"]] = content["state"]
        if content["kind"] in STEPS:
            step = Step(content["turn"], content["kind"], record)
            self.steps[step.turn] = step
            self.line.append(step.turn)
            self._take_in(step)
        elif content["kind"] == "rollback":
            keep = self.line_until(content["to_turn"])
            self.cut |= dict.fromkeys(self.line[len(keep) :], record.number)
            self.line = keep
            self._forget_requests()
            for turn in self.line:
                self._take_in(self.steps[turn])

    def line_until(self, turn: int) -> list[int]:
        """The steps in the model up to a turn; 0 is the model before the first.

        Raises:
            ValueError: for a turn that is not in the model, saying why.
        """
        if turn == 0:
            return []
        if turn in self.line:
            return self.line[: self.line.index(turn) + 1]
        if turn in self.cut:
            raise ValueError(f"turn {turn} was itself rolled back (record {self.cut[turn]}); see the log")
        raise ValueError(f"there is no turn {turn}; the turns are 0 (before the first) to {len(self.steps)}")

    def current(self) -> list[EditRequest]:
        """The requests that hold: edited, neither reverted nor superseded by one with the same prompt."""
        return [entry.request for entry in self.entries.values() if entry.current]

    def predecessor(self, question: str, without: Container[str] = ()) -> str | None:
        """Id of the request that is current for a question, or would be ``without`` some."""
        ids = [id for id in self._by_question.get(question, []) if self.entries[id].reverted_in is None]
        ids = [id for id in ids if id not in without]
        return ids[-1] if ids else None

    def _forget_requests(self) -> None:
        self.entries: dict[str, RequestEntry] = {}
        self.warm_up: set[str] = set()
        self._by_question: dict[str, list[str]] = {}

    def _take_in(self, step: Step) -> None:
        content = step.record.content
        if step.kind == "revert":
            for id in content["requests"]:
                self.entries[id].reverted_in = step.turn
                self._settle(self.entries[id].request.question)
            return
        for fields in content["requests"]:
            request = EditRequest(**fields)
            if step.kind == "warm_up":
                self.warm_up.add(request.id)
            elif step.kind == "repair":
                self.entries[request.id].repairs.append(step.turn)
            else:
                self.entries[request.id] = RequestEntry(request.id, request, step.turn)
                self._by_question.setdefault(request.question, []).append(request.id)
                self._settle(request.question)

    def _settle(self, question: str) -> None:
        """Of the requests with one question that were not reverted, the last is current."""
        current = self.predecessor(question)
        for id in self._by_question[question]:
            self.entries[id].superseded_by = current if id != current and current is not None else None
