"""A model that cannot go on from what its prompts have in common runs in full, and is right."""

from __future__ import annotations

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.evaluation.answers import answer_scores
from stableedit_cpp.model import prefix
from stableedit_cpp.model.trunk import TrunkCache
from support.headed import HEAD, MAX_TOKENS, Watch, assert_close, chats, chatting, logits_of, plain_logits, tiny_model
from support.unusual import UNUSUAL, unusual_model


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_models_are_right_or_stand_aside(name, tmp_path):
    model, pattern = unusual_model(name, tmp_path)
    chatting(model)
    sequences = chats()
    trunk = TrunkCache(model, se.find_modules(model, pattern))
    exact = plain_logits(model, sequences)
    tolerance = 0.02 if exact.dtype == torch.bfloat16 else 1e-5
    for cache in (None, trunk, trunk):
        assert_close(logits_of(model, sequences, trunk=cache), exact, tolerance)
    assert (prefix.objection(model) is not None) == (name in ("four streams", "list of states"))


def looks_at_its_first_token(_module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Of those that it is given, which are not always all."""
    return (args[0] + args[0][:, :1], *args[1:]), kwargs


def without_a_gradient_from_before(_module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Right in the forward pass alone: a token's gradient depends on how many are given."""
    return (args[0].detach() + (args[0] - args[0].detach()) * args[0].shape[1], *args[1:]), kwargs


@pytest.mark.parametrize(
    "hook, what", [(looks_at_its_first_token, "logits"), (without_a_gradient_from_before, "gradients")]
)
def test_a_model_that_cannot_go_on_from_a_prefix_runs_in_full(hook, what):
    model, sequences = tiny_model("llama"), chats()
    model.model.layers[2].register_forward_pre_hook(hook, with_kwargs=True)
    assert_close(logits_of(model, sequences), plain_logits(model, sequences))
    assert f"the {what} are others" in prefix.objection(model)
    watch = Watch(model)
    logits_of(model, sequences)
    assert len(HEAD) not in watch.seen


def test_an_error_on_the_way_is_no_error(monkeypatch):
    model, sequences = tiny_model("llama"), chats()

    def missing(**_how):
        raise NotImplementedError("no such cache")

    monkeypatch.setattr(prefix, "DynamicCache", missing)
    assert_close(logits_of(model, sequences), plain_logits(model, sequences))
    assert prefix.objection(model) == "NotImplementedError: no such cache"


def test_a_broken_model_is_put_to_the_proof_when_it_is_whole_again():
    model, sequences = tiny_model("llama"), chats()
    weight = model.model.layers[1].mlp.down_proj.weight
    before = weight.data.clone()
    weight.data[0, 0] = torch.nan
    assert answer_scores(model, sequences, max_tokens=MAX_TOKENS).accuracy.isnan().all()
    weight.data.copy_(before)
    assert prefix._objections[model] == {}
    assert_close(logits_of(model, sequences), plain_logits(model, sequences))
    assert prefix._objections[model] == {0: None}
