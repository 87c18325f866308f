"""The targets z: all of a turn at once give what a plain loop over single requests gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stableedit_cpp.editors.targets import find_targets
from stableedit_cpp.errors import ModelBroken
from stableedit_cpp.model.prefixes import pack_behind
from stableedit_cpp.model.tokens import TokenSequence
from stableedit_cpp.model.trunk import TrunkCache
from support.captures import flags_of
from support.located import FACTS, layer_module, located, options, plain_target
from support.tiny import tiny_model, tiny_tokenizer

LAYERS = {"gpt2": "transformer.h", "llama": "model.layers"}
NAMES = [f"request {number}" for number in range(len(FACTS))]


def found(model, architecture, facts, how, *, max_tokens=200, cached=True):
    name = LAYERS[architecture]
    trunk = TrunkCache(model, [layer_module(model, f"{name}.2")]) if cached else None
    layer = model.get_submodule(f"{name}.2")
    targets = find_targets(model, layer, facts, how, names=NAMES, max_tokens=max_tokens, trunk=trunk)
    assert not cached or trunk.in_use
    return targets


# The first steps of Adam are of one length whatever the gradient, so that rounding counts for more than it is.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-6)])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_they_are_those_of_a_plain_loop_over_single_requests(architecture, bos, dtype, tolerance):
    model, tokenizer, how = tiny_model(architecture, dtype), tiny_tokenizer(bos=bos), options()
    facts = located(tokenizer)
    targets = found(model, architecture, facts, how)
    below = model.get_submodule(f"{LAYERS[architecture]}.1")
    for number, fact in enumerate(facts):
        z, steps, loss = plain_target(model, below, fact, how)
        assert (targets.z[number] - z).norm() <= tolerance * z.norm()
        assert int(targets.steps[number]) == steps
        assert float(targets.losses[number]) == pytest.approx(loss, rel=1e-4)


def test_a_request_that_is_done_stays_as_it_is_while_others_go_on():
    model, tokenizer = tiny_model("gpt2", torch.float64), tiny_tokenizer()
    facts, how = (
        located(tokenizer),
        options(target_loss=5.7, target_steps=12, target_clamp=10, target_decay=0.0, target_kl=0.0),
    )
    targets = found(model, "gpt2", facts, how)
    assert len(set(targets.steps.tolist())) > 1
    assert (targets.losses < 5.7).any()
    below = model.get_submodule("transformer.h.1")
    for number, fact in enumerate(facts):
        z, steps, _ = plain_target(model, below, fact, how)
        assert int(targets.steps[number]) == steps
        assert (targets.z[number] - z).norm() <= 1e-9 * z.norm()


@pytest.mark.parametrize("max_tokens", [1, 60, 4000])
def test_neither_the_company_nor_the_trunk_cache_matters(max_tokens):
    model, how = tiny_model("llama", torch.float64), options()
    facts = located(tiny_tokenizer())
    exact = found(model, "llama", facts, how)
    other = found(model, "llama", facts, how, max_tokens=max_tokens, cached=max_tokens == 60)
    alone = found(model, "llama", facts[2:3], how)
    assert torch.allclose(other.z, exact.z, rtol=1e-6, atol=1e-7)
    assert torch.allclose(alone.z, exact.z[2:3], rtol=1e-6, atol=1e-7)


def test_delta_is_held_within_its_bound():
    model, how = tiny_model("gpt2"), options(target_clamp=0.1)
    targets = found(model, "gpt2", located(tiny_tokenizer()), how)
    lengths, bound = (targets.z - targets.z0).norm(dim=1), 0.1 * targets.z0.norm(dim=1)
    assert (lengths <= bound * 1.0001).all()
    assert (lengths > 0.5 * bound).all()


def test_one_step_is_a_look_only():
    model = tiny_model("gpt2")
    targets = found(model, "gpt2", located(tiny_tokenizer()), options(target_steps=1))
    assert torch.equal(targets.z, targets.z0)
    assert targets.steps.sum() == 0
    assert torch.isfinite(targets.losses).all()


def test_the_model_is_left_as_it_was_found():
    model = tiny_model("llama").train()
    before = flags_of(model)
    found(model, "llama", located(tiny_tokenizer()), options(target_steps=3))
    assert flags_of(model) == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_half_precision_is_searched_in_float32():
    model = tiny_model("llama", torch.bfloat16)
    targets = found(model, "llama", located(tiny_tokenizer()), options(target_steps=3))
    assert targets.z.dtype == torch.float32
    assert torch.isfinite(targets.z).all()


def test_a_broken_model_is_refused_by_name():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(ModelBroken, match="request 0: the loss of its target"):
        found(model, "llama", located(tiny_tokenizer()), options(), cached=False)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral", "gptj", "gpt_neox", "falcon", "opt", "mpt"])
def test_what_comes_before_the_subject_ends_is_run_once(architecture, monkeypatch):
    """Where a model goes on from it; others run in full."""
    model = tiny_model(architecture, torch.float64)
    name = {"falcon": "transformer.h", "opt": "model.decoder.layers", "mpt": "transformer.blocks"}.get(architecture)
    name = (
        name
        or {"gptj": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(architecture)
        or LAYERS.get(architecture, "model.layers")
    )
    facts, how = located(tiny_tokenizer()), options(target_steps=4)
    layer = model.get_submodule(f"{name}.2")
    search = {"names": NAMES, "max_tokens": 300}
    tokens = []
    count = lambda _module, _args, how: tokens.append(how["input_ids"].numel())  # noqa: E731
    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    exact = find_targets(model, layer, facts, how, **search)
    full = sum(tokens)
    tokens.clear()
    trunk = TrunkCache(model, [layer_module(model, f"{name}.2")])
    fast = find_targets(model, layer, facts, how, trunk=trunk, **search)
    handle.remove()
    assert torch.allclose(fast.z, exact.z, rtol=1e-5, atol=1e-6)
    if architecture in ("gpt2", "llama"):
        assert trunk.in_use
        assert sum(tokens) < 0.8 * full


@given(
    shapes=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=30), budget=st.integers(1, 60)
)
def test_batches_behind_prefixes_hold_every_sequence_once_and_no_more_tokens_than_asked(shapes, budget):
    sequences = [TokenSequence(tuple(range(skip + rest)), (0,)) for skip, rest in shapes]
    skips = [skip for skip, _ in shapes]
    batches = pack_behind(sequences, skips, budget, torch.device("cpu"))
    assert sorted(index for indices, _ in batches for index in indices) == list(range(len(shapes)))
    for indices, skip in batches:
        assert skip == min(skips[index] for index in indices)
        size = len(indices) * (max(len(sequences[index]) for index in indices) - skip)
        assert size <= budget or len(indices) == 1


def test_a_trunk_cache_without_room_for_all_changes_nothing():
    model, how = tiny_model("llama", torch.float64), options()
    facts = located(tiny_tokenizer())
    exact = found(model, "llama", facts, how, cached=False)
    layer = model.get_submodule("model.layers.2")
    trunk = TrunkCache(model, [layer_module(model, "model.layers.2")], max_bytes=30_000)
    other = find_targets(model, layer, facts, how, names=NAMES, max_tokens=200, trunk=trunk)
    assert 0 < len(trunk) < sum(len(fact.texts) + 1 for fact in facts)
    assert torch.allclose(other.z, exact.z, rtol=1e-6, atol=1e-7)
