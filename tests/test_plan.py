"""Plans: what they say is what comes, and the model is what it was."""

from __future__ import annotations

import json
from collections import namedtuple

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp import core
from stableedit_cpp.cli import main
from stableedit_cpp.files.digest import model_digest
from stableedit_cpp.lifelong import LifelongSession
from stableedit_cpp.lifelong import plan as plans
from stableedit_cpp.lifelong.plan import plan_stream
from support.edit_command import REQUESTS
from support.editors import MODULES, assert_same_bits, make, state_of
from support.offloaded import on_disk
from support.sessions import stream
from support.tiny import save_tiny, tiny_model

FACTS = stream(60)


def guarded(tokenizer, model=None, **changes):
    return make(tokenizer, model, guard="default", **({"past_key_weight": 0.05, "max_passes": 2} | changes))


class TestTakenBack:
    def test_the_editor_is_what_it_was_and_edits_on_like_one_that_nobody_asked(self, tokenizer):
        one, other = guarded(tokenizer), guarded(tokenizer)
        for editor in (one, other):
            editor.edit(FACTS[:5], progress=False)
        before = state_of(one)
        plan_stream(one, FACTS[5:])
        assert_same_bits(state_of(one), before)
        for editor in (one, other):
            editor.edit(FACTS[5:20], progress=False)
        assert_same_bits(state_of(one), state_of(other))

    def test_also_where_a_trial_turn_fails(self, tokenizer, monkeypatch):
        editor = make(tokenizer)
        before, real, turns = state_of(editor), editor.edit, []

        def edit(*arguments, **how):
            turns.append(real(*arguments, **how))
            if len(turns) == 2:
                raise KeyboardInterrupt
            return turns[-1]

        monkeypatch.setattr(editor, "edit", edit)
        with pytest.raises(KeyboardInterrupt):
            plan_stream(editor, FACTS)
        now = state_of(editor)
        assert_same_bits({name: now[name] for name in before}, before)
        assert editor.on_turn is None

    def test_weights_on_the_disk(self, tokenizer, tmp_path):
        model = on_disk(tiny_model("llama"), tmp_path)
        editor = make(tokenizer, model)
        plan = plan_stream(editor, FACTS)
        assert model_digest(model) == model_digest(tiny_model("llama"))
        assert plan.memory["model"]["disk"] == sum(p.nbytes for p in tiny_model("llama").parameters())
        assert set(plan.memory["masters"]) == {"cpu"}  # what the editor has of them in memory


