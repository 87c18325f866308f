"""What the model says already is not solved for, and counts as edited."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.cli import main
from stableedit_cpp.editors import turn as turns
from stableedit_cpp.experiments.geometry import Geometry
from stableedit_cpp.export.patch_recorder import PatchRecorder
from support.answers import follower
from support.editors import assert_same_bits, make, state_of
from support.sessions import without_closing
from support.tiny import FACTS

MODULE = "model.layers.0.mlp.down_proj"
TAKES = {"edit_modules": MODULE, "max_passes": 3, "take_probability": 0.1, "past_key_weight": 0.02}
CHAIN = "a bcd"  # what the model writes after an "a"
KNOWN = [{"prompt": prompt, "target": "bcd"} for prompt in ("Say a", "Well, a", "Once more: a")]
NEW = FACTS[1:3]


@pytest.fixture
def editor(tokenizer):
    """Its model answers ``KNOWN``."""
    return make(tokenizer, knowing(tokenizer), **TAKES)


def knowing(tokenizer) -> torch.nn.Module:
    torch.manual_seed(0)
    return follower(tokenizer, CHAIN)


def before_of(tokenizer, fact) -> tuple[float, float]:
    """Accuracy and loss of the unedited model, by itself."""
    prompt, whole = (tokenizer(text)["input_ids"] for text in (fact["prompt"], f"{fact['prompt']} {fact['target']}"))
    with torch.inference_mode():
        likely = knowing(tokenizer)(torch.tensor([whole])).logits[0].double().log_softmax(-1)[len(prompt) - 1 : -1]
    answer = torch.tensor(whole[len(prompt) :])
    return float((likely.argmax(-1) == answer).double().mean()), -float(likely.gather(1, answer[:, None]).mean())


def captures(monkeypatch) -> list[int]:
    """How many prompts each pass was solved for, from now on."""
    seen, real = [], turns.capture
    monkeypatch.setattr(
        turns,
        "capture",
        lambda model, modules, sequences, **how: seen.append(len(sequences)) or real(model, modules, sequences, **how),
    )
    return seen


def test_a_turn_of_what_holds_has_no_pass(editor, monkeypatch):
    editor.checkpoint()
    before, seen, heard = state_of(editor), captures(monkeypatch), []
    editor.on_turn = heard.append
    report = editor.edit(KNOWN, outcomes=True)
    (turn,) = report.turns
    assert (turn.held, turn.passes, turn.taken, turn.efficacy_before, seen) == (3, 0, [], 1.0, [3])
    assert [outcome.took for outcome in report.outcomes] == [True] * 3 and report.edits == 3
    assert "; 3 of 3 held already; 0 did not take" in str(report)
    assert [len(turn.passes) for turn in heard] == [0]
    assert_same_bits(state_of(editor), before)


def test_of_a_turn_with_others_it_is_said(tokenizer, editor, monkeypatch):
    seen = captures(monkeypatch)
    report = editor.edit([*KNOWN, *NEW], outcomes=True)
    turn = report.turns[0]
    assert seen[0] == 5 and report.held == turn.held == 3 and turn.passes > 0 and "; 3 of 5 held already" in str(report)
    accuracy, losses = zip(*[before_of(tokenizer, fact) for fact in [*KNOWN, *NEW]], strict=True)
    assert turn.efficacy_before == pytest.approx(sum(accuracy) / 5)
    assert turn.loss_before == pytest.approx(sum(losses) / 5, rel=1e-5)


@pytest.mark.parametrize("how", ["one pass", "warm_up", "repair"])
def test_these_solve_for_all(how, tokenizer, editor, monkeypatch):
    seen = captures(monkeypatch)
    if how == "one pass":
        single = make(tokenizer, editor.model, edit_modules=MODULE)
        (turn,) = single.edit(KNOWN).turns
    else:
        (turn,) = getattr(editor, how)(KNOWN).turns
    assert seen[0] == 3 and turn.held is None and "held already" not in str(turn)


def test_a_margin_is_asked_for(tokenizer, editor, monkeypatch):
    surer = make(tokenizer, editor.model, **TAKES | {"take_probability": 1.0 - 1e-9})
    seen = captures(monkeypatch)
    assert surer.edit(KNOWN).held == 0 and seen[0] == 3


def test_who_follows_an_editor_hears_of_a_turn_without_passes(editor):
    recorder, geometry = PatchRecorder(editor, "base", "digest"), Geometry(editor, 2, 0)
    editor.edit(KNOWN)
    assert geometry.latest is None
    editor.edit(NEW)
    assert geometry.latest["norm"] > 0
    added = recorder.patch("all").modules
    assert added.keys() == {MODULE}


@pytest.mark.parametrize("detail", ["factors", "requests"])
def test_a_session_records_it_like_any_turn(detail, tokenizer, tmp_path):
    facts = [fact | {"id": f"f{number}"} for number, fact in enumerate([*KNOWN, *NEW])]
    config = se.StableEditConfig.one_pass(step_size=1e-2, **TAKES)
    how = {"detail": detail, "snapshot_every": 100}
    session = se.LifelongSession.create(tmp_path / "s", knowing(tokenizer), tokenizer, config, **how)
    assert session.edit(facts[:2]).turns[0].passes == 0
    assert session.edit(facts[2:]).held == 1
    assert session.pending(facts) == []
    assert "2 requests, 0 passes (2 held already), efficacy before 1.00" in str(session.log()[1])
    before = state_of(session.editor)
    without_closing(session)
    with se.LifelongSession.open(tmp_path / "s", knowing(tokenizer), tokenizer) as session:
        assert_same_bits(state_of(session.editor), before)
        report = session.revert(["f0", "f2"])
        assert [(answer.wanted, answer.after) for answer in report.requests] == [(" bcd", " bcd")] * 2
        assert {request.id for request in session.current_requests()} == {"f1", "f3", "f4"}
        session.rollback(1)
        assert session.status().turn == 1


def test_records_of_earlier_versions_are_done_again_with_their_passes(editor, monkeypatch):
    seen, heard = captures(monkeypatch), []
    editor.on_turn = heard.append
    editor.edit_again(KNOWN, "edit", 1)
    assert seen[0] == 3 and len(heard[0].passes) == 1


def test_the_command_says_so(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    follower(tokenizer, CHAIN).save_pretrained("model")
    tokenizer.save_pretrained("model")
    Path("requests.json").write_text(json.dumps(KNOWN))
    Path("config.json").write_text(se.StableEditConfig.one_pass(**TAKES).to_json())
    words = ["--requests", "requests.json", "--config", "config.json", "--device", "cpu", "--output", "out"]
    assert main(["edit", "--model", "model", *words]) == 0
    out = capsys.readouterr().out
    assert "3 edits in" in out and "3 of 3 held already; 0 did not take" in out
    report = json.loads(Path("out/stableedit_report.json").read_text())
    assert report["edit"]["turns"][0]["passes"] == 0
