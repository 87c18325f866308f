"""Trained hypernetwork editors live the life of all others: files, sessions, rows of requests, patches, exports."""

from __future__ import annotations

import copy

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.core import load_patch, load_state, ridge_update, save_patch, save_state
from stableedit_cpp.lifelong import LifelongSession
from support.editors import MODULES, assert_same_bits, state_of
from support.hypernetworks import TRAINING, make_hyper, stir
from support.sessions import reopen, stream
from support.tiny import FACTS, tiny_model, tiny_tokenizer

EDITORS = {"rledit": {}, "malmen": {"editor": se.MALMEN, "config": se.MALMENConfig}}


def whole_state(editor) -> dict[str, torch.Tensor]:
    parts = editor.state_dict().items()
    state = {f"{part}/{name}": field.clone() for part, fields in parts for name, field in fields.items()}
    return state_of(editor) | state


def trained(tokenizer, kind: str = "rledit", **changes):
    """One whose network is far from the identity, with ridges of the modules' own."""
    editor = make_hyper(tokenizer, **(EDITORS[kind] | changes))
    stir(editor)
    editor.train(TRAINING, progress=False)
    return editor


@pytest.fixture
def file(tokenizer, tmp_path):
    path = tmp_path / "trained.safetensors"
    trained(tokenizer).save_hypernetwork(path)
    return path


class TestFiles:
    @pytest.mark.parametrize("kind", EDITORS)
    def test_a_saved_editor_goes_on_bit_for_bit(self, kind, tokenizer, tmp_path):
        steady = trained(tokenizer, kind)
        steady.edit(FACTS[:5])
        steady.save(tmp_path / "editor")
        loaded = se.load_editor(tiny_model("llama"), tiny_tokenizer(), tmp_path / "editor")
        assert type(loaded) is type(steady) and loaded.config == steady.config
        assert_same_bits(whole_state(loaded), whole_state(steady))
        for editor in (steady, loaded):
            editor.edit(FACTS[5:])
            editor.guard = None
            editor.train(TRAINING[:6], progress=False)
            editor.edit(FACTS[:2])
        assert_same_bits(whole_state(loaded), whole_state(steady))

    @pytest.mark.parametrize("kind", EDITORS)
    def test_an_editor_that_begins_with_the_file_is_the_one_that_was_trained(self, kind, tokenizer, tmp_path):
        steady, path = trained(tokenizer, kind, edit_modules=MODULES[1:], rank=4), tmp_path / "trained"
        steady.save_hypernetwork(path)
        begun = make_hyper(tokenizer, **(EDITORS[kind] | {"edit_modules": None, "hypernetwork": str(path)}))
        assert begun.config.hypernetwork is None and begun.config.rank == 4
        assert begun.config.edit_modules == MODULES[1:]
        for editor in (steady, begun):
            editor.edit(FACTS)
        assert_same_bits(whole_state(begun), whole_state(steady))

    def test_others_are_refused_with_one_sentence(self, file, tokenizer, tmp_path):
        def begin(model=None, tokenizer=tokenizer, path=file, **changes):
            return make_hyper(tokenizer, model, **({"edit_modules": None, "hypernetwork": str(path)} | changes))

        with pytest.raises(ValueError, match=r"was trained for model\.layers\.0.*, not for edit_modules .*\.1\.mlp.*;"):
            begin(edit_modules=MODULES[1:])
        with pytest.raises(ValueError, match="weights of the model outside the edited modules are others"):
            begin(tiny_model("llama", seed=1))
        with pytest.raises(ValueError, match="the tokenizer is another"):
            begin(tokenizer=tiny_tokenizer(bos=True))
        with pytest.raises(ValueError, match="config of the editor 'rledit'; MALMENConfig is for 'malmen'"):
            begin(**EDITORS["malmen"])
        edited = make_hyper(tokenizer)
        edited.edit(FACTS[:5])
        with pytest.raises(ValueError, match="do not hold their unedited weights"):
            begin(edited.model)
        edited.save(tmp_path / "whole")
        with pytest.raises(ValueError, match=r"whole was not written by save_hypernetwork\(\)"):
            begin(path=tmp_path / "whole")
        with pytest.raises(FileNotFoundError):
            begin(path=tmp_path / "nothing")
        state, config = load_state(file)
        (name,) = (part for part in state if part.startswith("hypernetwork/"))
        save_state(tmp_path / "less", {part: fields for part, fields in state.items() if part != name}, config)
        with pytest.raises(ValueError, match="less was not written by save_hypernetwork"):
            begin(path=tmp_path / "less")

    def test_a_checkpoint_brings_the_network_back(self, tokenizer):
        editor = make_hyper(tokenizer)
        before, state = editor.checkpoint(), whole_state(editor)
        editor.train(TRAINING, progress=False)
        changed = whole_state(editor)
        assert not torch.equal(changed["hypernetwork/24 -> 16/up"], state["hypernetwork/24 -> 16/up"])
        before.restore()
        assert_same_bits(whole_state(editor), state)


