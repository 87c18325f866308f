"""Normalizer and module editor, against the formulas of the method written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stableedit_cpp.core import (
    ModuleEditor,
    WhiteningOptions,
    solve_ridge,
)
from support.core import MODES, assert_same_bits, close, dims, inverse_root, normalizer, relaxed, rows, seeds, state


def reference_update(history, keys, gradients, mode, step_size, ridge, floor, floor_mode) -> torch.Tensor:
    """D^T of method.md section 3 in float64; history is every turn so far, this one included."""
    seen_h, seen_g = (torch.cat([turn[i] for turn in history]).double() for i in (0, 1))
    h, g = keys.double(), gradients.double()
    eps = torch.finfo(keys.dtype).eps
    n, v = seen_g.shape
    h_hat, g_hat = h, g
    if mode != "none":
        spread = seen_h.std(0) if n > 1 else torch.zeros(h.shape[1], dtype=torch.float64)
        h_hat = (h - seen_h.mean(0)) / (spread + eps)
        centred = g - seen_g.mean(0)
        if mode == "full" and n > v + 1:
            deviation = seen_g - seen_g.mean(0)
            g_hat = centred @ inverse_root(deviation.T @ deviation / (n - v - 1), floor, floor_mode)
        else:
            g_hat = centred / ((seen_g.std(0) if n > 1 else torch.zeros(v, dtype=torch.float64)) + eps)
    targets = -step_size * h_hat.square().sum(1, keepdim=True) * g_hat
    system = h.T @ h + ridge * torch.eye(h.shape[1], dtype=torch.float64)
    return torch.linalg.solve(system, h.T @ targets).T


@pytest.mark.parametrize("mode", MODES)
@relaxed
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    k=dims,
    v=dims,
    seed=seeds,
    dtype=st.sampled_from([torch.float32, torch.float64]),
    floor=st.sampled_from([(0.1, "relative"), (0.05, "absolute")]),
)
def test_edit_follows_the_method(mode, sizes, k, v, seed, dtype, floor):
    editor = ModuleEditor(
        k, v, step_size=0.01, ridge=2.0, whitening=WhiteningOptions(mode=mode, floor=floor[0], floor_mode=floor[1])
    )
    history: list[tuple[torch.Tensor, torch.Tensor]] = []
    for number, n in enumerate(sizes):
        turn = rows(n, k, seed + number, dtype), rows(n, v, seed + 50 + number, dtype)
        history.append(turn)
        update = editor.edit(*turn)
        assert update.left.dtype == dtype
        assert (update.rank, editor.normalizer.count) == (n, sum(sizes[: number + 1]))
        if n == 0:
            assert not update.dense().any()
            continue
        seen = sum(sizes[: number + 1])
        expected = "diagonal" if mode == "full" and seen <= v + 1 else mode
        assert editor.normalizer.effective_mode() == expected
        reference = reference_update(history, *turn, mode, 0.01, 2.0, *floor)
        # In float32 a row may be all but equal to the mean, of which hardly a digit is left.
        atol = 1e-8 if dtype == torch.float64 else 2e-3
        torch.testing.assert_close(update.dense().double(), reference, rtol=1e-7 if atol == 1e-8 else 1e-2, atol=atol)


@pytest.mark.parametrize("mode", MODES)
def test_a_first_turn_of_one_row(mode):
    editor = ModuleEditor(4, 3, whitening=WhiteningOptions(mode=mode))
    dense = editor.edit(rows(1, 4), rows(1, 3, 1)).dense()
    assert torch.isfinite(dense).all()
    assert dense.any() == (mode == "none")  # with nothing to compare with, the row is the mean


def test_edit_is_observe_then_compute_update():
    keys, gradients = rows(9, 4), rows(9, 3, 1)
    whole_call, shared = ModuleEditor(4, 3, step_size=0.1, ridge=2.0), normalizer()
    expected = whole_call.edit(keys, gradients)
    editor = ModuleEditor(shared, step_size=0.1, ridge=2.0)
    assert editor.normalizer is shared
    assert (editor.step_size, editor.ridge) == (0.1, 2.0)
    shared.observe(keys, gradients)
    update = editor.compute_update(keys, gradients)
    assert torch.equal(update.left, expected.left)
    assert torch.equal(update.right, keys)
    assert shared.count == 9
    targets = -0.1 * shared.normalize_keys(keys).square().sum(1, True) * shared.normalize_value_gradients(gradients)
    close(editor.targets(keys, gradients), targets)


def test_weaker_whitening_for_a_turn():
    keys, gradients = rows(9, 4), rows(9, 3, 1)
    editor = ModuleEditor(4, 3, step_size=0.1, ridge=2.0)
    editor.normalizer.observe(keys, gradients)
    for mode in ("none", "diagonal"):
        white = gradients if mode == "none" else (gradients - gradients.mean(0)) / gradients.std(0)
        assert editor.normalizer.effective_mode(mode) == mode
        close(editor.normalizer.normalize_value_gradients(gradients, mode), white)
        scale = -0.1 * editor.normalizer.normalize_keys(keys).square().sum(1, True)
        close(editor.targets(keys, gradients, mode), scale * white)
        close(
            editor.compute_update(keys, gradients, mode).dense(), solve_ridge(keys, scale * white, 2.0).T, torch.float32
        )
    with pytest.raises(ValueError, match="diagonal whitening cannot do full"):
        normalizer("diagonal").effective_mode("full")


@pytest.mark.parametrize("mode", MODES)
def test_a_pool_observes_its_modules_as_one(mode):
    keys, gradients = [rows(n, 4, n) for n in (5, 0, 6)], [rows(n, 3, n + 1) for n in (5, 0, 6)]
    pooled, plain = normalizer(mode), normalizer(mode)
    pooled.observe(keys, gradients)
    plain.observe(torch.cat(keys), torch.cat(gradients))
    assert pooled.count == plain.count == 11
    probe = rows(4, 4, 77), rows(4, 3, 78)
    close(pooled.normalize_keys(probe[0]), plain.normalize_keys(probe[0]))
    close(pooled.normalize_value_gradients(probe[1]), plain.normalize_value_gradients(probe[1]))
    pooled.observe([], [])
    assert pooled.count == 11


@pytest.mark.parametrize("mode", MODES)
def test_normalizers_merge(mode):
    left, right, both = normalizer(mode), normalizer(mode), normalizer(mode)
    first, second = (rows(6, 4, 1), rows(6, 3, 2)), (rows(7, 4, 3), rows(7, 3, 4))
    left.observe(*first)
    right.observe(*second)
    both.observe(*first)
    both.observe(*second)
    left.merge(right)
    assert left.count == both.count
    close(left.normalize_keys(first[0]), both.normalize_keys(first[0]))
    close(left.normalize_value_gradients(first[1]), both.normalize_value_gradients(first[1]))


@pytest.mark.parametrize("mode", MODES)
def test_copy_and_restore(mode):
    original, probe = normalizer(mode), (rows(4, 4, 77), rows(4, 3, 78))
    original.observe(rows(9, 4), rows(9, 3, 1))
    snapshot, before = original.copy(), state(original, probe)
    original.observe(rows(5, 4, 2), rows(5, 3, 3))
    changed = state(original, probe)
    assert (original.count, snapshot.count) == (14, 9)
    assert_same_bits(state(snapshot, probe), before)
    original.restore(snapshot)
    assert original.count == 9
    assert_same_bits(state(original, probe), before)
    # Another turn of the same size gets a whitener of its own, the first one again its old one.
    original.observe(rows(5, 4, 4), rows(5, 3, 5) * 3)
    assert mode == "none" or not torch.equal(state(original, probe)[-1], changed[-1])
    original.restore(snapshot)
    original.observe(rows(5, 4, 2), rows(5, 3, 3))
    assert_same_bits(state(original, probe), changed)
    assert snapshot.count == 9


def test_editors_see_a_restored_normalizer():
    shared = normalizer()
    editor, probe = ModuleEditor(shared), (rows(4, 4, 77), rows(4, 3, 78))
    shared.observe(rows(9, 4), rows(9, 3, 1))
    snapshot, before = shared.copy(), editor.targets(*probe)
    shared.observe(rows(9, 4, 2), rows(9, 3, 3))
    assert not torch.equal(editor.targets(*probe), before)
    shared.restore(snapshot)
    assert torch.equal(editor.targets(*probe), before)
