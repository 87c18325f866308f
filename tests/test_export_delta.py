"""What changed in a model, and the delta that holds it: bit for bit, on its own base model only."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard

from stableedit_cpp import core
from stableedit_cpp.export import Provenance, apply_delta, change_between, change_of, export_delta
from stableedit_cpp.files.digest import model_digest
from support.exports import card_of, edited, facts_of, load_as_the_card_says
from support.tiny import save_tiny, tiny_model

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]


class TestChange:
    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_of_an_editor_and_between_two_models(self, architecture, dtype):
        editor = edited(architecture, dtype)
        base = tiny_model(architecture, dtype)
        own, between = change_of(editor), change_between(base, editor.model)
        for change in own, between:
            assert change.base_digest == model_digest(base)
            assert list(change.tensors) == [f"{module.name}.weight" for module in editor.modules]
            assert change.others == []
            assert change.dtype == str(dtype).removeprefix("torch.")
            for module in editor.modules:
                assert torch.equal(change.tensors[f"{module.name}.weight"], module.weight)
                part = change.modules[module.name]
                assert part.layout == module.layout
                weight = base.get_submodule(module.name).weight.detach().clone()
                part.add_to(weight)
                torch.testing.assert_close(weight, module.weight.detach())
        assert model_digest(editor.model) != own.base_digest

    def test_masters_know_more_than_rounded_weights(self):
        """The export of a half-precision model rests on the float32 masters."""
        editor = edited(dtype=torch.bfloat16)
        exact = editor.weight_changes()
        for name, change in change_of(editor).modules.items():
            assert torch.equal(change.dense(), exact[name])
        for name, change in change_between(tiny_model("llama", torch.bfloat16), editor.model).modules.items():
            assert not torch.equal(change.dense(), exact[name])

    def test_module_that_did_not_change(self):
        editor = edited(modules=NAMES[:2])
        with torch.no_grad():
            editor.modules[0].weight.copy_(editor.original_weights()[NAMES[0]])
        assert list(change_of(editor).modules) == NAMES[1:2]

    def test_nothing_changed(self):
        editor = edited()
        with editor.unedited(), pytest.raises(ValueError, match="unedited weights"):
            change_of(editor)
        for module in editor.modules:
            with torch.no_grad():
                module.weight.copy_(editor.original_weights()[module.name])
        with pytest.raises(ValueError, match="bit for bit: there is nothing to export"):
            change_of(editor)
        with pytest.raises(ValueError, match="nothing to export"):
            change_between(tiny_model("llama"), tiny_model("llama"))

    def test_the_sign_of_zero_is_a_change(self):
        base, other = tiny_model("llama"), tiny_model("llama")
        with torch.no_grad():
            for model, zero in (base, 0.0), (other, -0.0):
                model.model.layers[0].mlp.down_proj.weight[0, 0] = zero
        assert list(change_between(base, other).tensors) == [f"{NAMES[0]}.weight"]

    def test_other_tensors(self):
        base, other = tiny_model("gpt2"), tiny_model("gpt2")
        with torch.no_grad():
            other.transformer.ln_f.weight.add_(1)
            other.transformer.h[0].mlp.c_proj.bias.add_(1)
            other.transformer.h[0].mlp.c_proj.weight.add_(1)
        change = change_between(base, other)
        assert sorted(change.others) == ["transformer.h.0.mlp.c_proj.bias", "transformer.ln_f.weight"]
        assert list(change.modules) == ["transformer.h.0.mlp.c_proj"]
        with pytest.raises(ValueError, match=r"weights only, but .*c_proj\.bias, transformer\.ln_f\.weight changed as"):
            change.check_linear("a LoRA adapter")

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (lambda: tiny_model("gpt2"), "only one of them has"),
            (lambda: tiny_model("llama", torch.bfloat16), "torch.bfloat16 in the edited model and .* torch.float32 in"),
            (lambda: tiny_model("qwen3"), "only one of them has"),
        ],
    )
    def test_of_unlike_models(self, other, message):
        with pytest.raises(ValueError, match=f"the edited model is no edit of the base model: .*{message}"):
            change_between(tiny_model("llama"), other())


@pytest.fixture
def delta(tmp_path):
    """(editor, directory) of a llama's delta."""
    editor = edited()
    export_delta(change_of(editor), tmp_path / "delta", provenance=Provenance(base_model="tiny"))
    return editor, tmp_path / "delta"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip(tmp_path, architecture, dtype):
    editor = edited(architecture, dtype)
    export_delta(change_of(editor), tmp_path / "delta")
    model = tiny_model(architecture, dtype)
    names = apply_delta(model, tmp_path / "delta")
    assert names == sorted(f"{module.name}.weight" for module in editor.modules)
    assert model_digest(model) == model_digest(editor.model)
    assert names == sorted(safetensors.torch.load_file(tmp_path / "delta" / "delta.safetensors"))


