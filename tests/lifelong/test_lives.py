"""Every editor of the registry lives the same life: sessions, files, state in C++, exports, benchmarks and reports.

The editors, and what a tiny model wants of their settings, are in support/lives.py. What is particular to a kind of
editor is tested with its kind.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import stableedit_cpp as se
from stableedit_cpp import core
from stableedit_cpp.cli import main
from stableedit_cpp.export import (
    change_of,
    export_delta,
    export_gguf,
    export_gguf_lora,
    export_lora,
    export_model,
    export_patch,
)
from stableedit_cpp.export.loading import load_export
from stableedit_cpp.lifelong import LifelongSession, SessionView
from support import sessions
from support.editors import assert_same_bits
from support.exports import logits
from support.faults import everything
from support.lives import KINDS, LIVES, Life, stream
from support.sessions import without_closing
from support.streams import bench, killed_after, write_data
from support.tiny import save_tiny, tiny_model, tiny_tokenizer
from support.vocabularies import byte_level

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few for keys")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Text statistics and hypernetworks, made once."""
    return tmp_path_factory.mktemp("lives")


@pytest.fixture(params=[pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in LIVES])
def life(request, files) -> Life:
    if LIVES[request.param][0].startswith("lora"):
        pytest.importorskip("peft")
    return Life(request.param, files)


# What C++ makes of the parts of a state, by how their names begin; of the others it has the tensors.
NOUNS = {"normalizer": core.LifelongNormalizer, "past_keys": core.PastKeys, "step": core.PolyakStep}
TENSORS = {"weights", "hypernetwork", "past_requests", "text_statistics", "model"}
PAGE = Path(__file__).parents[2] / "docs/rivals.md"


def create(life: Life, directory, **how) -> LifelongSession:
    return sessions.create(directory / "s", tiny_tokenizer(), config=life.config, **how)


def reopen(directory) -> LifelongSession:
    return sessions.reopen(directory / "s", tiny_tokenizer())


@pytest.mark.parametrize("detail", ["factors", pytest.param("requests", marks=pytest.mark.slow)])
def test_a_session_goes_on_and_back_bit_for_bit(detail, life, tmp_path):
    session = create(life, tmp_path, detail=detail)
    fresh = everything(session.editor)
    session.edit(stream(4), progress=False)
    after = everything(session.editor)
    assert any(not torch.equal(after[name], tensor) for name, tensor in fresh.items() if name.startswith("model "))
    without_closing(session)
    with reopen(tmp_path) as session:  # both turns are done again
        assert_same_bits(everything(session.editor), after)
        session.edit(stream(3, 4), progress=False)
        found = session.audit(progress=False)
        assert found.audited == 7
        repaired = session.repair(budget=2, progress=False)
        assert repaired.before.forgotten == found.forgotten
        later, turn = everything(session.editor), session.history.turn
        assert turn == (5 if found.forgotten else 4)
    with reopen(tmp_path) as session:  # of a snapshot
        assert_same_bits(everything(session.editor), later)
        session.rollback(2)
        assert_same_bits(everything(session.editor), after)
        assert [request.id for request in session.current_requests()] == ["f0", "f1", "f2", "f3"]
        session.rollback(0)
        assert_same_bits(everything(session.editor), fresh)
    assert SessionView(tmp_path / "s").history.turn == 0


def test_a_request_is_taken_out_or_refused(life, tmp_path):
    """Of a model from which all requests are taken out, one after the other, nothing is left but the unedited one
    (anchors and what is replayed apart: their rows belong to no request)."""
    life.config = dataclasses.replace(life.config, anchors=0, replays=0)
    with create(life, tmp_path) as session:
        fresh = everything(session.editor)
        session.edit(stream(2), progress=False)
        before = everything(session.editor)
        session.edit(stream(2, 2), progress=False)
        here = everything(session.editor)
        if life.kind.owns_rows:
            assert session.revert("f2", progress=False).back == (1, 1)
            session.rollback(2)
            assert_same_bits(everything(session.editor), here)
            for id in ("f2", "f0", "f3", "f1"):
                session.revert(id, bring_back=False, progress=False)
            for name, weight in fresh.items():
                if name.startswith("model "):
                    left = everything(session.editor)[name] - weight
                    assert left.norm() <= 1e-3 * (here[name] - weight).norm(), name
        else:
            words = f"'f3' cannot be reverted alone: a turn of {life.kind.__name__} changes the weights as one whole"
            with pytest.raises(ValueError, match=words + r".*; rollback\(1\) takes back turn 2"):
                session.revert("f3", progress=False)
            assert_same_bits(everything(session.editor), here)
            session.rollback(1)
            assert_same_bits(everything(session.editor), before)


