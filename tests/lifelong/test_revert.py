"""Taking requests out again: what comes back, what stays, and what is written down."""

from __future__ import annotations

import dataclasses
import signal

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.evaluation.answers import greedy_answers
from stableedit_cpp.lifelong import SessionWriteError
from stableedit_cpp.lifelong.journal.snapshots import is_state
from support.sessions import (
    assert_same_bits,
    config_of,
    create,
    files_no_larger_than,
    reopen,
    state_of,
    stream,
    without_closing,
)
from support.tiny import tiny_model


def answers_of(model, tokenizer, requests: list[dict]) -> list[str]:
    """Greedy answers by transformers' own generation."""
    return [
        se.generate(model, tokenizer, [fact["prompt"]], max_new_tokens=len(fact["target"]) + 1)[0] for fact in requests
    ]


@pytest.fixture
def session(tokenizer, tmp_path):
    return create(tmp_path / "s", tokenizer, config=config_of(max_passes=4))


def test_greedy_answers_are_those_of_generate(tokenizer):
    model, facts = tiny_model("llama"), stream(5)
    editor = se.StableEdit(model, tokenizer, config_of())
    found = greedy_answers(model, editor.tokenize([se.EditRequest(**fact) for fact in facts]), max_tokens=64)
    for ids, text, fact in zip(found, answers_of(model, tokenizer, facts), facts, strict=True):
        assert len(ids) == len(fact["target"]) + 1  # a token a byte, and the space before the target
        assert tokenizer.decode(ids) == text or tokenizer.eos_token_id in ids


@pytest.mark.parametrize("detail", ["factors", pytest.param("requests", marks=pytest.mark.slow)])
def test_the_unedited_answers_come_back(detail, tokenizer, tmp_path):
    session = create(tmp_path / "s", tokenizer, config=config_of(max_passes=4), detail=detail)
    facts = stream(12)
    session.edit(facts)
    statistics = session.editor.normalizers["24 -> 16"].state_dict()
    edited = answers_of(session.model, tokenizer, facts)
    others = [fact for fact in facts if fact["id"] not in ("f4", "f7")]
    efficacy = se.evaluate(session.model, tokenizer, others).efficacy
    report = session.revert(["f4", "f7"])
    unedited = answers_of(tiny_model("llama"), tokenizer, facts)
    after = answers_of(session.model, tokenizer, facts)
    assert report.back == (2, 2)
    assert [after[4], after[7]] == [unedited[4], unedited[7]] != [edited[4], edited[7]]
    assert [request.before for request in report.requests] == [edited[4], edited[7]]
    assert (report.others, len(session.current_requests())) == (10, 10)
    assert report.others_before == pytest.approx(efficacy)
    assert report.others_after == pytest.approx(se.evaluate(session.model, tokenizer, others).efficacy)
    assert_same_bits(session.editor.normalizers["24 -> 16"].state_dict(), statistics)

    # It is recorded: a later session stands where this one did.
    without_closing(session)
    again = reopen(tmp_path / "s", tokenizer)
    assert_same_bits(state_of(again.editor), state_of(session.editor))
    assert again.history.entries["f4"].state == f"reverted in turn {report.turn}"
    assert "took out f4, f7" in again.log()[-1].text
    with pytest.raises(ValueError, match="request 'f4' is reverted in turn 5"):
        again.revert("f4")


def test_rolling_a_revert_back(tokenizer, session):
    session.edit(stream(6))
    before = state_of(session.editor)
    session.revert("f1")
    session.rollback(2)
    assert_same_bits(state_of(session.editor), before)
    assert session.history.entries["f1"].current


