"""Closed loop, guard, repair and revert on models that a trunk cache must not take at its word.

With the cache, or with its standing aside, everything is bit for bit what it is without one.
"""

from __future__ import annotations

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.editors.guard import LocalityGuard
from stableedit_cpp.lifelong import LifelongSession
from stableedit_cpp.lifelong.repair import repair
from stableedit_cpp.model.running import batches
from support.captures import flags_of, sequences_of
from support.editors import assert_same_bits
from support.tiny import FACTS
from support.unusual import UNUSUAL, unusual_model

pytestmark = pytest.mark.parametrize("kind", UNUSUAL)


def closed_loop(pattern: str) -> se.StableEditConfig:
    return se.StableEditConfig.one_pass(
        edit_modules=pattern, step_size=1e-2, turn_size=5, max_passes=3, past_key_weight=0.05
    )


def weights_of(editor) -> dict[str, torch.Tensor]:
    return {name: weight.master.clone() for name, weight in editor.weights.items()}


def stream(kind, tokenizer, directory) -> tuple[dict[str, torch.Tensor], int]:
    """Weights after a closed loop under a guard, and how many requests are forgotten after a repair."""
    directory.mkdir()
    model, pattern = unusual_model(kind, directory)
    editor = se.StableEdit(model, tokenizer, closed_loop(pattern))
    editor.guard = LocalityGuard(editor, ["Sugar is", "A longer prompt about nothing"], limit=1e6)
    report = editor.edit(FACTS)
    assert all(turn.drift is not None and turn.passes > 1 for turn in report.turns)
    weights = {name: weight.master.clone() for name, weight in editor.weights.items()}
    repaired = repair(editor, FACTS, min_probability=0.5, rounds=2)
    scores = se.evaluate(model, tokenizer, FACTS, trunk=editor.make_trunk_cache())
    assert scores == se.evaluate(model, tokenizer, FACTS)
    return weights, len(repaired.after.forgotten)


def test_closed_loop_guard_and_repair(kind, tokenizer, tmp_path, monkeypatch):
    weights, forgotten = stream(kind, tokenizer, tmp_path / "with")
    monkeypatch.setattr(se.StableEdit, "make_trunk_cache", lambda _self: None)
    expected, expected_forgotten = stream(kind, tokenizer, tmp_path / "without")
    assert_same_bits(weights, expected)
    # A repair meets states that another batch has left, and they differ in the last bits between any two batches.
    assert forgotten == expected_forgotten


def test_the_cache_serves_or_says_why_not(kind, tokenizer, tmp_path):
    model, pattern = unusual_model(kind, tmp_path)
    cache, sequences = se.TrunkCache(model, se.find_modules(model, pattern)), sequences_of(tokenizer)
    plain, *cached = (
        [b.logits for b in batches(model, sequences, max_tokens=300, trunk=t)] for t in (None, cache, cache)
    )
    for logits in cached:
        assert all(torch.equal(mine, exact) for mine, exact in zip(logits, plain, strict=True))
    serves = UNUSUAL[kind][2]
    assert (cache.objection is None) == serves
    assert len(cache) == (len(sequences) if serves else 0)


def test_the_model_is_left_as_found(kind, tokenizer, tmp_path):
    """Gradient flags of parameters that accelerate replaces while they run included."""
    model, pattern = unusual_model(kind, tmp_path)
    flags = flags_of(model)
    se.StableEdit(model, tokenizer, closed_loop(pattern)).edit(FACTS[:3])
    assert flags_of(model) == flags


def test_revert(kind, tokenizer, tmp_path):
    (tmp_path / "weights").mkdir()
    model, pattern = unusual_model(kind, tmp_path / "weights")
    session = LifelongSession.create(tmp_path / "session", model, tokenizer, closed_loop(pattern))
    session.edit([fact | {"id": f"f{number}"} for number, fact in enumerate(FACTS)])
    before = session.editor.weight_changes()
    session.revert(["f3"])
    after = session.editor.weight_changes()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert [id for id, entry in session.history.entries.items() if not entry.current] == ["f3"]
    session.close()