def test_pruning_is_refused_in_a_session(files, tmp_path):
    with create(Life("alphaedit", files), tmp_path) as session:
        session.edit(stream(2), progress=False)
        here = everything(session.editor)
        with pytest.raises(ValueError, match="pruning what was added would be missing in its journal"):
            se.editors.prune(session.editor)
        assert_same_bits(everything(session.editor), here)


def test_a_saved_editor_goes_on(life, tmp_path):
    steady = life.editor()
    steady.edit(stream(4), progress=False)
    steady.save(tmp_path / "editor")
    loaded = se.load_editor(tiny_model("llama"), tiny_tokenizer(), tmp_path / "editor")
    loaded.guard = None
    assert type(loaded) is life.kind and loaded.config == steady.config
    for editor in (steady, loaded):
        editor.edit(stream(3, 4), progress=False)
    assert_same_bits(everything(loaded), everything(steady))


def said_of() -> dict[str, tuple[bool, set[str], set[str]]]:
    """The rows of docs/rivals.md, by editor: whether a request is taken out alone, and the parts of its state, those
    that C++ has an object for and the others."""
    rows = PAGE.read_text(encoding="utf-8").split("<!-- lives -->")[1].split("<!-- end of lives -->")[0]
    found = {}
    for line in rows.strip().splitlines()[2:]:
        names, alone, nouns, tensors = ([part.strip() for part in cell.split(",")] for cell in line.split("|")[1:-1])
        found |= dict.fromkeys(names, (alone == ["yes"], {*nouns} - {""}, {*tensors}))
    return found


def test_the_page_says_what_differs(life):
    """Of a preset that has no row the row of its editor, of StableEdit no more than that."""
    said = said_of()
    name = life.name if life.name in said else life.config.editor
    alone, nouns, tensors = said.pop(name)
    assert said.keys() - LIVES.keys() == set()
    parts = {part.partition("/")[0] for part in life.editor().state_dict()}
    assert alone == life.kind.owns_rows
    if life.kind is se.StableEdit and life.name != "stableedit":
        assert parts <= nouns | tensors
    else:
        assert (parts & NOUNS.keys(), parts & TENSORS) == (nouns, tensors)
    assert parts <= NOUNS.keys() | TENSORS


