"""Patches recorded from an editor: they are the difference that the edits made, whatever form they take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import stableedit_cpp as se
from stableedit_cpp import core
from stableedit_cpp.cli import main
from stableedit_cpp.files.digest import model_digest
from support.tiny import FACTS, pattern_of, save_tiny, tiny_model, tiny_tokenizer

SHORT = [{"prompt": "One and two is", "target": "3"}, {"prompt": "Two and two is", "target": "4"}]
RECOMPUTED = 2.0**-22  # of the largest weight: a few float32 roundings, one for each pass


def make_editor(architecture: str = "llama", dtype: torch.dtype = torch.float32, **config) -> se.StableEdit:
    config = {"edit_modules": pattern_of(architecture), "turn_size": 4} | config
    return se.StableEdit(tiny_model(architecture, dtype), tiny_tokenizer(), se.StableEditConfig.one_pass(**config))


def weights_of(model: torch.nn.Module, patch: core.Patch) -> dict[str, torch.Tensor]:
    return {name: model.get_submodule(name).weight.detach() for name in patch.modules}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Relative to the largest weight."""
    return max(((first[name] - second[name]).abs().max() / second[name].abs().max()).item() for name in second)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("requests", "passes", "low_rank"), [(SHORT, 1, True), (FACTS, 2, False)], ids=["low-rank", "dense"]
)
def test_is_what_the_edits_added(tmp_path, architecture, requests, passes, low_rank):
    editor = make_editor(architecture, max_passes=passes)
    recorder = se.PatchRecorder(editor)
    editor.warm_up(SHORT[:1], progress=False)
    editor.edit(requests, progress=False)
    core.save_patch(tmp_path / "p", recorder.patch())
    patch = core.load_patch(tmp_path / "p")
    assert {change.is_low_rank for change in patch.modules.values()} == {low_rank}
    assert {change.layout for change in patch.modules.values()} == {"conv1d" if architecture == "gpt2" else "linear"}
    fresh = tiny_model(architecture)
    patched = weights_of(fresh, patch)
    before = {name: weight.clone() for name, weight in patched.items()}
    patch.add_to(patched)
    edited = weights_of(editor.model, patch)
    assert largest_difference(before, edited) > 100 * RECOMPUTED
    assert largest_difference(patched, edited) <= RECOMPUTED


def test_a_half_precision_model_gets_the_change_of_its_master():
    editor = make_editor(dtype=torch.bfloat16)
    recorder = se.PatchRecorder(editor)
    editor.edit(SHORT, progress=False)
    patch = recorder.patch()
    weights = {name: weight.clone() for name, weight in editor.original_weights().items()}
    patch.add_to(weights)
    assert all(torch.equal(weights[name], weight) for name, weight in weights_of(editor.model, patch).items())
    changes = editor.weight_changes()
    for name, change in patch.modules.items():  # what bfloat16 swallows is in the patch
        assert torch.allclose(change.dense(), changes[name], atol=RECOMPUTED * weights[name].abs().max())


def test_says_where_it_comes_from():
    editor = make_editor()
    base = model_digest(editor.model)
    recorder = se.PatchRecorder(editor, base_model="tiny")
    editor.warm_up(FACTS[:3], progress=False)
    editor.edit(FACTS, progress=False)
    patch = recorder.patch("facts")
    assert (patch.id, patch.base_model, patch.base_digest) == ("facts", "tiny", base)
    assert se.StableEditConfig.from_json(patch.config) == editor.config
    assert json.loads(patch.requests) == {"edits": len(FACTS), "warm_up_edits": 3, "first": FACTS[:5]}


def test_without_edits_it_adds_nothing():
    patch = se.PatchRecorder(make_editor()).patch()
    assert all(change.is_low_rank and change.change.rank == 0 for change in patch.modules.values())
    model = tiny_model("llama")
    patch.add_to(weights_of(model, patch))
    assert model_digest(model) == model_digest(tiny_model("llama"))


def test_a_turn_that_is_taken_back_is_not_in_it():
    editor = make_editor()
    seen = []

    def refuse_the_second(turn):
        seen.append(turn)
        if len(seen) == 2:
            raise OSError("disk full")

    editor.on_turn = refuse_the_second
    recorder = se.PatchRecorder(editor)
    with pytest.raises(OSError, match="disk full"):
        editor.edit(FACTS, progress=False)
    patch = recorder.patch()
    weights = weights_of(tiny_model("llama"), patch)
    patch.add_to(weights)
    assert largest_difference(weights, weights_of(editor.model, patch)) <= RECOMPUTED
    assert json.loads(patch.requests)["edits"] == 4


def adds_what_is_there(recorder: se.PatchRecorder, editor, architecture: str = "llama") -> dict:
    """Checks that base weights plus patch are the present weights; gives the summary of the requests."""
    patch = recorder.patch()
    weights = weights_of(tiny_model(architecture), patch)
    patch.add_to(weights)
    assert largest_difference(weights, weights_of(editor.model, patch)) <= RECOMPUTED
    return json.loads(patch.requests)


def add_something(editor) -> None:
    sizes = {module.name: module.shape for module in editor.modules}
    ones = {name: core.LowRankUpdate(torch.ones(v, 1) * 0.01, torch.ones(1, k)) for name, (k, v) in sizes.items()}
    editor.weights.add(ones)


