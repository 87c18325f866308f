"""RECT and PRUNE against their formulas, written out."""

from __future__ import annotations

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.core import LowRankUpdate
from stableedit_cpp.editors import prune, rect
from support.editors import MODULES, assert_same_bits, make, state_of
from support.tiny import FACTS, tiny_model


@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_rect_keeps_the_entries_that_are_largest_beside_the_weight(layout):
    draw = torch.Generator().manual_seed(0)
    weight, left, right = (
        torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((6, 9), (6, 2), (2, 9))
    )
    found = rect(LowRankUpdate(left, right), weight.t() if layout == "conv1d" else weight, 0.4, layout).dense()
    change = left @ right
    ranked = sorted(((change / (weight + 1e-8)).abs().flatten()).tolist(), reverse=True)
    kept = (change / (weight + 1e-8)).abs() >= ranked[round(0.4 * 54) - 1]
    assert kept.sum() == round(0.4 * 54)
    assert torch.allclose(found, torch.where(kept, change, 0.0), rtol=0, atol=1e-12)
    whole = LowRankUpdate(left, right)
    assert rect(whole, weight, 1.0) is whole


def test_a_trained_turn_keeps_its_share(tokenizer):
    config = se.FineTuneConfig(edit_modules=MODULES[1:], epochs=1, keep_share=0.25)
    editor = se.FineTune(tiny_model("llama"), tokenizer, config, guard=None)
    editor.edit(FACTS, progress=False)
    for change in editor.weight_changes().values():
        assert (change != 0).sum() == change.numel() // 4
    with pytest.raises(ValueError, match="keep_share must be at most 1"):
        se.FineTuneConfig(keep_share=1.5)


def test_prune_restrains_singular_values_above_the_largest_of_the_weight(tokenizer):
    editor = make(tokenizer, tiny_model("llama", torch.float64), step_size=3.0)
    editor.edit(FACTS, progress=False)
    expected = {}
    for name, original in editor.original_weights().items():
        left, values, right = torch.linalg.svd(editor.weight_changes()[name], full_matrices=False)
        largest = torch.linalg.svdvals(original)[0]
        restrained = [float(v if v <= largest else v.log() - largest.log() + largest) for v in values]
        expected[name] = original + left @ torch.diag(torch.tensor(restrained, dtype=torch.float64)) @ right
        assert values[0] > largest  # there is something to do
    counts = prune(editor)
    for name, weight in expected.items():
        assert counts[name] > 0
        assert torch.allclose(editor.model.get_submodule(name).weight, weight, rtol=0, atol=1e-9)
    before = state_of(editor)
    editor.on_turn = print
    with pytest.raises(ValueError, match="followed turn by turn"):
        prune(editor)
    assert_same_bits(state_of(editor), before)
