"""Running a model for its answers: batch by batch, and the model left as it was found."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.model import capture, running, trunk
from stableedit_cpp.model.running import batches
from stableedit_cpp.model.tokens import Batch, TokenSequence, collate
from support.captures import flags_of, sequences_of
from support.tiny import FACTS, tiny_model


def exact_logits(model, sequence: TokenSequence) -> torch.Tensor:
    """``[answer tokens, vocabulary]`` of the plain model, the sequence alone."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([sequence.ids])).logits[0, sequence.first :]


@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
@pytest.mark.parametrize("cached", [False, True])
def test_batches_give_every_answer_once(cached, max_tokens, tokenizer):
    model, sequences = tiny_model("gpt2", torch.float64), sequences_of(tokenizer)
    trunk = se.TrunkCache(model, se.find_modules(model, "transformer.h.2.mlp.c_proj")) if cached else None
    for half in (sequences[::2], sequences, sequences):  # the second time, half of them are in the cache
        seen = []
        for batch in batches(model, half, max_tokens=max_tokens, trunk=trunk):
            assert batch.sizes == [len(half[index].answer) for index in batch.indices]
            assert batch.labels.tolist() == [token for index in batch.indices for token in half[index].answer]
            exact = torch.cat([exact_logits(model, half[index]) for index in batch.indices])
            torch.testing.assert_close(batch.logits, exact, rtol=1e-9, atol=1e-9)
            seen += batch.indices
        assert sorted(seen) == list(range(len(half)))


def test_the_model_is_as_found_between_batches(tokenizer):
    model = tiny_model("llama").train()
    flags = flags_of(model)
    for _ in batches(model, sequences_of(tokenizer), max_tokens=40):
        assert flags_of(model) == flags
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not any("forward" in module.__dict__ for module in model.modules())


class Elsewhere(torch.Tensor):
    """A tensor of another device, as far as that can be shown on one: nothing can be done with it but to move it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function is torch.Tensor.to:
                return function(*args, **(kwargs or {})).as_subclass(torch.Tensor)
            if function in (torch.Tensor.__len__, torch.Tensor.shape.__get__, torch.Tensor.device.__get__):
                return function(*args)
        raise RuntimeError(f"{function.__name__}: indices should be either on cpu or on the same device")


def test_layers_on_several_devices(tokenizer, monkeypatch):
    """Positions and labels come to where the layer is that is read: the last one need not be where the first one is."""

    def collated_elsewhere(*args, **kwargs) -> Batch:
        batch = collate(*args, **kwargs)
        elsewhere = {name: getattr(batch, name).as_subclass(Elsewhere) for name in ("positions", "labels")}
        return dataclasses.replace(batch, **elsewhere)

    def edited() -> tuple[dict[str, torch.Tensor], se.Scores]:
        config = se.StableEditConfig.one_pass(
            edit_modules="model.layers.[12].mlp.down_proj", step_size=1e-2, max_passes=3
        )
        editor = se.StableEdit(tiny_model("llama"), tokenizer, config)
        editor.edit(FACTS)
        scores = se.evaluate(editor.model, tokenizer, FACTS)
        return {name: weight.master for name, weight in editor.weights.items()}, scores

    with pytest.raises(RuntimeError, match="on the same device"):
        torch.zeros(3)[torch.tensor([0]).as_subclass(Elsewhere)]
    weights, scores = edited()
    for module in (running, trunk, capture):
        monkeypatch.setattr(module, "collate", collated_elsewhere)
    weights_there, scores_there = edited()
    assert all(torch.equal(weight, weights_there[name]) for name, weight in weights.items())
    assert scores == scores_there