class TestComesTrue:
    @pytest.mark.parametrize("refresh", [0.0, 0.1, 0.5])
    def test_decompositions_and_turns(self, tokenizer, refresh):
        editor = make(tokenizer, refresh=refresh, turn_size=4)
        plan = plan_stream(editor, FACTS)
        report = editor.edit(FACTS, progress=False)
        assert plan.turns == len(report.turns) == 15
        (normalizer,) = editor.normalizers.values()
        full = sum("full" in turn.whitening.values() for turn in report.turns)
        assert full == 15  # else the count is of those alone
        assert plan.decompositions[0] == pytest.approx(normalizer.decompositions, abs=2, rel=0.2)

    def test_decompositions_begin_when_there_are_rows_enough(self, tokenizer):
        editor = make(tokenizer, edit_modules=MODULES[1], turn_size=1)
        plan = plan_stream(editor, FACTS[:12])
        report = editor.edit(FACTS[:12], progress=False)
        full = ["full" in turn.whitening.values() for turn in report.turns]
        assert not full[0] and full[-1]
        (normalizer,) = editor.normalizers.values()
        assert plan.decompositions[0] == pytest.approx(normalizer.decompositions, abs=2)

    @pytest.mark.parametrize("detail", ["factors", "requests"])
    def test_journal_and_snapshots(self, tokenizer, tmp_path, detail):
        config = se.StableEditConfig.one_pass(edit_modules=MODULES, step_size=1e-2, turn_size=5, past_key_weight=0.05)
        plan = plan_stream(se.StableEdit(tiny_model("llama"), tokenizer, config, guard=None), FACTS)
        how = {"detail": detail, "snapshot_every": 3}
        with LifelongSession.create(tmp_path / "session", tiny_model("llama"), tokenizer, config, **how) as session:
            session.editor.guard = None
            session.edit(FACTS)
            state = session.editor.state_dict()
        journal = (tmp_path / "session" / "journal").stat().st_size
        assert plan.journal[detail] == pytest.approx(journal, rel=0.25)
        assert plan.snapshot == pytest.approx(sum(t.nbytes for part in state.values() for t in part.values()), rel=0.25)

    @pytest.mark.parametrize("rows", [20, 5000])
    def test_memory_of_past_keys(self, rows):
        """Beside what the core has of as many keys: rows alone, or a moment, its factor and the rows since."""
        k = 64 if rows > 20 else 400
        past = core.PastKeys(k)
        for _ in range(rows // 20):
            past.update(torch.randn(20, k))
            past.solve(torch.randn(2, k), weight=1.0, ridge=1.0)
        kept = sum(field.nbytes for field in past.state_dict().values() if isinstance(field, torch.Tensor))
        factor = 4 * k * k * (past.factorisations > 1)
        expected = 4 * k * (2 * k + k // 4) if rows >= k // 4 else 4 * k * rows
        assert 0.8 * (kept + factor) <= expected <= 1.3 * (kept + factor)

    def test_parts_of_memory(self, tokenizer):
        editor = guarded(tokenizer, tiny_model("llama", torch.bfloat16))
        plan = plan_stream(editor, FACTS)
        sizes = [module.weight.numel() for module in editor.modules]
        assert plan.memory["model"]["cpu"] >= sum(2 * p.numel() for p in editor.model.parameters())
        assert plan.memory["masters"] == {"cpu": 4 * sum(sizes)}
        assert plan.memory["unedited weights"] == {"cpu": 2 * sum(sizes)}
        assert plan.memory["copies to go back to"] == {"cpu": 4 * 4 * sum(sizes)}
        whole = sum(sum(where.values()) for where in plan.memory.values())
        assert whole == plan.peaks["cpu"]


class TestSaid:
    def test_what_does_not_fit(self, tokenizer, monkeypatch):
        editor = guarded(tokenizer)
        assert plan_stream(editor, FACTS).fits
        monkeypatch.setattr(plans, "_room", lambda _trial, peaks: {place: peak // 2 for place, peak in peaks.items()})
        disk = namedtuple("usage", ["free"])
        monkeypatch.setattr(plans.shutil, "disk_usage", lambda _path: disk(1000))
        plan = plan_stream(editor, FACTS)
        assert not plan.fits and plan.line.endswith(": more than there is")
        text = "\n".join(plan.advice)
        for what in ("are missing in host memory: ", "--device-map auto", "--dtype bfloat16", "past_key_weight=0"):
            assert what in text
        assert "--detail requests" in plan.advice[-1]
        assert "What to change" in str(plan) and "It fits." not in str(plan)

    def test_refused(self, tokenizer):
        editor = make(tokenizer)
        with pytest.raises(ValueError, match="requests is empty: there is nothing to plan"):
            plan_stream(editor, [])
        editor.on_turn = print
        with pytest.raises(ValueError, match="the editor is followed"):
            plan_stream(editor, FACTS)


class TestCommand:
    @pytest.fixture
    def files(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        save_tiny("model", bos=True)
        (tmp_path / "edits.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
        return ["--model", "model", "--requests", "edits.jsonl", "--preset", "one-pass", "--turn-size", "5"]

    def test_for_people_and_as_json(self, files, capsys):
        assert main(["plan", *files]) == 0
        text = capsys.readouterr().out
        assert "60 requests in 12 turns: about" in text and "It fits." in text
        assert main(["plan", *files, "--limit", "7", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["requests"], found["turns"], found["fits"]) == (7, 2, True)
        assert found["seconds"] > 0 and found["peaks"]["cpu"] > 0

    def test_bad_requests_are_found_before_the_trial(self, files, tmp_path, capsys):
        (tmp_path / "edits.jsonl").write_text(json.dumps(REQUESTS[0] | {"prompt": "x" * 80}))
        assert main(["plan", *files]) == 2
        assert "context of 64" in capsys.readouterr().err

    def test_edit_says_it_in_one_line(self, files, tmp_path, capsys):
        assert main(["edit", *files, "--output", "long"]) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if "`stableedit plan` says more" in line]
        assert len(said) == 1 and "60 requests, " in said[0] and " to go; " in said[0]
        assert main(["edit", *files, "--output", "short", "--limit", "15"]) == 0
        assert "stableedit plan" not in capsys.readouterr().err
