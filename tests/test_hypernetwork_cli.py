"""`stableedit train-hypernetwork`, and the commands that edit with what it wrote."""

from __future__ import annotations

import json

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.cli import main
from support.commands import assert_one_error, tree
from support.editors import MODULES
from support.hypernetworks import TRAINING
from support.tiny import FACTS, save_tiny

REQUESTS = [fact | {"id": f"f{number}"} for number, fact in enumerate(FACTS)]
SETTINGS = {"edit_modules": MODULES, "step_size": 2e-2, "rank": 6, "turn_size": 5, "learning_rate": 1e-3}


@pytest.fixture
def work(tmp_path, monkeypatch):
    save_tiny(tmp_path / "model")
    (tmp_path / "training.json").write_text(json.dumps(TRAINING))
    (tmp_path / "requests.json").write_text(json.dumps(REQUESTS))
    (tmp_path / "rledit.json").write_text(se.RLEditConfig(**SETTINGS).to_json())
    (tmp_path / "malmen.json").write_text(se.MALMENConfig(**SETTINGS).to_json())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(command: str, *options: str) -> int:
    return main([*command.split(), "--model", "model", "--device", "cpu", *options])


def train(*options: str, output: str = "trained.safetensors") -> int:
    return call("train-hypernetwork", "--requests", "training.json", "--output", output, *options)


@pytest.mark.parametrize("kind", ["rledit", "malmen"])
def test_trains_and_edits_as_python_does(kind, work, capsys):
    assert train("--config", f"{kind}.json") == 0
    said = capsys.readouterr().out
    assert f"{kind} for model.layers.{{0..2}}.mlp.down_proj: trained on 13 requests in 3 turns and 3 steps" in said
    edit = ["--hypernetwork", "trained.safetensors", "--requests", "requests.json", "--no-guard"]
    assert call("edit", "--editor", kind, *edit, "--output", "edited", "--patch", "facts.safetensors") == 0
    report = json.loads((work / "edited/stableedit_report.json").read_text())
    assert report["edit_modules"] == MODULES and report["edit"]["edits"] == len(FACTS)

    model, tokenizer = se.load_model("model")
    editor = se.editors.make_editor(model, tokenizer, se.load_config(f"{kind}.json"))
    editor.guard = None
    editor.train(TRAINING, progress=False)
    editor.edit(FACTS)
    found, _ = se.load_model("edited")
    for name in MODULES:
        assert torch.equal(found.get_submodule(name).weight, model.get_submodule(name).weight)


def test_sessions_need_the_file_once(work, capsys):
    assert train("--config", "rledit.json") == 0
    assert call("session create s", "--hypernetwork", "trained.safetensors") == 0
    (work / "trained.safetensors").unlink()
    assert main(["session", "edit", "s", "--requests", "requests.json", "--no-guard"]) == 0
    assert main(["session", "rollback", "s", "--to-turn", "1"]) == 0


def test_training_goes_on_from_a_file(work, capsys):
    assert train("--config", "rledit.json", "--limit", "5", "--json", output="first.safetensors") == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert (document["editor"], document["requests"], document["edit_modules"]) == ("rledit", 5, MODULES)
    assert len(document["losses"]) == len(document["update_norms"]) == 1 and document["output"] == "first.safetensors"
    assert "the hypernetwork is in first.safetensors" in err
    assert train("--hypernetwork", "first.safetensors", output="second.safetensors") == 0
    first, second = (
        se.RLEdit(*se.load_model("model"), se.RLEditConfig(hypernetwork=f"{name}.safetensors"))
        for name in ("first", "second")
    )
    (one,), (other,) = first.solver.networks.values(), second.solver.networks.values()
    assert not torch.equal(one.fields["up"], other.fields["up"]) and one.rank == other.rank == 6
    assert second.normalizers["24 -> 16"].count > 2 * first.normalizers["24 -> 16"].count


def test_what_cannot_be_done_is_said_in_a_sentence_and_leaves_nothing(work, capsys):
    assert train("--config", "rledit.json") == 0
    capsys.readouterr()
    before = tree(work)
    (work / "other.json").write_text(json.dumps(REQUESTS))
    before = tree(work)
    cases = [
        (lambda: train("--editor", "ultraedit", output="x"), "ultraedit has no hypernetwork to train"),
        (
            lambda: train("--editor", "malmen", "--config", "rledit.json", output="x"),
            "rledit.json is a config of rledit",
        ),
        (
            lambda: call("train-hypernetwork", "--requests", "other.json", "--config", "rledit.json", "--output", "x"),
            "request 0 (f0) has no rephrase",
        ),
        (lambda: train("--config", "rledit.json", output="model"), "model is a directory"),
        (lambda: edit("--editor", "malmen"), "--editor malmen, but trained.safetensors is of rledit"),
        (lambda: edit("--preset", "ultraedit"), "--hypernetwork is for --editor rledit and malmen; ultraedit has none"),
        (lambda: edit("--step-size", "1e-3"), "--step-size is of no use with --hypernetwork"),
        (lambda: edit("--edit-modules", MODULES[0]), "was trained for"),
    ]

    def edit(*options: str) -> int:
        given = ["--hypernetwork", "trained.safetensors", "--requests", "requests.json", "--output", "out"]
        return call("edit", *given, *options)

    for run, words in cases:
        assert run() == 2
        assert words in assert_one_error(capsys.readouterr().err)
        assert tree(work) == before
