"""The frozen trunk cache: same scores, fewer layers, for every architecture."""

from __future__ import annotations

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.evaluation.answers import token_accuracy
from stableedit_cpp.model import trunk
from stableedit_cpp.model.capture import capture
from stableedit_cpp.model.running import answer_logits
from stableedit_cpp.model.tokens import collate, tokenize
from support.tiny import ARCHITECTURES, FACTS, pattern_of, tiny_model

RECORDS = [
    fact | {"rephrase": "Say: " + fact["prompt"], "locality_prompt": "Ice is", "locality_target": "cold"}
    for fact in FACTS
]


def sequences_of(tokenizer):
    return tokenize(tokenizer, [(f["prompt"], f["target"]) for f in FACTS], None, [str(i) for i in range(len(FACTS))])


def upper_modules(model, architecture):
    """All but the first layer's MLP output: the first layer is the trunk."""
    return se.find_modules(model, pattern_of(architecture))[1:]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_second_pass_skips_the_trunk_and_gives_the_same_logits(architecture, tokenizer):
    model = tiny_model(architecture)
    modules = upper_modules(model, architecture)
    cache = se.TrunkCache(model, modules)
    sequences = sequences_of(tokenizer)
    cache.check(sequences)
    assert cache.objection is None
    batch = collate(sequences, torch.device("cpu"))
    calls = []
    trunk_map = se.find_modules(model, pattern_of(architecture))[0].module
    trunk_map.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        plain = answer_logits(model, batch)
        first = answer_logits(model, batch, cache, sequences)
        assert len(calls) == 2 and len(cache) == len({s.ids for s in sequences})
        second = answer_logits(model, batch, cache, sequences)
    assert len(calls) == 2  # the trunk did not run
    assert torch.equal(first, plain) and torch.equal(second, plain)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_capture_with_a_filled_cache_is_the_same(architecture, tokenizer):
    model = tiny_model(architecture)
    modules = upper_modules(model, architecture)
    cache = se.TrunkCache(model, modules)
    sequences = sequences_of(tokenizer)
    token_accuracy(model, sequences, max_tokens=64, trunk=cache)
    plain = capture(model, modules, sequences, micro_batch=4, max_tokens=64)
    cached = capture(model, modules, sequences, micro_batch=4, max_tokens=64, trunk=cache)
    for module in modules:
        assert torch.equal(plain.keys[module.name], cached.keys[module.name])
        assert torch.equal(plain.value_gradients[module.name], cached.value_gradients[module.name])


def test_scores_of_an_edited_model_are_those_without_a_cache(tokenizer):
    model = tiny_model("llama")
    editor = se.StableEdit(
        model,
        tokenizer,
        se.StableEditConfig.one_pass(edit_modules=["model.layers.{1,2}.mlp.down_proj"], step_size=1e-2),
    )
    cache = se.TrunkCache(model, editor.modules)
    se.evaluate(model, tokenizer, RECORDS, trunk=cache)
    editor.edit(FACTS)
    cached = se.evaluate(model, tokenizer, RECORDS, trunk=cache)
    assert cached == se.evaluate(model, tokenizer, RECORDS)
    assert cached.efficacy > 0


def test_limit_stops_keeping_but_not_scoring(tokenizer):
    model = tiny_model("llama")
    sequences = sequences_of(tokenizer)
    cache = se.TrunkCache(model, upper_modules(model, "llama"), max_bytes=8192)
    plain = token_accuracy(model, sequences, max_tokens=64)
    for _ in range(2):
        assert torch.equal(token_accuracy(model, sequences, max_tokens=64, trunk=cache), plain)
    assert 0 < len(cache) < len(sequences) and cache.bytes <= 8192


def test_limit_below_one_prompt_is_refused(tokenizer):
    model = tiny_model("llama")
    cache = se.TrunkCache(model, upper_modules(model, "llama"), max_bytes=100)
    with pytest.raises(ValueError, match=r"cannot hold one prompt of .* tokens"):
        token_accuracy(model, sequences_of(tokenizer), max_tokens=512, trunk=cache)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj", "model.layers.0.input_layernorm", "model.embed_tokens"])
def test_changed_trunk_is_detected(tokenizer, name):
    model = tiny_model("llama")
    sequences = sequences_of(tokenizer)
    cache = se.TrunkCache(model, upper_modules(model, "llama"))
    token_accuracy(model, sequences, max_tokens=512, trunk=cache)
    weight = model.get_submodule(name).weight
    weight.data.view(-1)[3] += 1e-3
    with pytest.raises(ValueError, match="have changed since the trunk cache was filled"):
        token_accuracy(model, sequences, max_tokens=512, trunk=cache)
    cache.clear()
    assert torch.equal(
        token_accuracy(model, sequences, max_tokens=512, trunk=cache), token_accuracy(model, sequences, max_tokens=512)
    )


def test_capture_detects_changed_position_embeddings(tokenizer):
    model = tiny_model("gpt2")
    modules, sequences = upper_modules(model, "gpt2"), sequences_of(tokenizer)
    cache = se.TrunkCache(model, modules)
    capture(model, modules, sequences, micro_batch=4, max_tokens=64, trunk=cache)
    model.transformer.wpe.weight.data[5, 1] += 1e-3
    with pytest.raises(ValueError, match="have changed since the trunk cache was filled"):
        capture(model, modules, sequences, micro_batch=4, max_tokens=64, trunk=cache)


def test_a_turn_reads_the_weights_once(tokenizer, monkeypatch):
    """However many passes, checks and guarded prompts it has; and what changes between two turns is seen."""
    reads, real = [], trunk.checksum
    editor = se.StableEdit(
        tiny_model("llama"),
        tokenizer,
        se.StableEditConfig.one_pass(edit_modules="*.2.mlp.down_proj", max_passes=4, turn_size=13),
    )
    editor.guard = se.LocalityGuard(editor, ["Sugar is"], limit=1e6)
    monkeypatch.setattr(trunk, "checksum", lambda weight: reads.append(weight) or real(weight))
    cache = editor.make_trunk_cache()
    for _ in range(2):
        reads.clear()
        assert editor.edit(FACTS, trunk=cache).turns[0].passes == 4
        (embeddings,) = {id(weight) for weight in reads if weight is editor.model.model.embed_tokens.weight}
        assert [id(weight) for weight in reads].count(embeddings) == 1  # for the turn's cache, and for the guard's
    editor.model.model.embed_tokens.weight.data[5] += 1
    with pytest.raises(ValueError, match="have changed since the trunk cache was filled"):
        editor.edit(FACTS, trunk=cache)


def test_edited_first_layer_leaves_no_trunk():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="first layer is edited"):
        se.TrunkCache(model, se.find_modules(model, "model.layers.0.mlp.down_proj"))
    with pytest.raises(ValueError, match="no list of layers"):
        se.TrunkCache(model, se.find_modules(model, "lm_head"))
