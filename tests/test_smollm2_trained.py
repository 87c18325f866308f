"""LocFT on a real model with real facts: kept trunk outputs change nothing, and answers are the targets and end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import stableedit_cpp as se

ZSRE = Path(__file__).resolve().parents[2] / "shared" / "data" / "zsre"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ZSRE.is_dir(), reason=f"needs the ZsRE files in {ZSRE}"),
]


@pytest.fixture(scope="module")
def smollm2():
    return se.load_model("smollm2-135m", dtype=torch.float32)


@pytest.mark.parametrize("count", [6, 50])
def test_losses_with_and_without_kept_trunk_outputs(count, smollm2):
    model, tokenizer = smollm2
    requests = se.read_requests(ZSRE / "zsre_edit_5k.json", limit=count)
    config = se.FineTuneConfig.published(edit_modules=["model.layers.20.mlp.down_proj"], epochs=3 if count < 10 else 10)
    losses = []
    for kept in (True, False):
        editor = se.FineTune(model, tokenizer, config, guard=None)
        original = editor.checkpoint()
        if not kept:
            editor.trunk = None
        report = editor.edit(requests, progress=False)
        losses.append(report.turns[0].losses)
        if kept:
            assert editor.trunk.in_use
        original.restore()
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_answers_are_the_targets_and_end(smollm2):
    model, tokenizer = smollm2
    requests = se.read_requests(ZSRE / "zsre_edit_5k.json", limit=4)
    editor = se.FineTune(model, tokenizer, se.FineTuneConfig(chat_template=False), guard=None)
    original = editor.checkpoint()
    report = editor.edit(requests, outcomes=True, progress=False)
    scores = se.evaluate(
        model, tokenizer, requests, metrics=["generation"], chat_template=False, end_of_answer=True, progress=False
    )
    original.restore()
    assert not report.failed
    assert scores.means()["efficacy_free"] == 1.0
