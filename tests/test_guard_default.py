"""Every editor is guarded unless told otherwise: in Python, in sessions and at the command line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.cli import main
from stableedit_cpp.editors.guard import LocalityGuard, Look
from support.answers import Successor
from support.commands import assert_one_error, tree
from support.editors import MODULES, TURN, assert_same_bits, make, state_of
from support.tiny import FACTS, tiny_model, tiny_tokenizer

RUINOUS = 1e3  # a step


def certain() -> torch.nn.Module:
    """A random model that is sure of what it says, and so has something to lose."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100.0)
    return model


@pytest.fixture
def looks(monkeypatch):
    """Lets the guard find that the model has drifted far, in the looks that are in ``looks["bad"]``, from 1 on."""
    real, state = LocalityGuard.look, {"bad": range(0), "done": 0}

    def look(guard):
        state["done"] += 1
        return Look(7.5, 7.5, False) if state["done"] in state["bad"] else real(guard)

    monkeypatch.setattr(LocalityGuard, "look", look)
    return state


class TestEditors:
    @pytest.mark.parametrize("editor", [se.StableEdit, se.UltraEdit])
    @pytest.mark.parametrize("call", ["edit", "warm_up"])
    def test_what_would_ruin_the_model_is_refused(self, editor, call, tokenizer):
        config = {"edit_modules": MODULES, "step_size": RUINOUS}
        editor = editor(certain(), tokenizer, editor.config_class(**config))
        before = {name: weight.clone() for name, weight in editor.model.state_dict().items()}
        with pytest.raises(se.DriftLimitReached, match=r"beyond the limit of .* also after 3 back-offs; .* taken back"):
            getattr(editor, call)(FACTS)
        assert_same_bits(editor.model.state_dict(), before)

    @pytest.mark.parametrize("how", ["argument", "attribute"])
    def test_none_turns_it_off(self, how, tokenizer):
        config = se.StableEditConfig.one_pass(edit_modules=MODULES, step_size=RUINOUS)
        editor = se.StableEdit(certain(), tokenizer, config, **({"guard": None} if how == "argument" else {}))
        if how == "attribute":
            editor.guard = None
        report = editor.edit(FACTS)
        assert editor.guard is None and report.drift is None and "guard" not in report.seconds_by_part()

    @pytest.mark.parametrize("bad", ["none", False, 1.5])
    def test_what_is_no_guard_is_refused(self, bad, tokenizer):
        with pytest.raises(
            ValueError, match=f"guard must be a LocalityGuard, 'default', or None for none, not {bad!r}"
        ):
            make(tokenizer, guard=bad)

    def test_it_is_made_when_it_is_needed_and_changes_no_bit(self, tokenizer):
        guarded, plain = make(tokenizer, guard="default"), make(tokenizer)
        assert guarded._guard == "default"
        assert guarded.edit([]).drift is None and guarded._guard == "default"
        report = guarded.edit(FACTS)
        plain.edit(FACTS)
        assert isinstance(guarded.guard, LocalityGuard) and report.drift > 0 and report.back_offs == 0
        assert_same_bits(state_of(guarded), state_of(plain))
        assert f"other answers have drifted by {report.drift:.2g} of 0.5 nats" in str(report)
        assert "drift" not in str(plain.edit(FACTS[:1]))

    def test_steps_that_were_made_smaller_are_reported(self, tokenizer, looks):
        editor = make(tokenizer, guard="default")
        looks["bad"] = (1, 2, 4)  # two in the first turn, one in the second
        report = editor.edit(FACTS)
        assert [turn.back_offs for turn in report.turns] == [2, 1, 0] and report.back_offs == 3
        assert "; 3 steps were made smaller for that limit" in str(report)

    def test_a_guard_of_ones_own_takes_its_place(self, tokenizer):
        editor = make(tokenizer, certain(), step_size=RUINOUS, guard="default")
        editor.guard = own = LocalityGuard(editor, ["Ice is"], limit=1e9)
        editor.edit(FACTS)
        assert editor.guard is own

    def test_a_model_that_cannot_generate_is_edited_without_one_and_that_is_said(self, tokenizer):
        model = Successor(len(tokenizer))
        editor = se.StableEdit(model, tokenizer, se.StableEditConfig.one_pass(edit_modules="head", step_size=1e-2))
        with pytest.warns(UserWarning, match="edits are not guarded against drift of other answers: .*generat"):
            editor.edit([{"prompt": "Ann", "target": "Bob"}])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            editor.edit([{"prompt": "Eve", "target": "Bob"}])
        assert editor.guard is None

    def test_a_saved_editor_is_guarded_by_the_same_reference(self, tokenizer, tmp_path):
        editor = make(tokenizer, certain(), guard="default")
        editor.edit(FACTS[:TURN])
        editor.save(tmp_path / "editor")
        loaded = se.StableEdit.load(certain(), tokenizer, tmp_path / "editor")
        assert loaded.guard.limit == editor.guard.limit
        assert loaded.guard.drift().mean == pytest.approx(editor.guard.drift().mean, rel=1e-3)

    def test_other_weights_may_change_between_edits(self, tokenizer):
        editor = make(tokenizer, edit_modules=MODULES[2:], guard="default")
        editor.edit(FACTS[:TURN])
        editor.model.get_submodule(MODULES[0]).weight.data += 1e-3
        editor.edit(FACTS[TURN:])
        assert editor.guard.drift().mean > 0


