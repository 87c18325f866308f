"""LoRA adapters: peft loads them, and base and adapter together are the edited model up to what was cut off."""

from __future__ import annotations

import json
import sys
import warnings

import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard

import stableedit_cpp as se
from stableedit_cpp.core import LowRankUpdate, Patch, WeightChange
from stableedit_cpp.export import (
    Provenance,
    change_between,
    change_from_patch,
    change_of,
    evaluate_change,
    export_lora,
    rank_for_efficacy,
)
from stableedit_cpp.files.digest import model_digest
from support.exports import TAKES, edited, facts_of, load_as_the_card_says, logits
from support.tiny import ARCHITECTURES, FACTS, save_tiny, tiny_model

peft = pytest.importorskip("peft")
FULL = 16  # the rank of a [16, 24] matrix


def loaded(model, directory) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns where names or fan_in_fan_out do not fit
        return peft.PeftModel.from_pretrained(model, directory)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_rank_is_the_edited_model(tmp_path, architecture):
    editor = edited(architecture)
    report = export_lora(change_of(editor), tmp_path / "adapter", rank=FULL)
    assert report.kept_norm == pytest.approx(1.0)
    adapted = loaded(tiny_model(architecture), tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted), logits(editor.model), rtol=1e-4, atol=2e-4)
    assert (logits(editor.model) - logits(tiny_model(architecture))).abs().max() > 0.1
    merged = adapted.merge_and_unload()
    for module in editor.modules:
        torch.testing.assert_close(merged.get_submodule(module.name).weight, module.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [1, 5])
def test_lower_rank_is_the_nearest(tmp_path, architecture, rank):
    editor = edited(architecture)
    report = export_lora(change_of(editor), tmp_path / "adapter", rank=rank)
    merged = loaded(tiny_model(architecture), tmp_path / "adapter").merge_and_unload()
    whole = kept = 0.0
    for module in editor.modules:
        change = editor.weight_changes()[module.name].double()
        u, s, vh = torch.linalg.svd(change)
        nearest = (u[:, :rank] * s[:rank]) @ vh[:rank]
        original = editor.original_weights()[module.name]
        torch.testing.assert_close(merged.get_submodule(module.name).weight, (original + nearest).float())
        whole, kept = whole + s.square().sum(), kept + s[:rank].square().sum()
        expected = (s[:rank].norm() / s.norm()).item()
        assert report.modules[module.name]["kept_norm"] == pytest.approx(expected, rel=1e-5)
    assert report.kept_norm == pytest.approx((kept / whole).sqrt().item(), rel=1e-5)


