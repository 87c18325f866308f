"""Editors of tiny models, and everything that an edit may change."""

from __future__ import annotations

import torch

import stableedit_cpp as se
from stableedit_cpp.editors import turn as turns
from support.tiny import FACTS, tiny_model

MODULES = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
TURN = 5  # 13 facts: turns of 5, 5 and 3


def make(tokenizer, model=None, *, editor=se.StableEdit, config=se.StableEditConfig.one_pass, guard=None, **changes):
    """An editor of one pass without a guard, unless asked for: that of a random model has nothing to lose, and costs
    time."""
    model = tiny_model("llama") if model is None else model
    settings = {"edit_modules": MODULES, "step_size": 1e-2, "turn_size": TURN} | changes
    return editor(model, tokenizer, config(**settings), guard=guard)


def saved_on_the_way(tokenizer, directory, **config) -> tuple[se.StableEdit, se.StableEdit]:
    """An editor that was saved after five facts and went on, and one that went on from what was saved."""
    one, other = make(tokenizer, **config), make(tokenizer, **config)
    one.edit(FACTS[:5], progress=False)
    one.save(directory / "saved")
    one.edit(FACTS[5:], progress=False)
    loaded = se.StableEdit.load(other.model, tokenizer, directory / "saved")
    loaded.edit(FACTS[5:], progress=False)
    return one, loaded


def state_of(editor) -> dict[str, torch.Tensor]:
    """Everything an edit may change: the model, the masters, the running statistics."""
    state = {f"model {name}": tensor.detach().clone() for name, tensor in editor.model.state_dict().items()}
    for name, weight in editor.weights.items():
        state[f"master {name}"] = weight.master.clone()
    for group, normalizer in editor.normalizers.items():
        state[f"count {group}"] = torch.tensor(normalizer.count)
        for what, moments in (("key", normalizer.key_moments), ("value", normalizer.value_moments)):
            state[f"{what} mean {group}"], state[f"{what} m2 {group}"] = moments.mean(), moments.m2()
        if normalizer.value_tracker is not None:
            state[f"m {group}"], state[f"psi {group}"] = normalizer.value_tracker.mean(), normalizer.value_tracker.psi()
    return state


def assert_same_bits(state: dict, other: dict) -> None:
    assert state.keys() == other.keys()
    different = [name for name in state if not torch.equal(state[name], other[name])]
    assert not different


def weight_of(editor, name: str = MODULES[0]) -> torch.Tensor:
    return editor.model.get_submodule(name).weight.detach()


def on_call(monkeypatch, number: int, action) -> None:
    """Run ``action`` just before the ``number``-th capture (from 1); each turn or pass captures once."""
    calls, real = [], turns.capture

    def patched(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            action()
        return real(*args, **kwargs)

    monkeypatch.setattr(turns, "capture", patched)
