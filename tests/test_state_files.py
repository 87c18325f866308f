"""State in a file: both ways between C++ and Python, and whatever can be wrong with it."""

from __future__ import annotations

import copy

import pytest
import safetensors
import safetensors.torch
import torch

import stableedit_cpp as se
from stableedit_cpp import core
from support.containers import same
from support.tiny import FACTS, pattern_of, tiny_model

K, V, ROWS = 7, 5, 40


def turn(seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(V, V, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    keys = torch.randn(ROWS, K, generator=generator, dtype=torch.float64)
    return keys.to(dtype), (torch.randn(ROWS, V, generator=generator, dtype=torch.float64) @ mixing).to(dtype)


def editor(mode: str = "full", refresh: float = 0.3, dtype: torch.dtype = torch.float32, turns: int = 4, **options):
    normalizer = core.LifelongNormalizer(K, V, whitening=core.WhiteningOptions(mode=mode, refresh=refresh), **options)
    made = core.ModuleEditor(normalizer)
    for seed in range(turns):
        made.edit(*turn(seed, dtype))
    return made


SETTINGS = {
    "refresh 0": {"mode": "full", "refresh": 0.0},
    "refresh 0.3": {"mode": "full", "refresh": 0.3},
    "refresh 1, prior": {"mode": "full", "refresh": 1.0, "prior": core.NiwPrior(kappa=0.3, psi=1e-3, nu=2.0)},
    "float64": {"mode": "full", "refresh": 0.3, "dtype": torch.float64},
    "diagonal": {"mode": "diagonal", "unbiased_batches": True},
    "none": {"mode": "none"},
    "no turns": {"mode": "full", "turns": 0},
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("through", ["memory", "our file", "python's file"])
def test_goes_on_bit_for_bit(tmp_path, options, through):
    original = editor(**options)
    state = original.normalizer.state_dict()
    if through == "our file":
        core.save_state(tmp_path / "state", {"normalizer/5 -> 7": state}, config='{"a": 1}')
        components, config = core.load_state(tmp_path / "state")
        assert config == '{"a": 1}'
        state = components["normalizer/5 -> 7"]
    elif through == "python's file":
        safetensors.torch.save_file(state, tmp_path / "state")
        state = safetensors.torch.load_file(tmp_path / "state")
    restored = core.ModuleEditor(core.LifelongNormalizer.from_state_dict(state))
    for seed in range(10, 20):
        keys, gradients = turn(seed, options.get("dtype", torch.float32))
        if seed == 15:  # a jump of the distribution, which drops the whitener
            gradients = gradients * 100
        a, b = original.edit(keys, gradients), restored.edit(keys, gradients)
        assert same(a.left, b.left)
        assert same(a.right, b.right)
    ours, theirs = original.normalizer.state_dict(), restored.normalizer.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(same(ours[name], theirs[name]) for name in ours)
    assert restored.normalizer.decompositions == original.normalizer.decompositions


def test_a_restored_copy_is_its_own():
    original = editor()
    state = {name: tensor.clone() for name, tensor in original.normalizer.state_dict().items()}
    restored = core.LifelongNormalizer.from_state_dict(state)
    for tensor in state.values():
        tensor.zero_()
    assert restored.count == original.normalizer.count
    assert torch.equal(restored.value_tracker.psi(), original.normalizer.value_tracker.psi())


@pytest.mark.parametrize("part", ["key_moments", "value_tracker", "whitener"])
def test_parts_have_states_of_their_own(part):
    original = getattr(editor().normalizer, part)
    restored = type(original).from_state_dict(original.state_dict())
    ours, theirs = original.state_dict(), restored.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(same(ours[name], theirs[name]) for name in ours)


def test_every_field_is_needed_and_checked():
    state = editor(prior=core.NiwPrior(kappa=0.1)).normalizer.state_dict()
    for name, tensor in state.items():
        wrong = {
            "dtype": tensor.to(torch.float16) if tensor.is_floating_point() else tensor.to(torch.int32),
            "shape": tensor.unsqueeze(0),
        }
        if tensor.is_floating_point():
            wrong["value"] = torch.full_like(tensor, float("nan"))
        for bad in wrong.values():
            with pytest.raises(ValueError, match="state of a"):
                core.LifelongNormalizer.from_state_dict(state | {name: bad})
        # Without the first there is no whitener; version 1 has not the second, nor 0.2.0 the third.
        if name not in ("whitener_nu", "whitener.mean_square", "whitening.centred"):
            with pytest.raises(ValueError, match=r"lacks|do not fit"):
                core.LifelongNormalizer.from_state_dict({n: t for n, t in state.items() if n != name})
    with pytest.raises(ValueError, match="unknown field 'more'"):
        core.LifelongNormalizer.from_state_dict(state | {"more": torch.ones(1)})
    with pytest.raises(ValueError, match="from 0 to"):
        core.LifelongNormalizer.from_state_dict(state | {"keys.count": torch.tensor(-1)})


def test_state_files_say_what_they_are(tmp_path):
    path = tmp_path / "state.safetensors"
    core.save_state(path, {"tracker": editor().normalizer.value_tracker.state_dict()}, "{}")
    tensors, metadata = core.load_safetensors(path)
    assert metadata == {"format": "stableedit-state", "version": "2", "config": "{}"}
    assert set(tensors) == {f"tracker/{field}" for field in editor().normalizer.value_tracker.state_dict()}

    for changes, message in (
        ({"version": "3"}, "version 3, but this stableedit reads versions up to 2; use a newer stableedit"),
        ({"version": "one"}, "no valid format version"),
        ({"format": "stableedit-patch"}, "is not a stableedit-state file: its metadata has format 'stableedit-patch'"),
    ):
        core.save_safetensors(path, tensors, metadata | changes)
        with pytest.raises(ValueError, match=message) as error:
            core.load_state(path)
        assert str(error.value).startswith(str(path))
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="has no checksum"):
        core.load_state(path)
    core.save_safetensors(path, {"x": torch.ones(1)}, metadata)
    with pytest.raises(ValueError, match="tensor 'x', which belongs to nothing"):
        core.load_state(path)
    with pytest.raises(ValueError, match="must not contain a slash"):
        core.save_state(path, {"a": {"b/c": torch.ones(1)}})


@pytest.mark.parametrize("statistics", ["shared", "per_module"])
def test_an_editor_goes_on_from_its_file(tmp_path, tokenizer, statistics):
    config = se.StableEditConfig.one_pass(
        edit_modules=pattern_of("llama"), turn_size=4, refresh=0.3, statistics=statistics, warm_up_whitening="diagonal"
    )
    editor = se.StableEdit(tiny_model("llama"), tokenizer, config)
    editor.edit(FACTS[:8], progress=False)
    states = {f"normalizer/{group}": normalizer.state_dict() for group, normalizer in editor.normalizers.items()}
    core.save_state(tmp_path / "state", states, config=config.to_json())
    model = copy.deepcopy(editor.model)
    editor.edit(FACTS[8:], progress=False)

    components, text = core.load_state(tmp_path / "state")
    resumed = se.StableEdit(model, tokenizer, se.StableEditConfig.from_json(text))
    assert set(components) == {f"normalizer/{group}" for group in resumed.normalizers}
    for group, normalizer in resumed.normalizers.items():
        normalizer.restore(core.LifelongNormalizer.from_state_dict(components[f"normalizer/{group}"]))
    resumed.edit(FACTS[8:], progress=False)
    for first, second in zip(editor.modules, resumed.modules, strict=True):
        assert torch.equal(first.weight, second.weight)
