"""``with editor.unedited():`` shows the original model and gives back the edited one, bit for bit."""

from __future__ import annotations

import os
import signal

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.files.digest import model_digest
from support.editors import MODULES, assert_same_bits, make, state_of
from support.tiny import FACTS, pattern_of, tiny_model

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INSIDE = r"the model shows its unedited weights here; leave `with editor\.unedited\(\):` to edit or export it"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(30).view(3, 10)).logits


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_original_inside_and_edited_after(tokenizer, architecture, dtype):
    model, original = tiny_model(architecture, dtype), tiny_model(architecture, dtype)
    editor = make(tokenizer, model, edit_modules=[pattern_of(architecture)])
    editor.warm_up(FACTS[:7])
    editor.edit(FACTS)
    before, edited_logits = state_of(editor), logits(model)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with editor.unedited() as shown:
        assert shown is model
        assert model_digest(model) == model_digest(original)
        assert torch.equal(logits(model), logits(original))
        assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert_same_bits(state_of(editor), before)
    assert torch.equal(logits(model), edited_logits)
    assert not torch.equal(edited_logits, logits(original))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_stream_goes_on_as_if_nothing_had_been(tokenizer, dtype):
    whole, looked_at = (make(tokenizer, tiny_model("llama", dtype)) for _ in range(2))
    whole.edit(FACTS)
    for begin in range(0, len(FACTS), 5):
        looked_at.edit(FACTS[begin : begin + 5])
        with looked_at.unedited():
            se.evaluate(looked_at.model, tokenizer, FACTS, progress=False)
    assert_same_bits(state_of(whole), state_of(looked_at))


def test_before_the_first_edit(tokenizer):
    editor = make(tokenizer)
    before = state_of(editor)
    with editor.unedited():
        assert_same_bits(state_of(editor), before)
    assert_same_bits(state_of(editor), before)
    editor.edit([])
    with editor.unedited():
        pass


def test_after_an_exception(tokenizer):
    editor = make(tokenizer)
    editor.edit(FACTS)
    before = state_of(editor)
    with pytest.raises(RuntimeError, match="broken"), editor.unedited():
        raise RuntimeError("broken")
    assert_same_bits(state_of(editor), before)


