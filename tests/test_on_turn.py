"""The hook through which a turn that was applied can be recorded, and refused."""

from __future__ import annotations

import pytest
import torch

from stableedit_cpp.core import MasterWeight
from support.editors import MODULES, assert_same_bits, make, state_of, weight_of
from support.tiny import FACTS, tiny_model


def recorded(editor, requests, call="edit") -> list:
    turns: list = []
    editor.on_turn = turns.append
    getattr(editor, call)(requests)
    return turns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("passes", [1, 3])
def test_replaying_the_passes_gives_the_same_weights(passes, dtype, tokenizer):
    editor = make(tokenizer, tiny_model("llama", dtype), max_passes=passes)
    turns = recorded(editor, FACTS)
    assert [len(turn.requests) for turn in turns] == [5, 5, 3]
    assert [len(turn.passes) for turn in turns] == [turn.report.passes for turn in turns]
    other = tiny_model("llama", dtype)
    for name in MODULES:
        weight = MasterWeight(other.get_submodule(name).weight, "linear", exact_revert=False)
        for turn in turns:
            for applied in turn.passes:
                weight.apply(applied.updates[name])
        assert torch.equal(weight.live, weight_of(editor, name))


def test_rows_belong_to_the_requests(tokenizer):
    """Every request owns as many rows as its answer has tokens, also in a pass that only some of them take part in."""
    editor = make(tokenizer, max_passes=3)
    (turn,) = recorded(editor, FACTS[:5])
    assert turn.kind == "edit"
    assert [request.target for request in turn.requests] == [fact["target"] for fact in FACTS[:5]]
    for applied in turn.passes:
        for update in applied.updates.values():
            assert update.rank == len(applied.request)
        for index in applied.request.unique().tolist():
            answer = tokenizer(" " + FACTS[index]["target"], add_special_tokens=False)["input_ids"]
            assert int((applied.request == index).sum()) == len(answer)


def test_warm_up_says_so(tokenizer):
    assert {turn.kind for turn in recorded(make(tokenizer), FACTS, "warm_up")} == {"warm_up"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_refused_turn_is_taken_back(dtype, tokenizer):
    editor = make(tokenizer, tiny_model("llama", dtype))
    editor.edit(FACTS[:5])
    before = state_of(editor)

    def refuse(_turn) -> None:
        raise OSError("no space left")

    editor.on_turn = refuse
    with pytest.raises(OSError, match="no space left"):
        editor.edit(FACTS[5:])
    assert_same_bits(state_of(editor), before)
    editor.on_turn = None
    editor.edit(FACTS[5:])
    whole = make(tokenizer, tiny_model("llama", dtype))
    whole.edit(FACTS)
    assert_same_bits(state_of(editor), state_of(whole))
