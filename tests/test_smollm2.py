"""The whole path on a real model with real facts: SmolLM2-135M and ZsRE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.editors import choice as choice_module

ZSRE = Path(__file__).resolve().parents[2] / "shared" / "data" / "zsre"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ZSRE.is_dir(), reason=f"needs the ZsRE files in {ZSRE}"),
]


@pytest.fixture(scope="module")
def smollm2():
    model, tokenizer = se.load_model("smollm2-135m", dtype=torch.float32)
    return model, tokenizer


@pytest.fixture(scope="module")
def edited(smollm2):
    """500 warm-up edits, then 1,000 edits in turns of 100, with one pass."""
    model, tokenizer = smollm2
    editor = se.StableEdit(
        model, tokenizer, se.StableEditConfig.one_pass(edit_modules=["model.layers.{22,24,26,28}.mlp.down_proj"])
    )
    original = {module.name: module.weight.detach().clone() for module in editor.modules}
    cache = se.TrunkCache(model, editor.modules)
    requests = se.read_requests(ZSRE / "zsre_edit_5k.json", limit=1000)
    before = se.evaluate(model, tokenizer, requests, chat_template=False, trunk=cache)
    editor.warm_up(se.read_requests(ZSRE / "zsre_train_5k.json", limit=500))
    report = editor.edit(requests)
    after = se.evaluate(model, tokenizer, requests, chat_template=False, trunk=cache)
    print(f"\nunedited\n{before}\nafter 1,000 edits at {report.edits_per_second:.1f} edits/s\n{after}")
    yield before, after, report
    with torch.no_grad():
        for module in editor.modules:
            module.weight.copy_(original[module.name])


def test_one_pass_edits_without_breaking(edited):
    before, after, _ = edited
    assert before.efficacy < 0.2
    assert after.efficacy >= 0.50
    assert after.generalization >= 0.44
    assert after.specificity >= 0.24


def test_every_turn_was_whitened_in_full_and_reported(edited):
    _, _, report = edited
    assert [turn.requests for turn in report.turns] == [100] * 10
    assert all(set(turn.whitening.values()) == {"full"} for turn in report.turns)
    assert all(0 < norm < 100 for turn in report.turns for norm in turn.update_norms.values())


def test_default_modules_are_those_of_the_published_depth(smollm2):
    assert se.default_edit_modules(smollm2[0]) == [f"model.layers.{n}.mlp.down_proj" for n in (22, 24, 26, 28)]


UNRELATED = ["What is the capital of Norway?", "How many hours has a day?", "Who wrote Hamlet?", "What is 7 plus 8?"]


@pytest.mark.parametrize("count, chat", [(1, True), (1, False), (20, True)])
def test_facts_take_with_nothing_to_tune(smollm2, count, chat):
    """One fact or twenty: the free answer is the target and stops, whatever was asked in which form; and what the model
    says elsewhere stays, beside the unedited model's own answers."""
    model, tokenizer = smollm2
    requests = se.read_requests(ZSRE / "zsre_edit_5k.json", limit=300 + count)[300:]
    editor = se.StableEdit(model, tokenizer, se.StableEditConfig(chat_template=chat))
    original = editor.original_weights()
    how = {"chat_template": chat, "reference": editor.unedited}
    try:
        report = editor.edit(requests)
        assert not report.failed
        scores = se.evaluate(model, tokenizer, requests, **how)
        assert scores["efficacy_free"].mean == 1.0
        others = [se.EditRequest(**requests[0].to_dict() | {"locality_prompt": text}) for text in UNRELATED]
        assert se.evaluate(model, tokenizer, others, **how)["locality_agreement"].mean >= 0.85
    finally:
        with torch.no_grad():
            for module in editor.modules:
                module.weight.copy_(original[module.name])


def test_which_modules_take_edits_best(monkeypatch):
    """A trial of a real model scores, takes itself back, and says that the last layers are better than the middle."""
    monkeypatch.setattr(choice_module, "_HEATS", ((8, 3),))
    model, tokenizer = se.load_model("smollm2-135m", dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    requests = se.read_requests(ZSRE / "zsre_edit_5k.json", limit=8)
    settings = {"step_size": "auto", "centred": False, "max_passes": 4, "end_of_answer": True, "chat_template": None}
    choice = se.choose_modules(model, tokenizer, requests, se.StableEditConfig(**settings), cached=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    trials = {trial.name: trial for trial in choice.trials}
    assert len(trials) == 5
    assert choice.chosen.taken > 0.7
    assert trials["MLP, middle third"].score < choice.chosen.score
