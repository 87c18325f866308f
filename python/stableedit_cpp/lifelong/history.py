"""What the records of a journal add up to: the steps that are in the model, and what became of each request."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from stableedit_cpp.data.request import EditRequest, as_requests
from stableedit_cpp.data.superseding import current_part, replaces
from stableedit_cpp.lifelong.journal.codec import decode_requests
from stableedit_cpp.lifelong.journal.record import Record
from stableedit_cpp.lifelong.naming import asks_for, with_ids

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
        superseded_by: id of the last request that asks its prompt, where that replaces it (``data.superseding``).
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
        states: fingerprints of the state after each turn, 0 included, by name of its tensors (``is_state``).
        cut: by turn number, the number of the rollback record that took a step out.
        entries: the requests of the edits that are in the line, by id, in order.
        warm_up: the warm-up requests in the line, by id, in order.
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
        """The requests that hold: edited, neither reverted nor superseded; without those variants that a later request
        answers otherwise."""
        last = {question: edited[-1] for question, edited in self._edited.items() if edited}
        return [current_part(entry.request, last) for entry in self.entries.values() if entry.current]

    def pending(
        self, requests: Iterable[EditRequest | Mapping[str, object]], *, warm_up: bool = False
    ) -> list[EditRequest]:
        """What a file of requests still asks for, with ids that were not used yet; see ``SessionView.pending``.

        Question by question: what was edited last is compared with how the file's requests begin, and those that it
        ends with are done. So a file that contradicts itself goes on where it was, and what was reverted, or superseded
        by a request of another file, is asked for again.
        """
        requests = as_requests(requests)
        known, stacks = (self.warm_up, self._warmed_up) if warm_up else (self.entries, self._edited)
        asked: dict[str, list[int]] = {}
        last: dict[str, int] = {}
        for index, request in enumerate(requests):
            asked.setdefault(request.question, []).append(index)
            last |= dict.fromkeys(request.answers, index)
        left = set()
        for question, indices in asked.items():
            edited = [request for request in stacks.get(question, []) if request.question == question]
            left.update(indices[_done(edited, [requests[index] for index in indices]) :])
        for question, index in last.items():  # what a variant of another file has replaced since
            edited = stacks.get(question)
            if not edited or edited[-1].answers[question] != requests[index].answers[question]:
                left.add(index)
        return with_ids([requests[index] for index in sorted(left)], known)

    def predecessor(self, question: str, without: Container[str] = ()) -> str | None:
        """Id of the request that asked a question last, as its prompt or a variant, or would have ``without`` some."""
        for request in reversed(self._edited.get(question, [])):
            if self.entries[request.id].reverted_in is None and request.id not in without:
                return request.id
        return None

    def holds(self, id: str, question: str) -> bool:
        """Whether this request is the last that asked a question."""
        return self.predecessor(question) == id

    def superseded_by(self, request: EditRequest) -> list[str]:
        """Ids of the current requests that this one would supersede."""
        return [
            earlier.id
            for question in request.answers
            for earlier in self._edited.get(question, [])
            if earlier.question == question
            and self.entries[earlier.id].current
            and replaces(request, earlier, question)
        ]

    def _forget_requests(self) -> None:
        self.entries: dict[str, RequestEntry] = {}
        self.warm_up: dict[str, EditRequest] = {}
        # By question, one upon the other: the topmost is current. What is reverted under it stays where it is, since
        # it was done; what is reverted on top is gone.
        self._edited: dict[str, list[EditRequest]] = {}
        self._warmed_up: dict[str, list[EditRequest]] = {}

    def _take_in(self, step: Step) -> None:
        content = step.record.content
        if step.kind == "revert":
            for id in content["requests"]:
                self.entries[id].reverted_in = step.turn
            for question in {q for id in content["requests"] for q in self.entries[id].request.answers}:
                self._settle(question)
            return
        for request in decode_requests(content):
            if step.kind == "warm_up":
                self.warm_up[request.id] = request
                for question in request.answers:
                    self._warmed_up.setdefault(question, []).append(request)
            elif step.kind == "repair":
                self.entries[request.id].repairs.append(step.turn)
            else:
                self.entries[request.id] = RequestEntry(request.id, request, step.turn)
                for question in request.answers:
                    self._edited.setdefault(question, []).append(request)
                    self._settle(question)

    def _settle(self, question: str) -> None:
        """The topmost is current; it supersedes those under it whose prompt it takes."""
        edited = self._edited[question]
        while edited and self.entries[edited[-1].id].reverted_in is not None:
            self._supersede(edited.pop(), question, None)
        for request in edited:
            self._supersede(request, question, edited[-1])

    def _supersede(self, request: EditRequest, question: str, top: EditRequest | None) -> None:
        if request.question == question:
            gone = top is not None and top is not request and replaces(top, request, question)
            self.entries[request.id].superseded_by = top.id if gone else None


def _done(edited: Sequence[EditRequest], wanted: Sequence[EditRequest]) -> int:
    """How many of the wanted requests, from the first on, are those that were edited last."""
    for count in range(min(len(edited), len(wanted)), 0, -1):
        if all(map(asks_for, wanted, edited[-count:])):
            return count
    return 0