class TestStateInCpp:
    """``core`` is libstableedit: what it reads, a C++ program reads."""

    def test_each_part_is_known(self, life, tmp_path):
        """Those of a saved editor, and of a session's snapshots."""
        with create(life, tmp_path) as session:
            session.edit(stream(4), progress=False)
            session.editor.save(tmp_path / "editor")
            wanted = session.editor.state_dict()
        snapshot = max((tmp_path / "s/snapshots").iterdir())
        for path in (tmp_path / "editor", snapshot):
            found, config = core.load_state(path)
            assert path == snapshot or json.loads(config) == json.loads(session.editor.config.to_json())
            assert found.keys() - {"model"} == wanted.keys()
            for part, fields in wanted.items():
                noun = NOUNS.get(part.partition("/")[0])
                assert noun is not None or part.partition("/")[0] in TENSORS
                assert_same_bits(
                    found[part] if noun is None else noun.from_state_dict(found[part]).state_dict(), fields
                )

    @pytest.mark.parametrize("name", ["ultraedit", "memit-seq", "alphaedit"])
    def test_the_next_turn_is_solved_from_a_file(self, name, files, tmp_path):
        """With nothing of Python but what the model gave: keys, and value gradients or what is to be written."""
        life = Life(name, files)
        editor, turns = life.editor(), []
        editor.edit(stream(4), progress=False)
        editor.save(tmp_path / "editor")
        editor.on_turn = turns.append
        editor.edit(stream(2, 4), progress=False)
        (applied,) = turns[0].passes
        state, config = core.load_state(tmp_path / "editor")
        config = json.loads(config)
        keys, gradients = applied.captured.keys, applied.captured.value_gradients
        for part, fields in state.items():
            if part.startswith("normalizer/"):
                normalizer = core.LifelongNormalizer.from_state_dict(fields)
                normalizer.observe(list(keys.values()), list(gradients.values()))
        for module, wanted in applied.updates.items():
            if name == "ultraedit":
                solver = core.ModuleEditor(normalizer, step_size=config["step_size"], ridge=config["ridge"])
                update = solver.compute_update(keys[module], gradients[module])
            else:
                past = core.PastKeys.from_state_dict(state[f"past_keys/{module}"])
                text, _ = core.load_state(config["text_statistics"])
                seen = core.PastKeys.from_state_dict(text[f"keys/{module}"])
                moment = seen.second_moment / seen.count
                rows, ridge = keys[module].double(), config["ridge"]
                if name == "alphaedit":
                    relative = config["threshold_mode"] == "relative"
                    space = core.NullSpace(moment, config["threshold"], relative=relative)
                    assert space.rank < space.dim
                    torch.testing.assert_close(space.project(rows), rows)  # which were projected
                else:
                    ridge *= config["text_weight"] * float(moment.diagonal().mean())
                how = {"past_keys": past, "past_key_weight": config["past_key_weight"]}
                update = core.ridge_update(rows, -gradients[module].double(), ridge, **how)
            found, wanted = update.dense().double(), wanted.dense().double()
            assert (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", ["alphaedit", "rledit"])
def test_elsewhere_the_same_files_are_found(name, files, tmp_path, monkeypatch):
    """Though they were named from where the session began: text statistics; a hypernetwork is in the state."""
    life = Life(name, files)
    monkeypatch.chdir(files)
    paths = {field: Path(path).name for field, path in life.paths.items()}
    life.config = dataclasses.replace(life.config, **paths)
    with create(life, tmp_path) as session:
        session.edit(stream(2), progress=False)
        here = everything(session.editor)
    editor = life.editor()
    editor.edit(stream(2), progress=False)
    editor.save(tmp_path / "editor")
    monkeypatch.chdir(tmp_path)
    with reopen(tmp_path) as session:
        assert_same_bits(everything(session.editor), here)
    loaded = se.load_editor(tiny_model("llama"), tiny_tokenizer(), tmp_path / "editor")
    assert_same_bits(everything(loaded), here)


def test_text_statistics_that_are_gone_are_named(files, tmp_path):
    life = Life("alphaedit", files)
    life.editor()  # makes them
    life.config = dataclasses.replace(life.config, texts=None, text_statistics=str(tmp_path / "text.safetensors"))
    shutil.copy(files / "text.safetensors", tmp_path)
    create(life, tmp_path).close()
    (tmp_path / "text.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"the text statistics that AlphaEdit rests on.* not there; .* a link"):
        reopen(tmp_path)


def test_what_is_exported_is_the_edited_model(life, tmp_path):
    editor = life.editor()
    recorder = se.PatchRecorder(editor)
    editor.edit(stream(4), progress=False)
    wanted, change = logits(editor.model), change_of(editor)

    def back(kind: str) -> torch.Tensor:
        return logits(load_export(tmp_path / kind, lambda *_: (tiny_model("llama"), tiny_tokenizer()), base="it")[0])

    export_model(editor.model, tiny_tokenizer(), tmp_path / "model")
    assert torch.equal(logits(type(editor.model).from_pretrained(tmp_path / "model").eval()), wanted)
    export_delta(change, tmp_path / "delta")
    assert torch.equal(back("delta"), wanted)
    export_patch(change, tmp_path / "patch")
    torch.testing.assert_close(back("patch"), wanted, rtol=0, atol=1e-5)
    core.save_patch(tmp_path / "recorded.safetensors", recorder.patch("facts"))
    torch.testing.assert_close(back("recorded.safetensors"), wanted, rtol=0, atol=1e-5)
    pytest.importorskip("peft")
    export_lora(change, tmp_path / "lora", keep=1.0)
    torch.testing.assert_close(back("lora"), wanted, rtol=0, atol=1e-5)


def test_llama_cpp_gets_the_edited_model(life, tmp_path):
    gguf = pytest.importorskip("gguf")
    editor = life.editor()
    editor.edit(stream(4), progress=False)
    export_gguf(editor.model, byte_level(), tmp_path / "gguf")
    how = {"gguf_file": "model.gguf", "dtype": torch.float32}
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", **how).eval()
    torch.testing.assert_close(logits(read), logits(editor.model), rtol=0, atol=1e-5)
    export_gguf_lora(change_of(editor), tmp_path / "adapter", keep=1.0)
    reader = gguf.GGUFReader(tmp_path / "adapter/adapter.gguf")
    factors = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    assert len(factors) == 2 * len(editor.modules)
    for module, change in editor.weight_changes().items():
        name = f"blk.{module.split('.')[2]}.ffn_down.weight"
        a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
        torch.testing.assert_close(alpha / len(a) * b @ a, change, rtol=0, atol=1e-5)


def test_the_command_line_lives_it(life, tmp_path, capsys):
    """Created, edited, rolled back and exported by ``stableedit session``."""
    save_tiny(tmp_path / "tiny")
    (tmp_path / "config.json").write_text(life.config.to_json())
    (tmp_path / "facts.json").write_text(json.dumps(stream(4)))

    def session(action: str, *options: object) -> int:
        return main(["session", action, str(tmp_path / "s"), "--device", "cpu", *map(str, options)])

    assert session("create", "--model", tmp_path / "tiny", "--config", tmp_path / "config.json") == 0
    assert session("edit", "--requests", tmp_path / "facts.json", "--no-guard") == 0
    assert session("rollback", "--to-turn", 1) == 0
    assert session("export", "--format", "delta", "--output", tmp_path / "out") == 0
    capsys.readouterr()
    done = session("revert", "f0")
    refused = "cannot be reverted alone" in capsys.readouterr().err
    assert (done, refused) == ((0, False) if life.kind.owns_rows else (2, True))


def row(life: Life, data, **changes) -> dict[str, object]:
    """Of a matrix of ``stableedit bench``."""
    editor = {"name": life.name, "editor": life.named, **life.changes}
    how = {"editors": [editor], "editor_options": {}, "warm_up": "none", "edits": 6, "checkpoints": 1, "geometry": 1}
    return {"data": data, "metrics": ["accuracy"], **how, **changes}


def test_a_benchmark_goes_on_after_a_kill(life, tmp_path, monkeypatch):
    how = row(life, write_data(tmp_path / "data", edits=6))
    with killed_after(3, monkeypatch):
        bench(output=tmp_path / "out", how={"snapshot_seconds": 0.0}, **how)
    (resumed,), (whole,) = (bench(output=tmp_path / place, **how) for place in ("out", "whole"))
    assert [stint["from_edits"] for stint in resumed["provenance"]["stints"]] == [0, 4]
    for one, other in zip(resumed["checkpoints"], whole["checkpoints"], strict=True):
        assert one["scores"] == other["scores"]


@pytest.mark.slow
def test_all_are_on_one_page(files, tmp_path):
    pytest.importorskip("matplotlib", reason="a report needs the extra 'report'")
    data = write_data(tmp_path / "data", edits=6)
    for name in LIVES:
        bench(output=tmp_path / "out", **row(Life(name, files), data))
    assert main(["report", str(tmp_path / "out"), "--output", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert all(name in page for name in LIVES)
