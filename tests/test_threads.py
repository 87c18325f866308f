"""Another thread that runs the model while we capture, evaluate or edit sees the plain model; and ours take turns."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.evaluation.answers import token_accuracy
from stableedit_cpp.model.capture import capture
from stableedit_cpp.model.running import batches
from stableedit_cpp.model.untouched import untouched
from support.captures import flags_of, sequences_of
from support.tiny import FACTS, tiny_model

MODULES = "model.layers.[12].mlp.down_proj"
PROMPT = torch.tensor([[5, 6, 7, 8]])


def in_another_thread(function: Callable[[], object]) -> object:
    """Its result; an error in it is raised here."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert found, "the other thread does not come back"
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def serve(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROMPT).logits


@pytest.mark.parametrize("where", ["model.layers.0", "model.layers.2.mlp.down_proj", "lm_head"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_serving_thread_sees_the_plain_model(cached, where, tokenizer):
    """It runs the model in the middle of a capture's forward pass: all hooks and replaced forwards are in place."""
    model, sequences = tiny_model("llama"), sequences_of(tokenizer)
    modules = se.find_modules(model, MODULES)
    cache = se.TrunkCache(model, modules)
    alone = serve(model)
    expected = capture(model, modules, sequences, micro_batch=5, max_tokens=1000)
    if cached:
        token_accuracy(model, sequences, max_tokens=1000, trunk=cache)
        assert len(cache) == len(sequences)
    served: list[torch.Tensor] = []

    def meanwhile(*_: object) -> None:
        if not served and threading.current_thread() is threading.main_thread():
            served.append(in_another_thread(lambda: serve(model)))

    model.get_submodule(where).register_forward_pre_hook(meanwhile)
    captured = capture(model, modules, sequences, micro_batch=5, max_tokens=1000, trunk=cache if cached else None)
    assert torch.equal(served[0], alone)
    for module in modules:
        assert torch.equal(captured.keys[module.name], expected.keys[module.name])
        assert torch.equal(captured.value_gradients[module.name], expected.value_gradients[module.name])


def test_a_serving_thread_beside_a_stream(tokenizer):
    """Every answer is that of a model with some of the modules' updates applied: finite, and no error."""
    model = tiny_model("llama")
    editor = se.StableEdit(
        model, tokenizer, se.StableEditConfig.one_pass(edit_modules=MODULES, step_size=1e-2, turn_size=3, max_passes=3)
    )
    stop, failed, served = threading.Event(), [], []

    def serving() -> None:
        while not stop.is_set():
            try:
                served.append(bool(serve(model).isfinite().all()))
            except BaseException as error:
                failed.append(error)
                return

    thread = threading.Thread(target=serving)
    thread.start()
    try:
        editor.edit(FACTS * 3)
    finally:
        stop.set()
        thread.join(60)
    assert not failed and len(served) > 10 and all(served)


def test_two_of_our_threads_take_turns(tokenizer):
    """Flags and forwards are as found in the end, and each gets its own result."""
    model = tiny_model("gpt2").train()  # with dropout, which must be off for both
    flags, sequences = flags_of(model), sequences_of(tokenizer)
    found: list[list[torch.Tensor]] = []

    def score() -> None:
        found.extend([batch.logits for batch in batches(model, sequences, max_tokens=200)] for _ in range(10))

    score()
    expected = found.pop()
    found.clear()

    threads = [threading.Thread(target=score) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 30
    assert all(torch.equal(mine, exact) for logits in found for mine, exact in zip(logits, expected, strict=True))
    assert flags_of(model) == flags
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in model.modules())


def test_one_thread_may_enter_twice(tokenizer):
    model = tiny_model("llama")
    with untouched(model), untouched(model):
        pass
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_compiled_model_is_edited_as_it_is_written(wrapped, tokenizer):
    """Not compiled anew for each replaced linear map, which took a minute; and it serves compiled again afterwards."""
    compiled: list[int] = []

    def backend(graph, _inputs):
        compiled.append(1)
        return graph.forward

    model, config = tiny_model("llama"), se.StableEditConfig.one_pass(edit_modules="*" + MODULES, step_size=1e-2)
    if wrapped:
        served = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
        served = model
    serve(served)
    before = len(compiled)
    assert before > 0
    editor, plain = se.StableEdit(served, tokenizer, config), se.StableEdit(tiny_model("llama"), tokenizer, config)
    assert editor.edit(FACTS[:3]).edits == plain.edit(FACTS[:3]).edits == 3
    assert len(compiled) == before
    for name, weight in plain.weights.items():
        prefix = "_orig_mod." if wrapped else ""
        assert torch.equal(editor.weights[prefix + name].master, weight.master)
    torch.testing.assert_close(serve(served), serve(plain.model))
