"""What a file of requests still asks for: nothing that is done, and everything that is wanted again."""

from __future__ import annotations

import random

import pytest

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.lifelong.history import History
from stableedit_cpp.lifelong.journal.record import Record
from stableedit_cpp.lifelong.naming import with_ids
from support.sessions import create, stream


class Stream:
    """The history of a session, without its model: records as a journal has them."""

    def __init__(self) -> None:
        self.history = History([])
        self._number = 0

    def _record(self, kind: str, **content) -> None:
        self._number += 1
        content = {"kind": kind, **content}
        if kind != "rollback":
            content["turn"] = self.history.next_turn
        self.history.add(Record(self._number, 0, 0, b"", content, 0))

    def edit(self, requests: list[EditRequest], kind: str = "edit") -> None:
        """In turns of one."""
        for request in with_ids(requests, self.history.warm_up if kind == "warm_up" else self.history.entries):
            self._record(kind, requests=[request.to_dict()])

    def revert(self, *ids: str) -> None:
        self._record("revert", requests=list(ids))

    def rollback(self, turn: int) -> None:
        self._record("rollback", to_turn=turn)

    def pending(self, *requests: EditRequest, **options) -> list[str]:
        return [request.id for request in self.history.pending(requests, **options)]

    def answers(self) -> dict[str, str]:
        return {request.question: request.target for request in self.history.current()}


def named(id: str, target: str, prompt: str = "The capital is") -> EditRequest:
    return EditRequest(prompt, target, id=id)


A, B, C = named("a", "Bonn"), named("b", "Berlin"), named("c", "Bonn")


@pytest.fixture
def done() -> Stream:
    return Stream()


def test_nothing_of_what_is_done(done):
    done.edit([A, named("x", "y", "Other")])
    assert done.pending(A, named("x", "y", "Other")) == []


def test_what_was_reverted_is_wanted_again(done):
    done.edit([A, B])
    done.revert("b")
    assert done.pending(A, B) == ["b-2"]
    done.edit(done.history.pending([A, B]))
    assert done.pending(A, B) == []
    assert done.answers() == {"The capital is": "Berlin"}


def test_what_was_superseded_is_wanted_again(done):
    """Monday's file, Tuesday's, and Monday's again."""
    done.edit([A])
    done.edit([B])
    assert done.pending(A) == ["a-2"]
    done.edit(done.history.pending([A]))
    assert done.pending(A) == []
    assert done.pending(B) == ["b-2"]
    assert done.answers() == {"The capital is": "Bonn"}


def test_taking_one_out_does_not_ask_for_the_others(done):
    done.edit([A, B, C])
    done.revert("a")
    assert done.pending(A, B, C) == []
    done.revert("c")
    assert done.pending(A, B, C) == ["c-2"]
    done.edit(done.history.pending([A, B, C]))
    assert done.pending(A, B, C) == []
    done.revert("b")
    assert done.pending(A, B, C) == []
    done.revert("c-2")  # now nothing holds
    assert done.pending(A, B, C) == ["a-2", "b-2", "c-3"]


@pytest.mark.parametrize("names", [("a", "b", "c"), (None, None, None)], ids=["named", "unnamed"])
def test_a_file_that_contradicts_itself_goes_on_where_it_was(done, names):
    file = [EditRequest("The capital is", target, id=id) for target, id in zip(["X", "Y", "X"], names, strict=True)]
    ids = [request.id for request in with_ids(file)]
    for number in range(4):
        assert done.pending(*file) == ids[number:]
        done.edit(done.history.pending(file)[:1])
    assert done.answers() == {"The capital is": "X"}
    # All of it is wanted again, and is interrupted again.
    done.revert(*ids)
    for number in range(4):
        left = done.history.pending(file)
        assert [request.target for request in left] == ["X", "Y", "X"][number:]
        done.edit(left[:1])


def test_the_same_request_several_times(done):
    file = [EditRequest("A is", "B")] * 3
    for left in (3, 2, 1, 0):
        pending = done.pending(*file)
        assert len(pending) == left
        done.edit(done.history.pending(file)[:1])
    assert len(done.history.entries) == 3
    assert done.pending(file[0]) == []


def test_an_id_that_another_request_had(done):
    """Numbers for names, in every file again: nothing may be left out for it."""
    done.edit([named("0", "Bonn"), named("1", "Oslo", "The other is")])
    tuesday = [named("0", "Rome", "A third is"), named("1", "Bern", "The other is")]
    assert done.pending(*tuesday) == ["0-2", "1-2"]
    done.edit(done.history.pending(tuesday))
    assert done.pending(*tuesday) == []
    assert done.answers() == {"The capital is": "Bonn", "The other is": "Bern", "A third is": "Rome"}


def test_a_name_of_its_own_is_respected(done):
    """The application that gave it will want to revert by it."""
    done.edit([named("mine", "Bonn")])
    assert done.pending(named("yours", "Bonn")) == ["yours"]
    assert done.pending(EditRequest("The capital is", "Bonn")) == []  # who gives no name asks for the fact alone


