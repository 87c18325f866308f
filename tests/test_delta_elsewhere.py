"""A delta where its base model is not what was edited: in another dtype, and in files, one or many."""

from __future__ import annotations

import json

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import AutoModelForCausalLM

from stableedit_cpp import core
from stableedit_cpp.cli import main
from stableedit_cpp.export import Provenance, apply_delta, apply_delta_to_checkpoint, change_of, export_delta
from stableedit_cpp.files.digest import model_digest
from support.commands import tree
from support.exports import card_of, edited, facts_of
from support.ranks import together
from support.tiny import FACTS, save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture
def delta(tmp_path):
    """(editor, directory) of a float32 llama's delta."""
    editor = edited()
    save_tiny(tmp_path / "base")
    export_delta(change_of(editor), tmp_path / "delta", provenance=Provenance(base_model=str(tmp_path / "base")))
    return editor, tmp_path / "delta"


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
    ],
    ids=str,
)
def test_base_in_another_dtype(tmp_path, was, becomes):
    """It becomes the edited model in that dtype."""
    editor = edited(dtype=was)
    export_delta(change_of(editor), tmp_path / "delta")
    model = tiny_model("llama", was).to(becomes)
    with pytest.raises(ValueError, match="that one in another dtype takes any_dtype=True"):
        apply_delta(model, tmp_path / "delta")
    apply_delta(model, tmp_path / "delta", any_dtype=True)
    assert model_digest(model) == model_digest(editor.model.to(becomes))


def test_another_model_in_another_dtype(delta):
    _, directory = delta
    model = tiny_model("llama", torch.bfloat16, seed=1)
    before = model_digest(model)
    for kind in (model, tiny_model("gpt2", torch.bfloat16)):
        with pytest.raises(ValueError, match=r"belongs to another base model: .* load that one, unedited"):
            apply_delta(kind, directory, any_dtype=True)
    assert model_digest(model) == before
    # In its own dtype all of the base model counts.
    other = tiny_model("llama")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="another base model"):
        apply_delta(other, directory)


def test_command_rounds_where_it_is_told_to(delta, tmp_path, capsys):
    editor, directory = delta
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))
    options = ["evaluate", "--device", "cpu", "--requests", str(tmp_path / "facts.json"), "--metrics", "accuracy"]
    scores = []
    editor.model.to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    tiny_tokenizer().save_pretrained(tmp_path / "rounded")
    for model in (directory, tmp_path / "rounded"):
        assert main([*options, "--model", str(model), "--dtype", "bfloat16", "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0]["efficacy"] == scores[1]["efficacy"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shards", ["one file", "many files"])
def test_saved_model(delta, tmp_path, dtype, shards):
    editor, directory = delta
    base = tmp_path / "saved"
    size = "5GB" if shards == "one file" else "8KB"
    tiny_model("llama").to(dtype).save_pretrained(base, max_shard_size=size)
    for name in ("README.md", "pytorch_model.bin", "LICENSE"):
        (base / name).write_text(name)
    before = tree(base)
    changed = apply_delta_to_checkpoint(base, directory, tmp_path / "out", progress=False)
    assert model_digest(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) == model_digest(editor.model.to(dtype))
    assert tree(base) == before
    after = tree(tmp_path / "out")
    weights = {name for name in before if name.endswith(".safetensors")}
    assert {name for name in weights if before[name] != after[name]} == set(changed)
    assert (len(weights) > len(changed) > 1) == (shards == "many files")
    assert after.keys() == (before.keys() - {"pytorch_model.bin"}) | {"stableedit_export.json"}
    assert after["LICENSE"] == b"LICENSE" and b"edited with StableEdit" in after["README.md"]
    assert facts_of(tmp_path / "out")["dtype"] == str(dtype).removeprefix("torch.")
    assert "AutoModelForCausalLM.from_pretrained" in card_of(tmp_path / "out")


def test_saved_models_that_are_refused(delta, tmp_path):
    _, directory = delta
    out = tmp_path / "out"

    def refused(base, message, delta=directory):
        with pytest.raises(ValueError, match=message):
            apply_delta_to_checkpoint(base, delta, out)
        assert not out.exists()

    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    refused(tmp_path / "other", "belongs to another base model than .*other: to .*base")
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    refused(tmp_path / "gpt2", "gpt2 keeps no tensor model.layers.0.mlp.down_proj.weight; load the model")
    refused(directory, "has neither model.safetensors nor model.safetensors.index.json")
    (tmp_path / "base/model.safetensors").write_bytes(b"short")
    refused(tmp_path / "base", "model.safetensors is damaged")
    tensors, metadata = core.load_safetensors(directory / "delta.safetensors")
    metadata.pop("replaced")  # as version 0.2.0 wrote it
    core.save_safetensors(tmp_path / "old.safetensors", tensors, metadata)
    refused(tmp_path / "other", "is of an earlier version", tmp_path / "old.safetensors")
    apply_delta(tiny_model("llama"), tmp_path / "old.safetensors")
    with pytest.raises(ValueError, match="another base model"):
        apply_delta(tiny_model("llama", torch.bfloat16), tmp_path / "old.safetensors", any_dtype=True)


def test_model_that_is_split_over_processes(tmp_path):
    """Each process gets its part of the edited weights, by columns, by rows, and whole."""
    editor = edited(modules=["model.layers.1.mlp.{up,down}_proj", "lm_head"])
    export_delta(change_of(editor), tmp_path / "delta")
    layouts = {"model.layers.1.mlp.down_proj": Shard(1), "model.layers.1.mlp.up_proj": Shard(0), "lm_head": Replicate()}

    def split(dtype: torch.dtype, seed: int = 0) -> torch.nn.Module:
        model, mesh = tiny_model("llama", dtype, seed), init_device_mesh("cpu", (2,))
        for name, layout in layouts.items():
            module = model.get_submodule(name)
            module.weight = torch.nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [layout]))
        return model

    def work(_rank: int) -> list:
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            model = split(dtype)
            apply_delta(model, tmp_path / "delta", any_dtype=dtype != torch.float32)
            found.append({name: model.get_submodule(name).weight.full_tensor().detach() for name in layouts})
        for model in (split(torch.float32, seed=1), split(torch.bfloat16)):
            before = model.lm_head.weight.full_tensor().clone()
            with pytest.raises(ValueError, match="belongs to"):
                apply_delta(model, tmp_path / "delta")
            assert torch.equal(model.lm_head.weight.full_tensor(), before)
        return found

    for part in together(2, work, tmp_path):
        assert not isinstance(part, BaseException), part
        for name in layouts:
            weight = editor.model.get_submodule(name).weight.detach()
            assert torch.equal(part[0][name], weight) and torch.equal(part[1][name], weight.bfloat16())
