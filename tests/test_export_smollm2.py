"""The exports of a real model: SmolLM2-135M learns a few facts and is shipped in each form."""

from __future__ import annotations

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.export import Provenance, apply_delta, change_of, export_delta, export_lora
from stableedit_cpp.files.digest import model_digest
from support.exports import logits

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.slow

FACTS = [
    {"prompt": "The capital of Australia is", "target": "Sydney"},
    {"prompt": "The author of Faust is", "target": "Schiller"},
    {"prompt": "The highest mountain of Japan is", "target": "Aso"},
    {"prompt": "The river through Cairo is the", "target": "Congo"},
]
PROVENANCE = Provenance(base_model="smollm2-135m", edits=len(FACTS))


@pytest.fixture(scope="module")
def smollm2():
    """(editor after a few passes over the facts, digest of the unedited model)."""
    model, tokenizer = se.load_model("smollm2-135m", dtype=torch.float32)
    digest = model_digest(model)
    editor = se.StableEdit(model, tokenizer, se.StableEditConfig.one_pass(max_passes=6, step_size=1.2e-3, ridge=300.0))
    editor.edit(FACTS, progress=False)
    return editor, digest


def base() -> torch.nn.Module:
    return se.load_model("smollm2-135m", dtype=torch.float32)[0]


def efficacy(model, tokenizer) -> float:
    return se.evaluate(model, tokenizer, FACTS, chat_template=False, progress=False).efficacy


def test_unedited(smollm2):
    editor, digest = smollm2
    edited = model_digest(editor.model)
    answers = se.generate(editor.model, editor.tokenizer, [FACTS[0]["prompt"]], chat_template=False)
    with editor.unedited() as model:
        assert model_digest(model) == digest
        assert se.generate(model, editor.tokenizer, [FACTS[0]["prompt"]], chat_template=False) != answers
    assert model_digest(editor.model) == edited != digest


def test_delta(smollm2, tmp_path):
    editor, digest = smollm2
    change = change_of(editor)
    assert change.base_digest == digest
    export_delta(change, tmp_path / "delta", provenance=PROVENANCE)
    model = base()
    apply_delta(model, tmp_path / "delta")
    assert model_digest(model) == model_digest(editor.model)
    with pytest.raises(ValueError, match="belongs to another base model"):
        apply_delta(model, tmp_path / "delta")


def test_lora(smollm2, tmp_path):
    """Four facts with a token or two each, six passes: the change is of low rank, and a small adapter is all of it."""
    editor, _ = smollm2
    report = export_lora(change_of(editor), tmp_path / "adapter", keep=0.999, provenance=PROVENANCE)
    assert report.rank < 64
    adapted = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert efficacy(adapted, editor.tokenizer) == efficacy(editor.model, editor.tokenizer) > 0.7
    difference = (logits(adapted) - logits(editor.model)).abs().max()
    assert difference < 0.05 * (logits(base()) - logits(editor.model)).abs().max()