class TestSessions:
    @pytest.mark.parametrize("detail", ["factors", "requests"])
    def test_a_session_is_guarded_and_its_turns_are_done_again_as_they_were(self, detail, tokenizer, tmp_path, looks):
        config = se.StableEditConfig.one_pass(edit_modules=MODULES, step_size=1e-2, turn_size=TURN)
        how = {"detail": detail, "snapshot_every": 100}
        session = se.LifelongSession.create(tmp_path / "s", tiny_model("llama"), tokenizer, config, **how)
        session.edit(FACTS[:TURN])
        written = (tmp_path / "s/journal").stat().st_size
        looks["done"], looks["bad"] = 0, range(2, 100)
        with pytest.raises(se.DriftLimitReached) as stop:
            session.edit(FACTS[TURN:])
        assert stop.value.report.edits == TURN
        if detail == "requests":  # what the guard only looked at is written down without factors
            assert (tmp_path / "s/journal").stat().st_size < 2 * written < 40_000
        state = state_of(session.editor)  # a turn that is done again is not judged again
        session._lock.release()
        session._lock = None
        with se.LifelongSession.open(tmp_path / "s", tiny_model("llama"), tokenizer) as session:
            assert_same_bits(state_of(session.editor), state)
            assert len(session.current_requests()) == 2 * TURN


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("guard") / "model"
    certain().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


class TestCommands:
    @pytest.fixture
    def run(self, model, tmp_path, monkeypatch, capsys):
        """Runs a command on the model with a file of requests, in turns of five."""
        monkeypatch.chdir(tmp_path)
        Path("requests.json").write_text(json.dumps(FACTS))

        def run(*words: object) -> int:
            capsys.readouterr()
            return main([*map(str, words)])

        run.editing = (
            "--model",
            model,
            "--device",
            "cpu",
            "--preset",
            "one-pass",
            "--edit-modules",
            *MODULES,
            "--turn-size",
            TURN,
        )
        return run

    def test_edit_refuses_with_a_paragraph(self, run, tmp_path, capsys):
        before = tree(tmp_path)
        words = ("edit", *run.editing, "--step-size", RUINOUS, "--requests", "requests.json", "--output", "out")
        assert run(*words) == 2
        line = assert_one_error(capsys.readouterr().err)
        assert "nats, beyond the limit of" in line and "the turn in flight was taken back" in line
        assert "the automatic step" in line and "--guard-limit, --no-guard" in line and "--step-size auto" in line
        assert tree(tmp_path) == before

    @pytest.mark.parametrize("option", [["--no-guard"], ["--guard-limit", "1e9"]])
    def test_edit_goes_on_where_that_is_asked_for(self, run, option):
        words = ("edit", *run.editing, "--step-size", RUINOUS, "--requests", "requests.json", "--output", "out")
        assert run(*words, *option) == 0
        report = json.loads(Path("out/stableedit_report.json").read_text())
        assert report["edit"]["edits"] == len(FACTS)
        assert (report["edit"]["turns"][0]["drift"] is None) == (option == ["--no-guard"])

    def test_edit_saves_what_is_done_before_it_stops(self, run, capsys, looks):
        looks["bad"] = range(3, 100)
        words = ("edit", *run.editing, "--step-size", 1e-2, "--requests", "requests.json", "--output", "out")
        assert run(*words) == 1
        out, err = capsys.readouterr()
        assert "would be 7.5 nats" in err and "The 10 requests before it are edited." in err
        assert "saving the model as it is" in err and "10 edits in" in out
        report = json.loads(Path("out/stableedit_report.json").read_text())
        assert report["edit"]["edits"] == 10 and "7.5 nats" in report["error"]
        assert Path("out/model.safetensors").is_file()

    @pytest.mark.parametrize("bad", [["--guard-limit", "0"], ["--guard-limit", "x"], ["--guard-limit=1", "--no-guard"]])
    def test_bad_options(self, run, capsys, bad):
        with pytest.raises(SystemExit) as exit_:
            run("edit", *run.editing, "--requests", "requests.json", "--output", "out", *bad)
        assert exit_.value.code == 2
        err = capsys.readouterr().err
        assert any(words in err for words in ("is not a number greater than 0", "not allowed with"))

    def test_session(self, run, capsys, looks):
        assert run("session", "create", "s", *run.editing, "--step-size", 1e-2) == 0
        looks["bad"] = range(2, 100)
        assert run("session", "edit", "s", "--device", "cpu", "--requests", "requests.json") == 2
        line = assert_one_error(capsys.readouterr().err)
        assert "would be 7.5 nats" in line and "The 5 requests before it are edited." in line
        assert run("session", "edit", "s", "--device", "cpu", "--requests", "requests.json", "--no-guard") == 0
        out, err = capsys.readouterr()
        assert "5 requests of requests.json are done and skipped" in err and "8 edits in" in out
