"""Another default dtype or device of torch changes nothing: every tensor we make says what and where it is.

"meta" is a trap for tensors that do not: they have no data there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors

import stableedit_cpp as se
from stableedit_cpp.lifelong import LifelongSession
from stableedit_cpp.lifelong.repair import repair
from support.editors import assert_same_bits
from support.tiny import FACTS, tiny_model

RECORDS = [
    {"id": f"f{number}", "rephrase": f"So {fact['prompt']}", "locality_prompt": "Sugar is", "locality_target": "sweet"}
    | fact
    for number, fact in enumerate(FACTS)
]
CONFIG = {"edit_modules": "model.layers.[12].mlp.down_proj", "step_size": 1e-2, "turn_size": 5}
METRICS = ("exact_match", "generation", "locality")


@contextmanager
def defaults(dtype: torch.dtype | None = None, device: str | None = None) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        if dtype is not None:
            torch.set_default_dtype(dtype)
        if device is not None:
            torch.set_default_device(device)
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


def others(test):
    test = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)(test)
    different = [{"dtype": torch.float64}, {"dtype": torch.bfloat16}, {"device": "meta"}]
    return pytest.mark.parametrize("different", different, ids=["float64", "bfloat16", "meta"])(test)


def trained(model, tokenizer) -> dict[str, torch.Tensor]:
    """By an editor with a hypernetwork."""
    editor = se.RLEdit(model, tokenizer, se.RLEditConfig(**CONFIG, rank=4, past_sample=2), guard=None)
    editor.train(RECORDS, progress=False)
    editor.edit(RECORDS)
    return {f"{part}/{name}": t.clone() for part, fields in editor.state_dict().items() for name, t in fields.items()}


def edited(model, tokenizer) -> tuple[dict[str, torch.Tensor], se.Scores]:
    config = se.StableEditConfig.one_pass(**CONFIG, max_passes=3, past_key_weight=0.05)
    editor = se.StableEdit(model, tokenizer, config)
    editor.warm_up(RECORDS[:4])
    editor.guard = se.LocalityGuard(editor, ["Sugar is"], limit=1e6)
    editor.edit(RECORDS)
    repair(editor, RECORDS, min_probability=0.9)
    editor.shrink(0.9)
    state = {f"{part}/{name}": t.clone() for part, fields in editor.state_dict().items() for name, t in fields.items()}
    reference = editor.unedited
    return state, se.evaluate(model, tokenizer, RECORDS, metrics=METRICS, reference=reference, trunk=editor.trunk)


@others
def test_edit_and_evaluate(dtype, different, tokenizer):
    model, usual = tiny_model("llama", dtype), tiny_model("llama", dtype)
    with defaults(**different):
        state, scores = edited(model, tokenizer)
    expected, expected_scores = edited(usual, tokenizer)
    assert_same_bits(state, expected)
    assert scores == expected_scores


@others
def test_training_of_a_hypernetwork(dtype, different, tokenizer):
    model, usual = tiny_model("llama", dtype), tiny_model("llama", dtype)
    with defaults(**different):
        state = trained(model, tokenizer)
    assert_same_bits(state, trained(usual, tokenizer))


@others
def test_session(dtype, different, tokenizer, tmp_path):
    """Begun, edited, closed, opened, reverted: under other defaults, and the journal is that of the usual ones."""
    states = []
    for name, context in (("different", defaults(**different)), ("usual", defaults())):
        model, again = tiny_model("llama", dtype), tiny_model("llama", dtype)
        with context:
            session = LifelongSession.create(tmp_path / name, model, tokenizer, se.StableEditConfig.one_pass(**CONFIG))
            session.edit(RECORDS)
            session.close()
            session = LifelongSession.open(tmp_path / name, again, tokenizer)
            session.revert(["f3"])
            session.rollback(1)
            states.append({n: weight.master.clone() for n, weight in session.editor.weights.items()})
            session.close()
    assert_same_bits(*states)


@pytest.mark.parametrize("path", sorted(Path(se.__file__).parent.rglob("*.py")), ids=lambda path: path.name)
def test_every_tensor_that_is_made_says_where_it_is(path):
    makers = {f"torch.{maker.__name__}" for maker in _device_constructors()}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and (made := ast.unparse(node.func)) in makers:
            named = {keyword.arg for keyword in node.keywords}
            assert named & {"device", None}, f"line {node.lineno}: {made} without a device"
