"""An editor in a file: saved and loaded, it goes on as if it had never stopped."""

from __future__ import annotations

import copy
import re

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp import core
from support.editors import MODULES, assert_same_bits, make, state_of
from support.tiny import FACTS, pattern_of, tiny_model, tiny_tokenizer

KINDS = {
    "stableedit": {},
    "per module": {"statistics": "per_module", "whitening": "diagonal"},
    "closed loop": {"max_passes": 3, "past_key_weight": 0.05, "retries_feed_statistics": False},
    "ultraedit": {"editor": se.UltraEdit, "config": se.UltraEditConfig},
    "ultraedit published": {"editor": se.UltraEdit, "config": se.UltraEditConfig, "unbiased_batches": True},
}


def whole_state(editor) -> dict[str, torch.Tensor]:
    parts = editor.state_dict().items()
    state = {f"{part}/{name}": field.clone() for part, fields in parts for name, field in fields.items()}
    return state_of(editor) | state


def interrupted_and_not(tokenizer, tmp_path, model, load, **settings):
    """The same stream without a break, and with everything but the file thrown away after the first turn."""
    steady = make(tokenizer, copy.deepcopy(model), **settings)
    steady.warm_up(FACTS[:5])
    steady.edit(FACTS[5:10])
    steady.save(tmp_path / "editor.safetensors")
    broken = load(copy.deepcopy(model), tiny_tokenizer(), tmp_path / "editor.safetensors")
    return steady, broken


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_goes_on_bit_for_bit(kind, architecture, tokenizer, tmp_path):
    settings = {"edit_modules": pattern_of(architecture)} | KINDS[kind]
    model = tiny_model(architecture)
    steady, broken = interrupted_and_not(tokenizer, tmp_path, model, se.load_editor, **settings)
    assert type(broken) is type(steady) and broken.config == steady.config
    assert_same_bits(whole_state(broken), whole_state(steady))
    for editor in (steady, broken):
        editor.edit(FACTS[10:])
    assert_same_bits(whole_state(broken), whole_state(steady))
    assert_same_bits(broken.weight_changes(), steady.weight_changes())
    with broken.unedited() as shown:
        assert_same_bits(dict(shown.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters_of_half_precision_weights_come_back(dtype, tokenizer, tmp_path):
    """They hold what the weights are too coarse for."""
    settings = {"step_size": 1e-4, "past_key_weight": 0.05}
    steady, broken = interrupted_and_not(
        tokenizer, tmp_path, tiny_model("llama", dtype), se.StableEdit.load, **settings
    )
    master = broken.state_dict()["weights"][MODULES[0]]
    assert master.dtype == torch.float32 and not torch.equal(master, master.to(dtype).float())
    for editor in (steady, broken):
        editor.edit(FACTS)
    assert_same_bits(whole_state(broken), whole_state(steady))


def test_a_fresh_editor_and_one_that_was_shrunk(tokenizer, tmp_path):
    editor = make(tokenizer)
    editor.save(tmp_path / "fresh")
    editor.edit(FACTS)
    editor.shrink(0.5)
    editor.save(tmp_path / "shrunk")
    fresh = se.load_editor(tiny_model("llama"), tokenizer, tmp_path / "fresh")
    assert all(not change.any() for change in fresh.weight_changes().values())
    shrunk = se.load_editor(tiny_model("llama"), tokenizer, tmp_path / "shrunk")
    assert_same_bits(shrunk.weight_changes(), editor.weight_changes())


@pytest.fixture
def saved(tokenizer, tmp_path):
    editor = make(tokenizer)
    editor.edit(FACTS[:5])
    path = tmp_path / "editor.safetensors"
    editor.save(path)
    return path


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (
            "other weights",
            "weights of the model outside the edited modules are others; load what the editor began with",
        ),
        ("edited", "do not hold their unedited weights; load what the editor began with"),
        ("dtype", "the model is in bfloat16, not in float32"),
        ("class", "the model is a GPT2LMHeadModel, not a LlamaForCausalLM|module"),
        ("tokenizer", "the tokenizer is another; load what the editor began with"),
    ],
)
def test_another_model_is_refused_and_left_alone(what, words, saved, tokenizer):
    model, other = tiny_model("llama"), tokenizer
    if what == "other weights":
        with torch.no_grad():
            model.get_input_embeddings().weight[3, 3] += 1e-3
    elif what == "edited":
        make(tokenizer, model).edit(FACTS[:5])
    elif what == "dtype":
        model = tiny_model("llama", torch.bfloat16)
    elif what == "class":
        model = tiny_model("gpt2")
    else:
        other = tiny_tokenizer(bos=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        se.load_editor(model, other, saved)
    assert_same_bits(dict(model.state_dict()), before)


def test_files_that_are_not_of_an_editor_are_refused(saved, tokenizer, tmp_path):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="config of the editor 'stableedit'; UltraEditConfig is for 'ultraedit'"):
        se.UltraEdit.load(model, tokenizer, saved)
    core.save_state(tmp_path / "state", {"normalizer/x": {"count": torch.tensor(1)}}, "{}")
    with pytest.raises(
        ValueError, match=re.escape(f"{tmp_path}/state holds a state, but was not written by an editor")
    ):
        se.load_editor(model, tokenizer, tmp_path / "state")
    with pytest.raises(FileNotFoundError):
        se.load_editor(model, tokenizer, tmp_path / "nothing")
    content = bytearray(saved.read_bytes())
    content[-100] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ValueError, match=r"editor\.safetensors.*checksum"):
        se.load_editor(model, tokenizer, saved)


def test_a_file_that_cannot_be_written_leaves_the_old_one(saved, tokenizer):
    before = saved.read_bytes()
    with pytest.raises(OSError):
        make(tokenizer).save(saved / "below a file")
    with pytest.raises(ValueError, match="shows its unedited weights"):
        editor = make(tokenizer)
        editor.edit(FACTS[:5])
        with editor.unedited():
            editor.save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