def test_other_tensors_round_trip(tmp_path):
    base, other = tiny_model("gpt2"), tiny_model("gpt2")
    with torch.no_grad():
        other.transformer.ln_f.bias.add_(1)
        other.transformer.wte.weight.mul_(2)
    export_delta(change_between(base, other), tmp_path / "delta")
    apply_delta(base, tmp_path / "delta" / "delta.safetensors")
    assert model_digest(base) == model_digest(other)


def test_size(delta):
    editor, directory = delta
    size = (directory / "delta.safetensors").stat().st_size
    assert sum(module.weight.nbytes for module in editor.modules) < size < 3 * 16 * 24 * 4 + 2000
    assert facts_of(directory)["bytes"] == size


def test_card(tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base", "gpt2", torch.bfloat16)
    editor = edited("gpt2", torch.bfloat16)
    provenance = Provenance(base_model=str(base), config=editor.config, edits=13, requests="facts.json")
    export_delta(change_of(editor), tmp_path / "delta", provenance=provenance)
    assert model_digest(load_as_the_card_says(tmp_path / "delta", monkeypatch)) == model_digest(editor.model)
    card = ModelCard.load(tmp_path / "delta" / "README.md")
    assert card.data.base_model == str(base)
    digest = model_digest(tiny_model("gpt2", torch.bfloat16))
    for line in (f"| digest of the base model | {digest} |", "| edits | 13 |", "| requests | facts.json |"):
        assert line in card.text
    assert all(module in card.text for module in editor.config.edit_modules)
    facts = facts_of(tmp_path / "delta")
    assert (facts["format"], facts["version"], facts["kind"], facts["tensors"]) == ("stableedit-export", 1, "delta", 3)
    assert facts["provenance"]["base_digest"] == digest
    assert facts["provenance"]["config"]["step_size"] == editor.config.step_size


def refused(model, path, message):
    before = model_digest(model)
    with pytest.raises(ValueError, match=message) as error:
        apply_delta(model, path)
    assert "\n" not in str(error.value)
    assert model_digest(model) == before


@pytest.mark.parametrize("kind", ["other weights", "other architecture", "other dtype", "edited already"])
def test_another_base_model(delta, kind):
    editor, directory = delta
    models = {
        "other weights": lambda: tiny_model("llama", seed=1),
        "other architecture": lambda: tiny_model("gpt2"),
        "other dtype": lambda: tiny_model("llama", torch.bfloat16),
        "edited already": lambda: editor.model,
    }
    expected = facts_of(directory)["provenance"]["base_digest"][:16]
    refused(
        models[kind](), directory, rf"belongs to another base model: 'tiny' in float32, with digest {expected}\.\.\."
    )


@pytest.mark.parametrize("kind", ["cut short", "one bit", "not safetensors", "other safetensors", "newer", "misfit"])
def test_damaged_file(delta, kind):
    _, directory = delta
    path = directory / "delta.safetensors"
    data = bytearray(path.read_bytes())
    if kind == "cut short":
        path.write_bytes(data[:-1])
    elif kind == "one bit":
        data[-5] ^= 4
        path.write_bytes(data)
    elif kind == "not safetensors":
        path.write_text("hello")
    elif kind == "other safetensors":
        safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    else:
        tensors, metadata = core.load_safetensors(path)
        if kind == "newer":
            metadata["version"] = "2"
        else:
            tensors["model.norm.weight"] = torch.zeros(1)
        core.save_safetensors(path, tensors, metadata)
    refused(tiny_model("llama"), path, "delta.safetensors")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        apply_delta(tiny_model("llama"), tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError):
        apply_delta(tiny_model("llama"), tmp_path)


def test_existing_directory(delta):
    editor, directory = delta
    (directory / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="exists and is not empty"):
        export_delta(change_of(editor), directory)
    assert (directory / "mine.txt").exists()
    export_delta(change_of(editor), directory, overwrite=True)
    assert not (directory / "mine.txt").exists()
    assert "tensors that editing changed" in card_of(directory)
    with pytest.raises(ValueError, match=r"README\.md is a file"):
        export_delta(change_of(editor), directory / "README.md", overwrite=True)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    editor = edited()
    monkeypatch.setattr(core, "save_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        export_delta(change_of(editor), tmp_path / "delta")
    assert list(tmp_path.iterdir()) == []