def test_files(tmp_path):
    editor = edited(modules=["model.layers.{0,2}.mlp.down_proj", "model.layers.1.mlp.up_proj"])
    provenance = Provenance(base_model="tiny", config=editor.config)
    report = export_lora(change_of(editor), tmp_path / "adapter", rank=3, provenance=provenance)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    names = [module.name for module in editor.modules]
    assert config["target_modules"] == names
    assert (config["r"], config["lora_alpha"], config["peft_type"], config["bias"]) == (3, 3, "LORA", "none")
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "tiny")
    assert not config["fan_in_fan_out"]
    tensors = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {}
    for module in editor.modules:
        k, v = module.shape
        expected[f"base_model.model.{module.name}.lora_A.weight"] = (3, k)
        expected[f"base_model.model.{module.name}.lora_B.weight"] = (v, 3)
    assert shapes == expected
    assert report.bytes == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    facts = facts_of(tmp_path / "adapter")
    assert (facts["kind"], facts["rank"], facts["bytes"]) == ("lora", 3, report.bytes)
    assert facts["modules"] == report.modules
    # What peft itself would have written.
    loaded(tiny_model("llama"), tmp_path / "adapter").save_pretrained(tmp_path / "again")
    again = safetensors.torch.load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_conv1d(tmp_path):
    """GPT-2's weights lie transposed; one model may hold both kinds."""
    editor = edited("gpt2")
    export_lora(change_of(editor), tmp_path / "adapter", rank=2)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"]
    base, both = tiny_model("gpt2"), tiny_model("gpt2")
    with torch.no_grad():
        both.transformer.h[0].mlp.c_proj.weight.add_(0.1)
        both.lm_head.weight.add_(0.1)
    change = change_between(base, both)
    assert [part.layout for part in change.modules.values()] == ["conv1d", "linear"]
    export_lora(change, tmp_path / "mixed", rank=1)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "mixed")
    torch.testing.assert_close(logits(adapted), logits(both), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(tmp_path, dtype):
    editor = edited(dtype=dtype)
    export_lora(change_of(editor), tmp_path / "own", rank=FULL)
    export_lora(change_of(editor), tmp_path / "float32", rank=FULL, dtype=torch.float32)
    for name, expected in (("own", dtype), ("float32", torch.float32)):
        tensors = safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {expected}
        merged = loaded(tiny_model("llama", dtype), tmp_path / name).merge_and_unload()
        for module in editor.modules:
            # One rounding of the weight and two of the factors.
            close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
            torch.testing.assert_close(merged.get_submodule(module.name).weight, module.weight, **close)


@pytest.mark.parametrize("keep", [0.8, 0.9, 0.99])
def test_share_of_the_norm(tmp_path, keep):
    change = change_of(edited())
    report = export_lora(change, tmp_path / "adapter", keep=keep)
    assert report.kept_norm >= keep
    assert report.rank < FULL
    less = export_lora(change, tmp_path / "less", rank=report.rank - 1)
    assert less.kept_norm < keep
    assert less.bytes < report.bytes


def test_from_factors(tmp_path):
    """A patch of libstableedit becomes an adapter without a dense difference."""
    base = tiny_model("llama")
    names = ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    torch.manual_seed(0)
    factors = [LowRankUpdate(torch.randn(16, r), torch.randn(r, 24)) for r in (4, 2)]
    patch = Patch(
        {name: WeightChange(update) for name, update in zip(names, factors, strict=True)},
        base_digest=model_digest(base),
    )
    change = change_from_patch(base, patch)
    assert model_digest(base) == change.base_digest
    report = export_lora(change, tmp_path / "adapter", keep=1.0)
    assert report.rank == 4
    merged = loaded(tiny_model("llama"), tmp_path / "adapter").merge_and_unload()
    for name, update in zip(names, factors, strict=True):
        expected = base.get_submodule(name).weight.detach() + update.dense()
        torch.testing.assert_close(merged.get_submodule(name).weight.detach(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(change.tensors[f"{name}.weight"], expected)
    with pytest.raises(ValueError, match="the patch was made for another base model"):
        change_from_patch(tiny_model("llama", seed=1), patch)
    elsewhere = Patch({"model.layers.9.mlp.down_proj": patch.modules[names[0]]})
    with pytest.raises(ValueError, match=r"the patch changes model\.layers\.9\.mlp\.down_proj, which"):
        change_from_patch(base, elsewhere)


def test_card(tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base")
    editor = edited()
    scores = {"efficacy": 0.5, "generalization": 0.25, "specificity": None}
    provenance = Provenance(base_model=str(base), scores={"edited": scores, "exported": scores})
    export_lora(change_of(editor), tmp_path / "adapter", rank=FULL, provenance=provenance)
    adapted = load_as_the_card_says(tmp_path / "adapter", monkeypatch)
    torch.testing.assert_close(logits(adapted), logits(editor.model), rtol=1e-4, atol=2e-4)
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", str(base))
    assert "it keeps 100.0 % of the norm" in card.text
    assert "| edited | 0.500 | 0.250 | - |" in card.text


def test_other_tensors_are_refused(tmp_path):
    base, other = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        other.model.norm.weight.add_(1)
        other.model.layers[0].mlp.down_proj.weight.add_(1)
    with pytest.raises(ValueError, match=r"a LoRA adapter holds .* but model\.norm\.weight changed as well"):
        export_lora(change_between(base, other), tmp_path / "adapter", rank=1)
    assert list(tmp_path.iterdir()) == []


def test_without_peft(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="install it with: pip install peft"):
        export_lora(change_of(edited()), tmp_path / "adapter", rank=1)
    assert list(tmp_path.iterdir()) == []


class TestScores:
    def test_whole_change_scores_as_the_edited_model(self, tokenizer):
        editor = edited(**TAKES)
        change = change_of(editor)
        requests = [se.EditRequest(**fact) for fact in FACTS]
        expected = se.evaluate(editor.model, tokenizer, requests, progress=False)
        before = model_digest(editor.model)
        with editor.unedited() as base:
            plain = se.evaluate(base, tokenizer, requests, progress=False)
            found = evaluate_change(base, tokenizer, change.modules, requests, progress=False)
            assert model_digest(base) == change.base_digest
        assert found == expected
        assert found.efficacy > plain.efficacy
        assert model_digest(editor.model) == before

    def test_rank_for_efficacy(self, tokenizer, tmp_path):
        editor = edited(**TAKES)
        change = change_of(editor)
        requests = [se.EditRequest(**fact) for fact in FACTS]
        base = tiny_model("llama")
        rank, tried = rank_for_efficacy(base, tokenizer, change, requests, keep=0.95, progress=False)
        assert model_digest(base) == change.base_digest
        assert tried[rank] >= 0.95 * tried[FULL]
        assert 1 < rank < FULL
        assert tried[rank - 1] < 0.95 * tried[FULL]
        # The adapter as peft loads it has the efficacy that was promised.
        export_lora(change, tmp_path / "adapter", rank=rank)
        adapted = loaded(tiny_model("llama"), tmp_path / "adapter")
        assert se.evaluate(adapted, tokenizer, requests, progress=False).efficacy == pytest.approx(tried[rank])

    @pytest.mark.parametrize("keep", [0, 1.5, -1, float("nan")])
    def test_wrong_share(self, tokenizer, keep):
        with pytest.raises(ValueError, match="keep must be a share of the efficacy above 0 and up to 1"):
            rank_for_efficacy(tiny_model("llama"), tokenizer, change_of(edited()), [], keep=keep)