def test_new_ids_take_no_other_name(done):
    done.edit([A])
    done.revert("a")
    assert done.pending(A, named("a-2", "Oslo", "The other is")) == ["a-3", "a-2"]


def test_white_space_around_prompts_and_targets(done):
    done.edit([EditRequest("\nThe capital is", "Bonn\n")])
    assert done.pending(EditRequest("The capital is", "Bonn")) == []


def test_what_was_rolled_back_was_never_edited(done):
    done.edit([A, B])
    done.rollback(1)
    assert done.pending(A, B) == ["b"]
    done.rollback(0)
    assert done.pending(A, B) == ["a", "b"]


def test_warm_up(done):
    file = [A, EditRequest("x", "y"), EditRequest("x", "y")]
    done.edit(file[:2], "warm_up")
    assert done.pending(*file) == ["a", *[request.id for request in with_ids(file)][1:]]
    assert done.pending(*file, warm_up=True) == [with_ids(file)[2].id]
    done.edit(done.history.pending(file, warm_up=True), "warm_up")
    assert done.pending(*file, warm_up=True) == []
    assert done.pending(named("a", "other", "z"), warm_up=True) == ["a-2"]


def undo_some(done: Stream, source: random.Random) -> None:
    """Revert requests, or roll back, up to twice."""
    for _ in range(source.randint(0, 2)):
        there = [id for id, entry in done.history.entries.items() if entry.reverted_in is None]
        if source.random() < 0.8 and there:
            done.revert(*source.sample(there, min(len(there), source.randint(1, 3))))
        else:
            done.rollback(source.choice([0, *done.history.line]))


def test_any_history():
    """Files of few questions and answers, cut off anywhere, reverted and rolled back at will: in the end what a file
    asks for last is what holds, nothing is left, and what was interrupted is what was not."""
    for seed in range(300):
        source, done = random.Random(seed), Stream()
        for number in range(source.randint(1, 5)):
            file = [
                EditRequest(source.choice("pq"), source.choice("xyz"), id=f"{index}" if source.random() < 0.3 else None)
                for index in range(source.randint(1, 7))
            ]
            if number == 0:
                whole = Stream()
                whole.edit(whole.history.pending(file))
            while left := done.history.pending(file):
                done.edit(left[: source.randint(1, len(left))])  # then it is killed
            if number == 0:
                assert list(done.history.entries.values()) == list(whole.history.entries.values()), seed
            answers = done.answers()
            for question, target in {request.question: request.target for request in file}.items():
                assert answers[question] == target, seed
            undo_some(done, source)


def test_any_history_with_variants():
    """The same where requests ask several questions: each question is answered as the file has it last, and what is
    current are the requests that are there, without what later ones have taken from them."""
    for seed in range(300):
        source, done = random.Random(seed), Stream()
        for _ in range(source.randint(1, 4)):
            file = []
            for index in range(source.randint(1, 5)):
                asked = source.sample("pqrs", source.randint(1, 4))
                (prompt, target), *variants = [(question, source.choice("xyz")) for question in asked]
                id = f"{index}" if source.random() < 0.3 else None
                file.append(EditRequest(prompt, target, variants=variants, id=id))
            for _ in range(3 * len(file)):  # it does not go on for ever
                if left := done.history.pending(file):
                    done.edit(left[: source.randint(1, len(left))])
            assert done.history.pending(file) == [], seed
            for question, target in {q: t for request in file for q, t in request.answers.items()}.items():
                assert done.history.entries[done.history.predecessor(question)].request.answers[question] == target
            undo_some(done, source)
            there = [entry.request for entry in done.history.entries.values() if entry.reverted_in is None]
            expected = []
            for place, request in enumerate(there):
                kept = []
                for prompt, target in request.statements:
                    later = [other for other in there[place + 1 :] if prompt in other.answers]
                    gone = later and (
                        later[-1].answers[prompt] != target or prompt == request.prompt == later[-1].prompt
                    )
                    kept += [] if gone else [(prompt, target)]
                if kept and kept[0][0] == request.prompt:
                    expected.append((request.id, kept))
            assert [(request.id, list(request.statements)) for request in done.history.current()] == expected, seed


def test_in_a_session(tokenizer, tmp_path):
    """The requests that are left out are those that the model was edited with last."""
    session = create(tmp_path / "s", tokenizer)
    old, new = stream(1)[0], stream(1)[0] | {"id": "new", "target": "other"}
    session.edit(session.pending([old, new]))
    assert session.pending([old, new]) == []
    session.revert("new")
    session.edit(session.pending([old, new]))
    assert [(request.id, request.target) for request in session.current_requests()] == [("new-2", "other")]
    session.edit(session.pending([old]))
    assert [(request.id, request.target) for request in session.current_requests()] == [("f0-2", old["target"])]
    assert session.log()[-1].text.endswith("f0-2 supersedes new-2")
