"""The index of a session: it says what the journal says, is found out where it does not, and spares reading records."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import time

import pytest

from stableedit_cpp.data import stream as streams
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.data.spool import Spool
from stableedit_cpp.data.superseding import current_part, replaces
from stableedit_cpp.errors import DamagedJournal
from stableedit_cpp.lifelong import SessionView
from stableedit_cpp.lifelong import index as indices
from stableedit_cpp.lifelong.history import History
from stableedit_cpp.lifelong.index import FILE, Index
from stableedit_cpp.lifelong.journal import journal as journals
from stableedit_cpp.lifelong.journal.record import Record
from support.sessions import FACTS, assert_same_bits, create, reopen, state_of, stream, without_closing


class Reference:
    """What a history is, in dicts and lists and from the beginning each time."""

    def __init__(self, contents: list[dict]) -> None:
        self.entries: dict[str, dict] = {}
        self.stacks: dict[str, list[EditRequest]] = {}
        self.warm_up: dict[str, EditRequest] = {}
        line: list[dict] = []
        for content in contents:
            if content["kind"] == "rollback":
                line = [step for step in line if step["turn"] <= content["to_turn"]]
            else:
                line.append(content)
        self.line = [step["turn"] for step in line]
        for step in line:
            self.take_in(step)

    def take_in(self, step: dict) -> None:
        turn = step["turn"]
        if step["kind"] == "revert":
            for id in step["requests"]:
                self.entries[id]["reverted"] = turn
            for question in {q for id in step["requests"] for q in self.entries[id]["request"].answers}:
                self.settle(question)
            return
        for fields in step["requests"]:
            request = EditRequest(**fields)
            if step["kind"] == "warm_up":
                self.warm_up[request.id] = request
            elif step["kind"] == "repair":
                self.entries[request.id]["repairs"].append(turn)
            else:
                entry = {"request": request, "turn": turn, "repairs": [], "by": None, "reverted": None}
                self.entries[request.id] = entry
                for question in request.answers:
                    self.stacks.setdefault(question, []).append(request)
                    self.settle(question)

    def settle(self, question: str) -> None:
        stack = self.stacks[question]
        while stack and self.entries[stack[-1].id]["reverted"] is not None:
            gone = stack.pop()
            if gone.question == question:
                self.entries[gone.id]["by"] = None
        for request in stack:
            if request.question == question:
                taken = request is not stack[-1] and replaces(stack[-1], request, question)
                self.entries[request.id]["by"] = stack[-1].id if taken else None

    def current(self) -> list[EditRequest]:
        last = {question: stack[-1] for question, stack in self.stacks.items() if stack}
        left = [one for one in self.entries.values() if one["by"] is None and one["reverted"] is None]
        return [current_part(one["request"], last) for one in left]


def any_contents(seed: int, count: int) -> list[dict]:
    """Turns, repairs, reverts and rollbacks over few questions."""
    draw, contents, turn, made = random.Random(seed), [], 0, 0
    while len(contents) < count:
        state = Reference(contents)
        live = [id for id, entry in state.entries.items() if entry["reverted"] is None]
        kind = draw.choice(["edit"] * 5 + ["warm_up", "repair", "revert", "revert", "rollback"])
        if kind == "rollback":
            contents.append({"kind": kind, "to_turn": draw.choice([0, *state.line, *state.line[-3:]])})
            continue
        if kind in ("repair", "revert") and not live:
            continue
        turn += 1
        if kind == "revert":
            requests = draw.sample(live, min(len(live), draw.randint(1, 2)))
        elif kind == "repair":
            requests = [state.entries[id]["request"].to_dict() for id in draw.sample(live, 1)]
        else:
            requests = []
            for _ in range(draw.randint(1, 3)):
                made += 1
                (prompt, target), *others = [(f"q{draw.randrange(5)}", f"a{draw.randrange(3)}") for _ in range(3)]
                variants = {
                    question: answer for question, answer in others if question != prompt and draw.random() < 0.5
                }
                requests.append(EditRequest(prompt, target, id=f"r{made}", variants=list(variants.items())).to_dict())
        contents.append({"kind": kind, "turn": turn, "requests": requests})
    return contents


@pytest.mark.parametrize("seed", range(6))
def test_a_history_is_what_its_records_add_up_to(seed):
    contents = any_contents(seed, 40)
    history = History()
    for number, content in enumerate(contents):
        history.add(Record(number, 0, 0, b"", content, 0))
        if number % 4 and number < len(contents) - 1:
            continue
        expected = Reference(contents[: number + 1])
        assert history.line == expected.line
        found = {
            id: {
                "request": e.request,
                "turn": e.turn,
                "repairs": e.repairs,
                "by": e.superseded_by,
                "reverted": e.reverted_in,
            }
            for id, e in history.entries.items()
        }
        assert found == expected.entries and list(found) == list(expected.entries)
        assert dict(history.warm_up) == expected.warm_up
        assert history.current() == expected.current()
        assert history.counts()["current"] == len(expected.current())
        for question in expected.stacks:
            holding = [r.id for r in expected.stacks[question] if expected.entries[r.id]["reverted"] is None]
            assert history.predecessor(question) == (holding[-1] if holding else None)


@pytest.fixture
def directory(tokenizer, tmp_path):
    with create(tmp_path / "s", tokenizer, detail="requests") as session:
        session.edit(stream(12))
        session.revert("f4", others=0)
        session.edit(stream(3, 12))
    return tmp_path / "s"


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """Numbers of the records that are read and checked."""
    numbers, real = [], journals.read_record

    def reading(*arguments):
        record = real(*arguments)
        numbers.append(record.number)
        return record

    monkeypatch.setattr(journals, "read_record", reading)
    return numbers


def entries_of(view: SessionView) -> dict:
    return dict(view.history.entries.items())


def test_opening_reads_no_record_but_those_it_needs(directory, tokenizer, read):
    view = SessionView(directory)
    assert view.status().edits == 15 and view.damage is None and read == []
    with reopen(directory, tokenizer) as session:
        assert read == [] and session.history.turn == 6
        session.edit(stream(3, 15))
    assert read == [] and SessionView(directory).status().edits == 18 and read == []


@pytest.mark.parametrize("what", ["absent", "damaged", "another", "older", "copied", "version", "empty"])
def test_is_made_anew(what, directory, tokenizer, read):
    expected = entries_of(SessionView(directory))
    file, journal = directory / FILE, directory / "journal"
    if what == "absent":  # a session of an earlier version
        file.unlink()
    elif what == "damaged":
        file.write_bytes(b"SQLite format 3\0" + os.urandom(5000))
    elif what == "another":
        file.write_bytes(b"no database")
    elif what == "empty":
        file.write_bytes(b"")
    elif what == "version":
        with sqlite3.connect(file) as rows:
            rows.execute("PRAGMA user_version = 99")
    elif what == "older":
        with create(directory.parent / "other", tokenizer) as other:
            other.edit(stream(3))
        shutil.copy(directory.parent / "other" / FILE, file)
    else:
        os.utime(journal)
    read.clear()
    assert entries_of(SessionView(directory)) == expected and read == list(range(7))
    read.clear()
    with reopen(directory, tokenizer) as session:
        assert entries_of(session) == expected and read == list(range(7))
    read.clear()
    with reopen(directory, tokenizer) as session:
        assert entries_of(session) == expected and read == []


def test_after_a_kill_the_same(tokenizer, tmp_path, read):
    session = create(tmp_path / "s", tokenizer, detail="requests")
    session.edit(stream(9))
    after, expected = state_of(session.editor), entries_of(session)
    without_closing(session)
    read.clear()
    again = reopen(tmp_path / "s", tokenizer)
    assert read == [] and entries_of(again) == expected
    assert_same_bits(state_of(again.editor), after)


def test_damage_is_found_though_the_size_is_the_same(directory, tokenizer):
    journal = directory / "journal"
    data = bytearray(journal.read_bytes())
    data[len(data) // 2] ^= 1
    journal.write_bytes(data)
    assert SessionView(directory).damage is not None
    with pytest.raises(DamagedJournal):
        reopen(directory, tokenizer)


def test_a_write_within_the_clocks_step_is_seen(directory):
    """The time of change that the session gives its journal is one that no other write will give it."""
    journal, index = directory / "journal", Index.on_disk(directory)
    index.change(lambda: None)
    assert index.fits(journal, growing=False)
    with journal.open("r+b") as file:
        file.write(b"SEjr")
    assert not index.fits(journal, growing=False)


def test_where_it_cannot_be_written_the_session_goes_on(directory, tokenizer, monkeypatch):
    session, real = reopen(directory, tokenizer), sqlite3.connect
    expected = session.history.counts()["edits"]

    def connect(database, *arguments, **options):
        if str(database) == str(directory / FILE):
            raise sqlite3.OperationalError("disk full")
        return real(database, *arguments, **options)

    monkeypatch.setattr(indices.sqlite3, "connect", connect)
    session.edit(stream(3, 15))
    assert session.history.counts()["edits"] == expected + 3
    entries = entries_of(session)
    session.close()
    monkeypatch.undo()
    with reopen(directory, tokenizer) as again:
        assert entries_of(again) == entries


def test_a_turn_that_is_refused_leaves_no_trace_in_it(directory, tokenizer, monkeypatch):
    session = reopen(directory, tokenizer)
    before = entries_of(session)
    monkeypatch.setattr(session.journal, "append", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        session.edit(stream(3, 15))
    assert entries_of(session) == before
    monkeypatch.undo()
    session.edit(stream(3, 15))
    assert len(entries_of(session)) == len(before) + 3


def test_a_closed_session_says_what_it_said(directory, tokenizer):
    session = reopen(directory, tokenizer)
    session.close()
    before = entries_of(session)
    with reopen(directory, tokenizer) as other:
        other.edit(stream(3, 15))
    assert entries_of(session) == before and not list(directory.glob(f"{FILE}-*"))


def test_who_looks_on_while_a_session_is_open(directory, tokenizer, read):
    with reopen(directory, tokenizer) as session:
        session.edit(stream(3, 15))
        view = SessionView(directory)
        assert entries_of(view) == entries_of(session) and read == []
        stamp = os.stat(directory / "journal").st_mtime_ns
        time.sleep(0.01)
        assert os.stat(directory / "journal").st_mtime_ns == stamp


class TestLongStreams:
    @pytest.fixture(autouse=True)
    def on_disk(self, monkeypatch):
        monkeypatch.setattr(streams, "LISTED", 2)

    def test_go_through_a_session_as_lists_do(self, tokenizer, tmp_path):
        facts = [{name: text for name, text in fact.items() if name != "id"} for fact in stream(14)]
        facts += [{"prompt": FACTS[0]["prompt"], "target": "x"}, {"prompt": FACTS[0]["prompt"], "target": "y"}]
        listed, streamed = (create(tmp_path / name, tokenizer) for name in ("a", "b"))
        listed.edit(facts[:6])
        streamed.edit(iter(facts[:6]))
        left, expected = streamed.pending(iter(facts)), listed.pending(facts)
        assert isinstance(left, Spool) and list(left) == expected and len(left) == 10
        listed.edit(expected)
        report = streamed.edit(left)
        assert report.edits == 10 and entries_of(streamed) == entries_of(listed)
        assert_same_bits(state_of(streamed.editor), state_of(listed.editor))
        assert list(streamed.pending(iter(facts))) == []
        with pytest.raises(ValueError, match=r"request 0 has the id 'r-.*', which was edited before"):
            streamed.edit(request for request in expected)

    @pytest.mark.parametrize("seed", range(4))
    def test_what_is_pending(self, seed):
        contents = [c for c in any_contents(seed, 25) if c["kind"] != "rollback"]
        history = History(Record(number, 0, 0, b"", content, 0) for number, content in enumerate(contents))
        file = [EditRequest(**f) for c in any_contents(seed + 10, 15) if c["kind"] == "edit" for f in c["requests"]]
        file += [EditRequest(**f) for c in contents if c["kind"] == "edit" for f in c["requests"]][::2]
        unnamed = [EditRequest(r.prompt, r.target, variants=r.variants) for r in file]
        for requests in (unnamed, file[: len({r.id for r in file})]):
            requests = list({r.id or index: r for index, r in enumerate(requests)}.values())
            assert list(history.pending(iter(requests))) == history.pending(requests)
