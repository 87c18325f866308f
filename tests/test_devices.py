"""Editors of tiny models on every device and in every dtype, beside the same on the CPU."""

from __future__ import annotations

import threading

import pytest
import torch
from accelerate import dispatch_model

import stableedit_cpp as se
from support.devices import of_its_own, on_devices
from support.editors import MODULES, make, weight_of
from support.tiny import FACTS, tiny_model

pytestmark = on_devices
# What one turn after another makes of differences in the last bits, of the weight's change.
CLOSE = {torch.float64: 1e-7, torch.float32: 2e-2, torch.bfloat16: 0.2, torch.float16: 0.1}


def edited(tokenizer, device: str, dtype: torch.dtype = torch.float32, model=None, **changes) -> se.Editor:
    model = tiny_model("llama", dtype).to(device) if model is None else model
    one = make(tokenizer, model, **changes)
    one.edit(FACTS, progress=False)
    return one


def change_of(editor: se.Editor) -> torch.Tensor:
    return torch.cat([change.cpu().double().flatten() for change in editor.weight_changes().values()])


def far(one: se.Editor, other: se.Editor) -> float:
    """How far apart they are, relative to what they did."""
    return float((change_of(one) - change_of(other)).norm() / change_of(other).norm())


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_edits_are_those_of_the_cpu(device, dtype, tokenizer):
    one, other = edited(tokenizer, device, dtype), edited(tokenizer, "cpu", dtype)
    assert weight_of(one).device.type == device and weight_of(one).dtype == dtype
    assert all(weight.master.device.type == device for weight in one.weights.values())
    assert all(normalizer.key_moments.mean().device.type == device for normalizer in one.normalizers.values())
    assert far(one, other) <= CLOSE[dtype]


@pytest.mark.parametrize("editor", [se.UltraEdit, se.StableEdit], ids=lambda editor: editor.__name__)
def test_each_is_of_the_same_mind(device, editor, tokenizer):
    config = se.UltraEditConfig if editor is se.UltraEdit else se.StableEditConfig.one_pass
    how = {"editor": editor, "config": config}
    assert far(edited(tokenizer, device, torch.float64, **how), edited(tokenizer, "cpu", torch.float64, **how)) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_default_editor_takes(device, dtype, tokenizer):
    """Passes, anchors, replays, past keys, the automatic step, the trunk cache and the guard."""
    model = tiny_model("llama", dtype).to(device)
    config = se.StableEditConfig(edit_modules=MODULES, turn_size=5, max_passes=3, end_of_answer=False)
    editor = se.StableEdit(model, tokenizer, config)
    before = weight_of(editor).clone()
    report = editor.edit(FACTS[:5], progress=False)
    assert report.turns[0].passes >= 1 and not torch.equal(weight_of(editor), before)
    with editor.unedited():
        assert torch.equal(weight_of(editor), before)
    scores = se.evaluate(model, tokenizer, FACTS[:5], progress=False)
    assert 0.0 <= scores.efficacy <= 1.0


def test_a_saved_editor_goes_on(device, tokenizer, tmp_path):
    one = make(tokenizer, tiny_model("llama").to(device))
    one.edit(FACTS[:5], progress=False)
    one.save(tmp_path / "saved")
    other = se.StableEdit.load(tiny_model("llama").to(device), tokenizer, tmp_path / "saved")
    other.guard = None
    for editor in (one, other):
        editor.edit(FACTS[5:], progress=False)
    assert weight_of(other).device.type == device
    assert far(one, other) < 1e-4


def test_two_models_in_two_streams(device, tokenizer):
    """At once, each in a thread and a stream of its own."""
    expected, found = edited(tokenizer, device), {}
    models = [tiny_model("llama").to(device) for _ in range(2)]

    def work(number: int) -> None:
        with of_its_own(device):
            found[number] = edited(tokenizer, device, model=models[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(far(found[number], expected) < 1e-4 for number in range(2))


def test_layers_on_two_devices(device, tokenizer):
    """Spread by accelerate over two cards; on the CPU both halves are in one place, behind the same hooks."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device, not two")
    first, second = ("cuda:0", "cuda:1") if device == "cuda" else ("cpu", "cpu")
    layers = {f"model.layers.{index}": first if index == 0 else second for index in range(3)}
    places = {"model.embed_tokens": first, "model.rotary_emb": first, **layers}
    places |= {"model.norm": second, "lm_head": second}
    model = dispatch_model(tiny_model("llama"), places, main_device=first, force_hooks=True)
    spread = make(tokenizer, model)
    spread.edit(FACTS, progress=False)
    assert {str(weight.master.device) for weight in spread.weights.values()} == {first, second}
    assert far(spread, edited(tokenizer, "cpu")) <= CLOSE[torch.float32]
