"""What the records of a journal add up to: the steps that are in the model, and what became of each request."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.data.statements import Statement, content_digest, digest, statements_of, takes, without
from stableedit_cpp.lifelong.entries import Entries, RequestEntry, WarmUp
from stableedit_cpp.lifelong.index import Index
from stableedit_cpp.lifelong.journal.codec import decode_requests
from stableedit_cpp.lifelong.journal.record import Record
from stableedit_cpp.lifelong.pending import pending

__all__ = ["STEPS", "History", "RequestEntry", "Step"]

# A step is what changes the weights, and what a turn number counts: also a repair and a revert are steps.
STEPS = ("warm_up", "edit", "repair", "revert")
_INSERT = "INSERT INTO requests VALUES (?, ?, ?, ?, ?, ?, ?, NULL, NULL)"


@dataclass(frozen=True)
class Step:
    """A change of the weights: a turn of a warm-up, of edits or of repairs, or a revert."""

    turn: int
    kind: str
    record: Record


class History:
    """Reads the records of a journal in order, and answers from an index of them.

    Attributes:
        steps: all there ever were, by turn number. line: turn numbers of those that are in the model, in order.
        states: fingerprints of the state after each turn, 0 included, by name of its tensors (``is_state``).
        cut: by turn number, the number of the rollback record that took a step out.
        entries: the requests of the edits that are in the line, by id, in order.
        warm_up: the warm-up requests in the line, by id, in order.

    Args:
        records: to begin with, beyond those of the index.
        index: of earlier records. record: gives one by its number; None keeps those that are added in memory.
    """

    def __init__(
        self,
        records: Iterable[Record] = (),
        *,
        index: Index | None = None,
        record: Callable[[int], Record] | None = None,
    ) -> None:
        self.index = index or Index.private()
        self._kept: dict[int, Record] | None = {} if record is None else None
        self._record = record or self._kept.__getitem__
        self._decoded: tuple[int, list[EditRequest]] = (-1, [])
        self._load()
        for one in records:
            self.add(one)

    def _load(self) -> None:
        """What is in memory: a few numbers of each turn."""
        rows = self.index.rows
        self._steps = array("Q", (number for (number,) in rows.execute("SELECT record FROM steps ORDER BY turn")))
        self.cut = dict(rows.execute("SELECT turn, cut FROM steps WHERE cut IS NOT NULL ORDER BY turn"))
        self.line = [turn for turn in range(1, len(self._steps) + 1) if turn not in self.cut]
        self._states = dict(rows.execute("SELECT turn, record FROM states"))
        self.steps: Mapping[int, Step] = _Steps(self._steps, self._record)
        self.states: Mapping[int, dict[str, str]] = _States(self)
        self.entries: Mapping[str, RequestEntry] = Entries(self.index, self.request)
        self.warm_up: Mapping[str, EditRequest] = WarmUp(self.index, self.request)

    @property
    def turn(self) -> int:
        """The last turn in the model."""
        return self.line[-1] if self.line else 0

    @property
    def next_turn(self) -> int:
        """Turn numbers are never used twice, not even those of steps that were rolled back."""
        return len(self._steps) + 1

    def number(self, turn: int) -> int:
        """Of the record of a turn; 0 is before the first."""
        return self._steps[turn - 1] if turn else 0

    def add(self, record: Record) -> None:
        """Take in the next record."""
        self.index.change(lambda: self._enter(record))
        content = record.content
        if content["kind"] in STEPS:
            self._steps.append(record.number)
            self.line.append(content["turn"])
        elif content["kind"] == "rollback":
            keep = self.line_until(content["to_turn"])
            self.cut |= dict.fromkeys(self.line[len(keep) :], record.number)
            self.line = keep

    def _enter(self, record: Record) -> None:
        """Into the index."""
        rows, content = self.index.rows, record.content
        if self._kept is not None:
            self._kept[record.number] = record
        place = (record.number, record.end, record.tensor_bytes, record.digest, record.text)
        rows.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?)", place)
        kind = content["kind"]
        if "state" in content and kind not in STEPS:
            rows.execute("INSERT OR REPLACE INTO states VALUES (?, ?)", (content["turn"], record.number))
            self._states[content["turn"]] = record.number
        if kind in STEPS:
            turn = content["turn"]
            rows.execute("INSERT INTO steps VALUES (?, ?, NULL)", (turn, record.number))
            self._take_in(kind, turn, record)
        elif kind == "rollback":
            query = "UPDATE steps SET cut = ? WHERE turn > ? AND cut IS NULL"
            rows.execute(query, (record.number, content["to_turn"]))
            self._take_out(content["to_turn"])

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
        raise ValueError(f"there is no turn {turn}; the turns are 0 (before the first) to {len(self._steps)}")

    def request(self, record: int, place: int) -> EditRequest:
        """One of the requests of a record."""
        if self._decoded[0] != record:
            self._decoded = (record, decode_requests(self._record(record).content))
        return self._decoded[1][place]

    def current(self) -> list[EditRequest]:
        """The requests that hold: edited, neither reverted nor superseded; without those variants that a later request
        answers otherwise."""
        return list(self.parts(self.current_numbers()))

    def current_numbers(self) -> array:
        """Numbers of the requests that hold, among all that were edited, in order."""
        query = "SELECT number FROM requests WHERE NOT warm_up AND superseded_by IS NULL AND reverted_in IS NULL"
        return array("Q", (number for (number,) in self.index.rows.execute(query + " ORDER BY number")))

    def parts(self, numbers: Iterable[int]) -> Iterator[EditRequest]:
        """What is to hold of requests that do, by their numbers."""
        for number in numbers:
            query = "SELECT record, place FROM requests WHERE number = ?"
            request = self.request(*self.index.rows.execute(query, (number,)).fetchone())
            yield self._part(number, request) if request.variants else request

    def _part(self, number: int, request: EditRequest) -> EditRequest:
        lost = set()
        for statement in statements_of(request)[1:]:
            top, last = self._stack(statement.question)[-1][:2]
            if top != number and takes(last, statement):
                lost.add(statement.question)
        return without(request, lost)

    def counts(self) -> dict[str, int]:
        """How many requests were edited ("edits") or warmed up ("warm_up"), and what became of the edits: "current",
        "superseded", "reverted"."""
        query = (
            "SELECT count(*), count(reverted_in), "
            "coalesce(sum(superseded_by IS NULL AND reverted_in IS NULL), 0) FROM requests WHERE NOT warm_up"
        )
        edits, reverted, current = self.index.rows.execute(query).fetchone()
        superseded = edits - reverted - current
        found = {"edits": edits, "reverted": reverted, "current": current, "superseded": superseded}
        return found | {"warm_up": len(self.warm_up)}

    def reverted(self) -> set[str]:
        """Ids of the requests that were taken out."""
        return {id for (id,) in self.index.rows.execute("SELECT id FROM requests WHERE reverted_in IS NOT NULL")}

    def pending(
        self, requests: Iterable[EditRequest | Mapping[str, object]], *, warm_up: bool = False
    ) -> Sequence[EditRequest]:
        """What a file of requests still asks for, with ids that were not used yet; see ``SessionView.pending``."""
        return pending(self.index, requests, self.warm_up if warm_up else self.entries, warm_up=warm_up)

    def predecessor(self, question: str, without: Container[str] = ()) -> str | None:
        """Id of the request that asked a question last, as its prompt or a variant, or would have ``without`` some."""
        for _, _, id, reverted, _ in reversed(self._stack(digest(question))):
            if reverted is None and id not in without:
                return id
        return None

    def holds(self, id: str, question: str) -> bool:
        """Whether this request is the last that asked a question."""
        return self.predecessor(question) == id

    def superseded_by(self, request: EditRequest) -> list[str]:
        """Ids of the current requests that this one would supersede."""
        return [
            id
            for statement in statements_of(request)
            for _, earlier, id, reverted, superseded in self._stack(statement.question)
            if earlier.own and reverted is None and superseded is None and takes(statement, earlier)
        ]

    def _stack(self, question: bytes) -> list[tuple[int, Statement, str, int | None, int | None]]:
        """The edits that ask a question, the topmost last: number, statement, id, and by what it was reverted or
        superseded."""
        query = (
            "SELECT number, own, answer, id, reverted_in, superseded_by FROM statements JOIN requests USING (number) "
            "WHERE question = ? AND NOT statements.warm_up AND gone_in IS NULL ORDER BY number"
        )
        rows = self.index.rows.execute(query, (question,))
        return [(number, Statement(question, bool(own), answer), *rest) for number, own, answer, *rest in rows]

    def _take_in(self, kind: str, turn: int, record: Record) -> None:
        rows, content = self.index.rows, record.content
        if kind == "revert":
            self._revert(content["requests"], turn)
            return
        requests = decode_requests(content)
        if kind == "repair":
            for request in requests:
                row = rows.execute("SELECT number FROM requests WHERE id = ? AND NOT warm_up", (request.id,)).fetchone()
                rows.execute("INSERT OR IGNORE INTO repairs VALUES (?, ?)", (row[0], turn))
            return
        warm_up = kind == "warm_up"
        (first,) = rows.execute("SELECT coalesce(max(number) + 1, 0) FROM requests").fetchone()
        for place, request in enumerate(requests):
            number = first + place
            what = (number, warm_up, request.id, turn, record.number, place, content_digest(request))
            rows.execute(_INSERT, what)
            for question, own, answer in statements_of(request):
                before = () if warm_up else self._stack(question)
                rows.execute(
                    "INSERT INTO statements VALUES (?, ?, ?, ?, ?, NULL)", (question, number, warm_up, own, answer)
                )
                if before:
                    self._settle(question, turn)

    def _revert(self, ids: Sequence[str], turn: int) -> None:
        rows = self.index.rows
        numbers = []
        for id in ids:
            (number,) = rows.execute("SELECT number FROM requests WHERE id = ? AND NOT warm_up", (id,)).fetchone()
            rows.execute("UPDATE requests SET reverted_in = ? WHERE number = ?", (turn, number))
            numbers.append(number)
        questions = {
            question
            for number in numbers
            for (question,) in rows.execute("SELECT question FROM statements WHERE number = ?", (number,))
        }
        for question in questions:
            self._settle(question, turn)

    def _take_out(self, to_turn: int) -> None:
        """Forget what came after a turn; what it had superseded or reverted is what it was."""
        rows = self.index.rows
        query = "SELECT coalesce((SELECT min(number) FROM requests WHERE turn > ?), max(number) + 1, 0) FROM requests"
        (first,) = rows.execute(query, (to_turn,)).fetchone()
        query = (
            "SELECT DISTINCT question FROM statements WHERE number < :first AND NOT warm_up AND question IN ("
            "SELECT question FROM statements WHERE number >= :first OR number IN "
            "(SELECT number FROM requests WHERE reverted_in > :turn))"
        )
        touched = [question for (question,) in rows.execute(query, {"first": first, "turn": to_turn})]
        rows.execute("UPDATE requests SET reverted_in = NULL WHERE reverted_in > ?", (to_turn,))
        rows.execute("UPDATE statements SET gone_in = NULL WHERE gone_in > ?", (to_turn,))
        rows.execute("DELETE FROM repairs WHERE turn > ?", (to_turn,))
        rows.execute("DELETE FROM statements WHERE number >= ?", (first,))
        rows.execute("DELETE FROM requests WHERE number >= ?", (first,))
        for question in touched:
            self._settle(question, to_turn)

    def _settle(self, question: bytes, turn: int) -> None:
        """The topmost is current; it supersedes those under it whose prompt it takes. What is reverted on top is gone;
        what is reverted under it stays where it is, since it was done."""
        rows, stack = self.index.rows, self._stack(question)
        while stack and stack[-1][3] is not None:
            number, statement, *_ = stack.pop()
            rows.execute(
                "UPDATE statements SET gone_in = ? WHERE number = ? AND question = ?", (turn, number, question)
            )
            if statement.own:
                rows.execute("UPDATE requests SET superseded_by = NULL WHERE number = ?", (number,))
        for number, statement, _, _, before in stack:
            top, last = stack[-1][:2]
            now = top if number != top and takes(last, statement) else None
            if statement.own and now != before:
                rows.execute("UPDATE requests SET superseded_by = ? WHERE number = ?", (now, number))


class _Steps(Mapping[int, Step]):
    """By turn number; what a step's record says is read when it is looked at."""

    def __init__(self, numbers: Sequence[int], record: Callable[[int], Record]) -> None:
        self._numbers, self._record = numbers, record

    def __getitem__(self, turn: int) -> Step:
        if not 1 <= turn <= len(self._numbers):
            raise KeyError(turn)
        record = self._record(self._numbers[turn - 1])
        return Step(turn, record.content["kind"], record)

    def __iter__(self) -> Iterator[int]:
        return iter(range(1, len(self._numbers) + 1))

    def __len__(self) -> int:
        return len(self._numbers)


class _States(Mapping[int, dict[str, str]]):
    """What the records say of the state after each turn."""

    def __init__(self, history: History) -> None:
        self._history = history

    def __getitem__(self, turn: int) -> dict[str, str]:
        history = self._history
        if turn not in history._states and not 1 <= turn < history.next_turn:
            raise KeyError(turn)
        number = history._states.get(turn, history.number(turn))
        return history._record(number).content["state"]

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._history.next_turn))

    def __len__(self) -> int:
        return self._history.next_turn