def test_one_after_the_other_or_together(tokenizer, tmp_path):
    """What is taken out of a turn does not depend on the order."""
    weights = []
    for name, calls in (("a", [["f0", "f2"]]), ("b", [["f2"], ["f0"]])):
        session = create(tmp_path / name, tokenizer)
        session.edit(stream(3))
        for ids in calls:
            session.revert(ids, bring_back=False)
        weights.append([module.weight.detach().clone() for module in session.editor.modules])
    for first, second in zip(*weights, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_anchors_belong_to_no_request(tokenizer, tmp_path):
    """Without the last request of a turn its anchors are still held: the turn is that of the others and them."""
    session = create(tmp_path / "s", tokenizer, config=config_of(anchors=4))
    turns = []
    session.editor.on_turn = turns.append
    session.edit(stream(3))
    session.editor.on_turn = None
    (applied,) = turns[0].passes
    left = applied.request != 2
    assert 0 < int((applied.request == -1).sum()) < int(left.sum())
    before = {name: weight.master.double().clone() for name, weight in session.editor.weights.items()}
    session.revert("f2", bring_back=False)
    for name, weight in session.editor.weights.items():
        keys, update = applied.captured.keys[name].double(), applied.updates[name]
        values = (keys @ keys.T + applied.ridge * torch.eye(len(keys))) @ update.left.double().T
        rest = keys[left] @ keys[left].T + applied.ridge * torch.eye(int(left.sum()))
        expected = torch.linalg.solve(rest, values[left]).T @ keys[left]
        change = before[name] - weight.master.double()
        tolerance = 1e-3 * float(update.dense().norm())
        torch.testing.assert_close(change, update.dense().double() - expected, rtol=1e-3, atol=tolerance)


def test_all_of_a_turn(tokenizer, tmp_path):
    """Without all of its requests a turn adds nothing; its repairs go as well."""
    session = create(tmp_path / "s", tokenizer)
    facts = stream(3)
    session.edit(facts)
    session.editor.repair([se.EditRequest(**fact) for fact in facts])
    assert session.history.entries["f0"].repairs == [2]
    session.revert(["f0", "f1", "f2"], bring_back=False)
    original = tiny_model("llama").state_dict()
    for name, tensor in session.model.state_dict().items():
        torch.testing.assert_close(tensor, original[name], rtol=1e-4, atol=1e-5)


def test_what_was_superseded_is_current_again(tokenizer, session):
    facts = stream(3)
    session.edit(facts)
    session.edit([facts[1] | {"id": "new", "target": "other"}])
    report = session.revert("new")
    assert report.requests[0].follows == "f1"
    assert report.requests[0].after == " " + facts[1]["target"]
    assert session.history.entries["f1"].current
    assert report.back == (1, 1)


def test_what_is_replayed_follows_what_is_current(tokenizer, tmp_path):
    session = create(tmp_path / "s", tokenizer, config=config_of(max_passes=2, replays=16))
    facts = stream(3)
    facts[1] |= {"variants": [{"prompt": "A variant of it is", "target": "there"}]}
    session.edit(facts)
    first = set(session.editor.solver.past_requests)
    session.edit([facts[1] | {"id": "new", "target": "other"}])
    session.revert("new")
    assert set(session.editor.solver.past_requests) == first
    session.revert("f2")
    without_closing(session)
    reopened = reopen(tmp_path / "s", tokenizer)
    assert len(set(reopened.editor.solver.past_requests)) == len(first) - 1
    assert_same_bits(state_of(reopened.editor), state_of(session.editor))


def test_a_superseded_request_leaves_the_current_answer(tokenizer, session):
    facts = stream(3)
    session.edit(facts)
    session.edit([facts[1] | {"id": "new", "target": "other"}])
    report = session.revert("f1")
    assert (report.requests[0].wanted, report.requests[0].back) == (None, None)
    assert session.history.entries["new"].current


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"request_ids": "nobody"}, r"request 'nobody' is not in the model \(`stableedit session log --requests`"),
        ({"request_ids": "w0"}, "request 'w0' belongs to the warm-up, which stays in the model"),
        ({"request_ids": []}, "request_ids is empty"),
        ({"request_ids": "f0", "others": -1}, "others must be a whole number, at least 0"),
    ],
)
def test_bad_input(arguments, message, session):
    session.warm_up([{"id": "w0", "prompt": "A is", "target": "B"}])
    session.edit(stream(3))
    before = state_of(session.editor)
    with pytest.raises(ValueError, match=message):
        session.revert(**arguments)
    assert_same_bits(state_of(session.editor), before)


def test_a_full_disk_changes_nothing(session):
    session.edit(stream(3))
    before = state_of(session.editor)
    with files_no_larger_than(session.journal.end + 10), pytest.raises(SessionWriteError, match="cannot record turn 2"):
        session.revert("f0")
    assert_same_bits(state_of(session.editor), before)
    assert session.history.entries["f0"].current


def test_ctrl_c_while_it_is_recorded(session, monkeypatch):
    """Too late: record, history and weights belong together."""
    session.edit(stream(3))
    interrupt = lambda: signal.raise_signal(signal.SIGINT) or "now"  # noqa: E731
    monkeypatch.setattr("stableedit_cpp.lifelong.journal.writer.now", interrupt)
    session.revert("f0")
    assert session.history.entries["f0"].state == "reverted in turn 2"
    assert is_state(session.editor.state_dict(), session.history.states[2])


def test_report_for_people_and_for_json(session):
    session.edit(stream(6))
    report = session.revert("f3", others=2)
    assert "1 of 1 answers are back" in str(report)
    assert "efficacy of 2 other requests:" in str(report)
    assert dataclasses.asdict(report)["requests"][0]["id"] == "f3"
    assert session.journal.records[-1].content["report"] == dataclasses.asdict(report)