@pytest.fixture
def ctrl_c():
    """Ctrl-C raises: a shell starts what it runs in the background with it switched off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("moment", ["in the block", "while restoring"])
def test_after_ctrl_c(tokenizer, moment, monkeypatch, ctrl_c):
    editor = make(tokenizer)
    editor.edit(FACTS)
    before = state_of(editor)
    copy = torch.Tensor.copy_
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == len(MODULES) + 2:  # with one module back and two still to come
            os.kill(os.getpid(), signal.SIGINT)
        return copy(*args)

    with pytest.raises(KeyboardInterrupt), editor.unedited():
        if moment == "in the block":
            os.kill(os.getpid(), signal.SIGINT)
        calls += [1] * len(MODULES)
        monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    monkeypatch.undo()
    assert_same_bits(state_of(editor), before)


def test_nested(tokenizer):
    editor = make(tokenizer)
    editor.edit(FACTS)
    before, original = state_of(editor), model_digest(tiny_model("llama"))
    with editor.unedited():
        with editor.unedited():
            assert model_digest(editor.model) == original
        assert model_digest(editor.model) == original
        with pytest.raises(ValueError), editor.unedited():
            editor.edit(FACTS)
        assert model_digest(editor.model) == original
    assert_same_bits(state_of(editor), before)


@pytest.mark.parametrize("action", ["edit", "warm_up", "weight_changes", "original_weights"])
def test_editing_inside_is_refused(tokenizer, action):
    editor = make(tokenizer)
    editor.edit(FACTS[:5])
    before = state_of(editor)
    with editor.unedited():
        inside = state_of(editor)
        with pytest.raises(ValueError, match=INSIDE):
            getattr(editor, action)(*([FACTS] if "edit" in action or "warm" in action else []))
        with pytest.raises(ValueError, match="to keep its weights"):
            editor.keep_original_weights()
        assert_same_bits(state_of(editor), inside)
    assert_same_bits(state_of(editor), before)
    editor.edit(FACTS[5:])


def test_only_the_edited_modules_are_kept(tokenizer):
    """One copy of these, in host memory, and of nothing else."""
    editor = make(tokenizer, tiny_model("llama", torch.bfloat16))
    editor.edit(FACTS)
    kept = editor.original_weights()
    assert list(kept) == MODULES
    for module in editor.modules:
        assert kept[module.name].dtype == torch.bfloat16
        assert kept[module.name].device.type == "cpu"
        assert kept[module.name].untyped_storage().nbytes() == module.weight.nbytes
        assert torch.equal(kept[module.name], tiny_model("llama", torch.bfloat16).get_submodule(module.name).weight)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_changes(tokenizer, architecture, dtype):
    model = tiny_model(architecture, dtype)
    editor = make(tokenizer, model, edit_modules=[pattern_of(architecture)])
    assert all(change.count_nonzero() == 0 for change in editor.weight_changes().values())
    report = editor.edit(FACTS[:5])  # one turn
    for module in editor.modules:
        change = editor.weight_changes()[module.name]
        assert change.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert change.norm().item() == pytest.approx(report.turns[0].update_norms[module.name], rel=1e-4)
        original = tiny_model(architecture, dtype).get_submodule(module.name).weight
        torch.testing.assert_close((original.to(change.dtype) + change).to(dtype), module.weight)


def test_changes_smaller_than_the_rounding_of_the_weight(tokenizer):
    editor = make(tokenizer, tiny_model("llama", torch.bfloat16), step_size=1e-7)
    report = editor.edit(FACTS[:5])
    original = editor.original_weights()
    for module in editor.modules:
        assert torch.equal(module.weight, original[module.name])
        norm = report.turns[0].update_norms[module.name]
        assert editor.weight_changes()[module.name].norm().item() == pytest.approx(norm, rel=1e-2)


class TestGivenOriginals:
    def test_supplied(self, tokenizer):
        """A session opens on the base model, restores edited weights and says what the original ones were."""
        source = make(tokenizer)
        source.edit(FACTS)
        opened = make(tokenizer)
        opened.keep_original_weights()
        with torch.no_grad():
            for module, edited in zip(opened.modules, source.modules, strict=True):
                module.weight.copy_(edited.weight)
        with opened.unedited():
            assert model_digest(opened.model) == model_digest(tiny_model("llama"))
        assert model_digest(opened.model) == model_digest(source.model)
        again = make(tokenizer, opened.model)
        again.keep_original_weights(source.original_weights())
        again.edit(FACTS)
        with again.unedited():
            assert model_digest(again.model) == model_digest(tiny_model("llama"))

    def test_they_are_copied(self, tokenizer):
        editor = make(tokenizer)
        given = {module.name: module.weight.detach().clone() for module in editor.modules}
        editor.keep_original_weights(given)
        for weight in given.values():
            weight.zero_()
        editor.edit(FACTS)
        with editor.unedited():
            assert model_digest(editor.model) == model_digest(tiny_model("llama"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda weights: weights.pop(MODULES[0]), r"one tensor for each edited module \(model.layers.0"),
            (lambda weights: weights.update(more=torch.zeros(1)), "not for model.layers.0.*, more$"),
            (lambda weights: weights.update({MODULES[1]: torch.zeros(24, 16)}), r"must be \(16, 24\) torch.float32"),
            (
                lambda weights: weights.update({MODULES[1]: torch.zeros(16, 24).half()}),
                r"model.layers.1.mlp.down_proj must be .* as the module's, not \(16, 24\) torch.float16$",
            ),
        ],
    )
    def test_wrong(self, tokenizer, change, message):
        editor = make(tokenizer)
        weights = {module.name: module.weight.detach() for module in editor.modules}
        change(weights)
        with pytest.raises(ValueError, match=message):
            editor.keep_original_weights(weights)
        with editor.unedited():
            pass


class TestShrink:
    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_keeps_a_share_of_every_change(self, tokenizer, architecture, dtype):
        model = tiny_model(architecture, dtype)
        editor = make(tokenizer, model, edit_modules=[pattern_of(architecture)])
        editor.edit(FACTS)
        before, statistics = editor.weight_changes(), editor.state_dict()
        statistics = {name: dict(part) for name, part in statistics.items() if name != "weights"}
        editor.shrink(0.5)
        editor.shrink(0.8)
        for name, change in editor.weight_changes().items():
            torch.testing.assert_close(change, 0.4 * before[name])
            assert torch.equal(editor.weights[name].live, editor.weights[name].master.to(dtype))
        for name, part in statistics.items():
            assert all(torch.equal(tensor, part[field]) for field, tensor in editor.state_dict()[name].items())

    @pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
    def test_share_out_of_range(self, tokenizer, share):
        with pytest.raises(ValueError, match="share must be greater than 0 and at most 1, not"):
            make(tokenizer).shrink(share)

    def test_refused_where_it_would_be_missed(self, tokenizer):
        editor = make(tokenizer)
        editor.edit(FACTS)
        before = state_of(editor)
        with editor.unedited(), pytest.raises(ValueError, match="shows its unedited weights"):
            editor.shrink(0.5)
        editor.on_turn = print
        with pytest.raises(ValueError, match="followed turn by turn"):
            editor.shrink(0.5)
        assert_same_bits(state_of(editor), before)
