"""Editors that locate facts live like all others: journal, rollback, revert by row, patches, exports, state files."""

from __future__ import annotations

import json

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp import core
from stableedit_cpp.cli import main
from stableedit_cpp.lifelong import LifelongSession
from stableedit_cpp.model.text_statistics import load_statistics
from support import sessions
from support.editors import assert_same_bits
from support.faults import everything
from support.located import CONTEXTS, FACTS
from support.streams import write_data
from support.tiny import save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few for keys")

MODULES = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
TEXT = [f"Line {number} says that {number} times {number} is {number * number}." for number in range(40)]
EDITORS = {
    "memit": (se.MEMITConfig, {"text_weight": 0.1}),
    "memit-seq": (se.MEMITConfig, {"text_weight": 0.1, "past_key_weight": 1.0}),
    "alphaedit": (se.AlphaEditConfig, {"threshold": 0.5, "ridge": 0.1}),
}


@pytest.fixture(params=EDITORS)
def config(request, tmp_path):
    return config_of(request.param, tmp_path)


def config_of(which, directory, **changes):
    text = directory / "text.txt"
    text.write_text("\n".join(TEXT))
    cls, own = EDITORS[which]
    how = {"edit_modules": MODULES, "contexts": CONTEXTS, "target_steps": 4, "turn_size": 2, "end_of_answer": False}
    how |= {"text_statistics": str(directory / "text.safetensors"), "texts": [str(text)]}
    return cls(**(how | own | changes))


def create(directory, config, **how) -> LifelongSession:
    return sessions.create(directory / "s", tiny_tokenizer(), config=config, **how)


def reopen(directory) -> LifelongSession:
    return sessions.reopen(directory / "s", tiny_tokenizer())


@pytest.mark.parametrize("detail", ["factors", "requests"])
def test_a_session_goes_on_and_back_bit_for_bit(detail, config, tmp_path):
    with create(tmp_path, config, detail=detail) as session:
        fresh = everything(session.editor)
        session.edit(FACTS[:4], progress=False)  # two turns
        after = everything(session.editor)
    with reopen(tmp_path) as session:
        assert_same_bits(everything(session.editor), after)
        assert session.editor.config.contexts == CONTEXTS
        session.edit(FACTS[4:], progress=False)
        session.rollback(2)
        assert_same_bits(everything(session.editor), after)
        session.rollback(0)
        assert_same_bits(everything(session.editor), fresh)


def test_a_request_is_taken_out_exactly(config, tmp_path):
    """What stays is the solution of the others, for what was to be written for them."""
    with create(tmp_path, config) as session:
        seen = []
        session.editor.on_turn = seen.append
        session.edit(FACTS[:2], progress=False)
        (applied,) = seen[0].passes
        session.editor.on_turn = None
        session.revert([FACTS[0]["id"]], bring_back=False, progress=False)
        for name, change in session.editor.weight_changes().items():
            key = applied.captured.keys[name][1:].double()
            residual = -applied.captured.value_gradients[name][1:].double()
            system = 0.1 * torch.eye(24, dtype=torch.float64)
            if config.editor == "memit":
                moment = 0.1 * load_statistics(config.text_statistics).second_moment(name)
                system = moment + 1e-6 * moment.diagonal().mean() * torch.eye(24)
            wanted = torch.linalg.solve(system + key.T @ key, key.T @ residual).T
            assert (change.double() - wanted).norm() < 1e-4 * wanted.norm()


def test_answers_of_a_reverted_request_come_back(config, tmp_path):
    with create(tmp_path, config) as session:
        session.edit(FACTS, progress=False)
        report = session.revert([FACTS[1]["id"]], progress=False)
        assert report.back == (1, 1)
        after = everything(session.editor)
    with reopen(tmp_path) as session:
        assert_same_bits(everything(session.editor), after)


def test_a_patch_holds_what_was_added(config, tmp_path):
    editor = se.editors.make_editor(tiny_model("llama"), tiny_tokenizer(), config)
    editor.guard = None
    recorder = se.PatchRecorder(editor)
    editor.edit(FACTS, progress=False)
    core.save_patch(tmp_path / "patch", recorder.patch("facts"))
    patch = core.load_patch(tmp_path / "patch")
    fresh = tiny_model("llama")
    weights = {name: fresh.get_submodule(name).weight.detach() for name in MODULES}
    patch.add_to(weights)
    for name in MODULES:
        assert torch.allclose(weights[name], editor.model.get_submodule(name).weight, atol=1e-6)


def test_a_saved_editor_goes_on(config, tmp_path):
    one, other = (se.editors.make_editor(tiny_model("llama"), tiny_tokenizer(), config) for _ in range(2))
    one.guard = None
    one.edit(FACTS[:2], progress=False)
    one.save(tmp_path / "editor")
    loaded = se.load_editor(other.model, tiny_tokenizer(), tmp_path / "editor")
    loaded.guard = None
    for editor in (one, loaded):
        editor.edit(FACTS[2:], progress=False)
    assert_same_bits(everything(loaded), everything(one))
    state, text = core.load_state(tmp_path / "editor")  # what C++ reads
    assert type(config).from_json(text) == one.config
    assert "text_statistics" in state


def test_the_command_line_edits_and_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    write_data(tmp_path / "data", 8, 4)
    config = config_of("alphaedit", tmp_path, target_steps=2, turn_size=4)
    (tmp_path / "rival.json").write_text(config.to_json())
    how = ["--model", "tiny", "--device", "cpu"]
    edit = ["edit", *how, "--config", "rival.json", "--requests", "data/zsre/zsre_edit.json", "--patch", "facts"]
    assert main([*edit, "--no-guard"]) == 0
    assert set(core.load_patch(tmp_path / "facts").modules) == set(MODULES)
    bench = ["bench", *how, "--dataset", "zsre", "--data", "data", "--editor", "rival.json", "--edits", "8"]
    assert main([*bench, "--checkpoints", "1", "--output", "out"]) == 0
    assert "rival" in capsys.readouterr().out
    records = json.loads((tmp_path / "data/zsre/zsre_edit.json").read_text())
    del records[3]["subject"]
    (tmp_path / "bare.json").write_text(json.dumps(records))
    edit[edit.index("data/zsre/zsre_edit.json")] = "bare.json"
    assert main(edit) == 2
    assert "request 3: it has no subject" in capsys.readouterr().err
