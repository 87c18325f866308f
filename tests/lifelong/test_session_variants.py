"""Variants in a session: written down, known again, superseded and taken out with their request."""

from __future__ import annotations

import pytest

from stableedit_cpp.data.request import as_requests
from support.sessions import assert_same_bits, config_of, create, reopen, state_of, stream, without_closing
from support.tiny import tiny_model
from test_outcomes import answer_of, said

CAPITAL = {
    "id": "capital",
    "prompt": "The capital of Australia is",
    "target": "C",
    "variants": ["Australia's capital:", ("C is the capital of", "A"), ("It lies in", "Oz")],
}
LOOP = {"max_passes": 4}


def statements(*requests) -> list[tuple[str, str]]:
    return [statement for request in as_requests(requests) for statement in request.statements]


def answers(model, tokenizer, pairs) -> list[list[int]]:
    return [said(model, tokenizer, prompt, len(answer_of(tokenizer, target))) for prompt, target in pairs]


@pytest.fixture
def session(tokenizer, tmp_path):
    return create(tmp_path / "s", tokenizer, config=config_of(**LOOP))


@pytest.mark.parametrize("detail", ["factors", "requests"])
def test_a_session_goes_on_with_them_after_a_crash(detail, tokenizer, tmp_path):
    config = config_of(max_passes=2)
    session = create(tmp_path / "s", tokenizer, config=config, detail=detail, snapshot_every=100)
    session.edit([*stream(2), CAPITAL])
    without_closing(session)
    again = reopen(tmp_path / "s", tokenizer)
    assert_same_bits(state_of(again.editor), state_of(session.editor))
    assert again.current_requests() == as_requests([*stream(2), CAPITAL])
    assert again.history.entries == session.history.entries
    assert again.pending([*stream(2), CAPITAL]) == []


@pytest.mark.parametrize(
    "variants",
    [[], CAPITAL["variants"][:2], [*CAPITAL["variants"][:2], ("It lies in", "B")]],
    ids=["none", "fewer", "another"],
)
def test_with_other_variants_it_is_another_request(variants, session):
    session.edit([CAPITAL])
    other = CAPITAL | {"variants": variants}
    (pending,) = session.pending([other])
    assert pending.id == "capital-2"
    session.edit([pending])
    assert session.pending([other]) == [] and session.current_requests() == [pending]
    assert session.log()[-1].text.endswith("capital-2 supersedes capital")


def test_the_order_of_variants_does_not_matter(session):
    session.edit([CAPITAL])
    assert session.pending([CAPITAL | {"variants": CAPITAL["variants"][::-1]}]) == []


@pytest.mark.parametrize("detail", ["factors", pytest.param("requests", marks=pytest.mark.slow)])
def test_all_of_a_request_is_taken_out(detail, tokenizer, tmp_path):
    session = create(tmp_path / "s", tokenizer, config=config_of(**LOOP), detail=detail)
    session.edit([*stream(4), CAPITAL])
    session.repair()
    before = answers(session.model, tokenizer, statements(CAPITAL))
    report = session.revert("capital", others=None)
    unedited = answers(tiny_model("llama"), tokenizer, statements(CAPITAL))
    assert answers(session.model, tokenizer, statements(CAPITAL)) == unedited
    assert all(one != other for one, other in zip(before, unedited, strict=True))
    (request,) = report.requests
    assert report.back == (4, 4)
    assert [(one.prompt, one.target) for one in (request, *request.variants)] == statements(CAPITAL)
    assert [one.before for one in (request, *request.variants)] == [tokenizer.decode(ids) for ids in before]
    assert str(report).count("answered") == 4
    assert [request.id for request in session.pending([*stream(4), CAPITAL])] == ["capital-2"]


ASIA = {"id": "asia", "prompt": "Oz is in", "target": "B", "variants": [("It lies in ", "B")]}


class TestSuperseding:
    def test_a_later_variant_takes_a_variant(self, session):
        session.edit([CAPITAL])
        session.edit([ASIA])
        left = CAPITAL | {"variants": CAPITAL["variants"][:2]}
        assert session.current_requests() == as_requests([left, ASIA])
        assert session.history.entries["capital"].current and "supersedes" not in session.log()[-1].text

        # A repair leaves it to the later request, and the file that asks for it gets it back.
        solved = []
        session.editor.on_turn = lambda turn: solved.extend(turn.requests)
        session.repair(min_probability=0.999)
        assert solved == session.current_requests()
        session.editor.on_turn = None
        assert session.pending([CAPITAL, ASIA]) == [] and len(session.pending([CAPITAL])) == 1

        report = session.revert("asia")
        assert [one.follows for one in (report.requests[0], *report.requests[0].variants)] == [None, "capital"]
        (again,) = report.requests[0].variants
        assert (again.wanted, again.back) == (" Oz", again.after == " Oz")
        assert session.current_requests() == as_requests([CAPITAL])

    def test_a_later_variant_takes_a_prompt(self, session):
        session.edit([CAPITAL])
        sydney = {"id": "sydney", "prompt": "Sydney is", "target": "the capital"}
        session.edit([sydney | {"variants": [(CAPITAL["prompt"], "Sydney")]}])
        assert session.history.entries["capital"].state == "superseded by sydney"
        assert session.log()[-1].text.endswith("sydney supersedes capital")
        report = session.revert("capital")
        assert [one.wanted is None for one in (report.requests[0], *report.requests[0].variants)] == [True] + [
            False
        ] * 3
        session.revert("sydney")
        assert session.current_requests() == []

    def test_what_agrees_stands_side_by_side(self, session):
        australia = {"id": "oz", "prompt": "Oz has the capital", "target": "C"}
        australia["variants"] = [(CAPITAL["prompt"], "C"), ("It lies in", "Oz")]
        report = session.edit([CAPITAL, australia])
        assert [turn.requests for turn in report.turns] == [2]
        assert session.current_requests() == as_requests([CAPITAL, australia])
        assert session.pending([CAPITAL]) == session.pending([australia]) == session.pending([CAPITAL, australia]) == []

        report = session.revert("capital")
        both = {CAPITAL["prompt"], "It lies in"}  # the other request still says so
        (request,) = report.requests
        assert {one.prompt for one in (request, *request.variants) if one.wanted is None} == both