def change_behind_its_back(editor) -> None:
    with torch.no_grad():
        editor.modules[0].weight[0, 0] += 0.5


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda editor: editor.shrink(0.5), ["shrinking what was added"]),
        (add_something, ["adding updates"]),
        (change_behind_its_back, ["a change of {} that went past the editor"]),
    ],
    ids=["shrink", "add", "behind its back"],
)
def test_is_what_is_there_after_other_changes(change, said, architecture):
    """And what turns add after that is in it as well."""
    editor = make_editor(architecture)
    recorder = se.PatchRecorder(editor)
    editor.edit(SHORT, progress=False)
    change(editor)
    summary = adds_what_is_there(recorder, editor, architecture)
    assert summary["other_changes"] == [what.format(editor.modules[0].name) for what in said]
    assert summary["edits"] == len(SHORT)
    editor.edit(FACTS[:2], progress=False)
    assert adds_what_is_there(recorder, editor, architecture)["edits"] == len(SHORT) + 2


@pytest.mark.parametrize("detail", ["factors", "requests"])
def test_beside_a_session_it_hears_of_rollback_and_revert(detail, tmp_path):
    model = tiny_model("llama")
    config = se.StableEditConfig.one_pass(edit_modules=pattern_of("llama"), turn_size=4)
    session = se.LifelongSession.create(tmp_path / "s", model, tiny_tokenizer(), config, detail=detail)
    recorder = se.PatchRecorder(session.editor)
    session.edit([{"id": str(number), **fact} for number, fact in enumerate(FACTS)], progress=False)
    adds_what_is_there(recorder, session.editor)
    session.revert("1", others=2, progress=False)
    summary = adds_what_is_there(recorder, session.editor)
    assert summary["edits"] == len(FACTS) and summary["other_changes"] == ["taking out 1"]
    session.rollback(1, progress=False)
    assert adds_what_is_there(recorder, session.editor)["other_changes"] == ["taking out 1", "a rollback to turn 1"]
    session.rollback(0, progress=False)
    adds_what_is_there(recorder, session.editor)
    assert model_digest(model) == model_digest(tiny_model("llama"))
    assert all(float(change.dense().abs().max()) == 0.0 for change in recorder.patch().modules.values())


def test_a_turn_that_it_could_not_take_in_is_in_it(monkeypatch):
    editor = make_editor()
    recorder = se.PatchRecorder(editor)
    editor.edit(SHORT[:1], progress=False)

    def fail(*_args) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("stableedit_cpp.export.patch_recorder.LowRankUpdate", fail)
        with pytest.raises(MemoryError):
            editor.edit(SHORT[1:], progress=False)
    adds_what_is_there(recorder, editor)


def test_refuses_an_editor_that_has_edited():
    editor = make_editor()
    editor.edit(SHORT, progress=False)
    with pytest.raises(ValueError, match="before the first edit"):
        se.PatchRecorder(editor)


# --- stableedit edit --patch ---


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """Runs `stableedit edit` on a tiny model in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    save_tiny("model", bos=True)
    Path("requests.json").write_text(json.dumps(FACTS))

    def run(*options: str) -> int:
        return main(["edit", "--device", "cpu", "--model", "model", "--requests", "requests.json", *options])

    return run


def test_command_makes_the_saved_model_of_the_original(edit, capsys):
    assert edit("--patch", "new/facts.safetensors", "--output", "out") == 0
    out = capsys.readouterr().out
    assert "The patch is in new/facts.safetensors" in out
    patch = core.load_patch("new/facts.safetensors")
    assert patch.id == "facts"
    model = AutoModelForCausalLM.from_pretrained("model")
    assert patch.base_digest == model_digest(model)
    weights = weights_of(model, patch)
    patch.add_to(weights)
    saved = weights_of(AutoModelForCausalLM.from_pretrained("out"), patch)
    assert largest_difference(weights, saved) <= RECOMPUTED


def test_command_with_a_patch_alone(edit):
    assert edit("--patch", "facts.safetensors") == 0
    assert sorted(path.name for path in Path().iterdir()) == ["facts.safetensors", "model", "requests.json"]


def test_command_refuses_before_it_edits(edit, capsys):
    for options, message in (
        ((), "nothing would be saved; give --output DIR, --patch FILE or both"),
        (("--patch", "model"), "--patch model is a directory; expected a file name"),
        (("--patch", "requests.json/p"), "--patch requests.json/p cannot be made"),
    ):
        assert edit(*options) == 2
        assert message in capsys.readouterr().err


def test_command_with_a_share_of_the_change(edit):
    """The patch is of the model that is saved."""
    assert edit("--patch", "facts.safetensors", "--shrink", "0.5", "--output", "out") == 0
    patch = core.load_patch("facts.safetensors")
    weights = weights_of(AutoModelForCausalLM.from_pretrained("model"), patch)
    patch.add_to(weights)
    saved = weights_of(AutoModelForCausalLM.from_pretrained("out"), patch)
    assert largest_difference(weights, saved) <= RECOMPUTED
    assert json.loads(patch.requests)["other_changes"] == ["shrinking what was added"]