class TestRows:
    @pytest.mark.parametrize("changes", [{}, {"past_key_weight": 0.05}], ids=["plain", "past keys"])
    def test_a_request_owns_what_the_others_would_not_have_added(self, changes, tokenizer):
        editor = trained(tokenizer, **changes)
        (network,) = editor.solver.networks.values()
        assert len(set(network.fields["log_ridge"].tolist())) == len(MODULES)
        editor.edit(FACTS[:5])
        turns = []
        editor.on_turn = turns.append
        past = {name: part.copy() for name, part in editor.past_keys.items()}
        editor.edit(FACTS[5:10])
        (applied,) = turns[0].passes
        owned = applied.request == 2
        shares = editor.solver.contribution(applied, owned)
        for name, one in editor.solver.module_editors.items():
            keys, gradients = applied.captured.keys[name], applied.captured.value_gradients[name]
            with torch.no_grad():
                targets = one.targets(keys, gradients)
            how = {"past_keys": past[name], "past_key_weight": 0.05} if past else {}
            rest = ridge_update(keys[~owned].double(), targets[~owned].double(), one.ridge, **how).dense()
            wanted = applied.updates[name].dense().double() - rest
            torch.testing.assert_close(shares[name].dense().double(), wanted, rtol=1e-4, atol=1e-6 * wanted.abs().max())


class TestSessions:
    def create(self, directory, tokenizer, file, **options) -> LifelongSession:
        config = se.RLEditConfig(hypernetwork=str(file), turn_size=3)
        session = LifelongSession.create(directory, tiny_model("llama"), tokenizer, config, **options)
        session.editor.guard = None
        return session

    @pytest.mark.parametrize("detail", ["factors", "requests"])
    def test_goes_on_bit_for_bit_without_the_file(self, detail, file, tokenizer, tmp_path):
        steady = self.create(tmp_path / "steady", tokenizer, file, detail=detail)
        broken = self.create(tmp_path / "broken", tokenizer, file, detail=detail)
        file.unlink()
        steady.edit(stream(10))
        broken.edit(stream(6))
        broken.close()
        broken = reopen(tmp_path / "broken", tokenizer)
        broken.edit(stream(4, 6))
        assert_same_bits(whole_state(broken.editor), whole_state(steady.editor))
        broken.close()
        for path in (tmp_path / "broken/snapshots").glob("record-*"):
            if not path.name.startswith("record-000000"):
                path.unlink()
        again = reopen(tmp_path / "broken", tokenizer)  # every turn done again
        assert_same_bits(whole_state(again.editor), whole_state(steady.editor))

    def test_rollback_and_revert(self, file, tokenizer, tmp_path):
        session = self.create(tmp_path / "s", tokenizer, file)
        session.edit(stream(3))
        before = whole_state(session.editor)
        session.edit(stream(6, 3))
        after = whole_state(session.editor)
        session.revert("f4", bring_back=False)
        with pytest.raises(ValueError, match="training its hypernetwork"):
            session.editor.train(TRAINING)
        session.rollback(3)
        assert_same_bits(whole_state(session.editor), after)
        session.rollback(1)
        assert_same_bits(whole_state(session.editor), before)
        session.close()
        assert_same_bits(whole_state(reopen(tmp_path / "s", tokenizer).editor), before)

    def test_what_is_reverted_never_was(self, file, tokenizer, tmp_path):
        """One turn of three requests without one of them is that of the other two, under the same statistics."""
        session = self.create(tmp_path / "s", tokenizer, file)
        weights = copy.deepcopy(dict(session.model.state_dict()))
        turns = []
        session.editor.on_turn = turns.append
        session.edit(stream(3))
        session.revert("f1", bring_back=False)
        (applied,) = turns[0].passes
        kept = applied.request != 1
        for name, one in session.editor.solver.module_editors.items():
            with torch.no_grad():
                targets = one.targets(applied.captured.keys[name], applied.captured.value_gradients[name])
            rest = ridge_update(applied.captured.keys[name][kept], targets[kept], one.ridge).dense()
            found = session.model.get_submodule(name).weight - weights[f"{name}.weight"]
            torch.testing.assert_close(found, rest, rtol=1e-3, atol=1e-4 * float(rest.abs().max()))

    def test_answers_come_back(self, file, tokenizer, tmp_path):
        session = self.create(tmp_path / "s", tokenizer, file)
        session.edit(stream(6))
        report = session.revert("f4")
        assert report.passes < 20 and report.back == (1, 1)


def test_patches_are_what_was_added(file, tokenizer, tmp_path):
    editor = make_hyper(tokenizer, edit_modules=None, hypernetwork=str(file))
    recorder = se.PatchRecorder(editor)
    editor.edit(FACTS)
    save_patch(tmp_path / "patch", recorder.patch("facts"))
    base = tiny_model("llama")
    load_patch(tmp_path / "patch").add_to({name: base.get_submodule(name).weight.data for name in MODULES})
    for name in MODULES:
        found, wanted = (model.get_submodule(name).weight for model in (base, editor.model))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_half_precision(tokenizer, tmp_path):
    editor = trained(tokenizer, model=tiny_model("llama", torch.bfloat16))
    path = tmp_path / "trained"
    editor.save_hypernetwork(path)
    other = make_hyper(tokenizer, tiny_model("llama", torch.bfloat16), edit_modules=None, hypernetwork=str(path))
    for one in (editor, other):
        one.edit(FACTS)
    assert_same_bits(whole_state(editor), whole_state(other))
