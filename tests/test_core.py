"""The C++ core through its Python bindings, against float64 NumPy and PyTorch."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stableedit_cpp.core import (
    LifelongNormalizer,
    LowRankUpdate,
    MasterWeight,
    ModuleEditor,
    NiwPrior,
    NormalInverseWishart,
    RunningMoments,
    Whitener,
    WhiteningOptions,
    ridge_update,
    solve_ridge,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Half-precision input is computed in float32: results agree with float64 on the same (rounded) input.
RTOL = {torch.float16: 2e-5, torch.bfloat16: 2e-5, torch.float32: 2e-5, torch.float64: 1e-10}
LAYOUTS = ["linear", "conv1d"]
MODES = ["none", "diagonal", "full"]
LinAlgError = torch.linalg.LinAlgError

counts = st.integers(0, 9)
dims = st.integers(1, 6)
seeds = st.integers(0, 2**16)
dtypes = st.sampled_from(DTYPES)
relaxed = settings(deadline=None, max_examples=40)


def rows(count: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random rows with a mean and a scale of their own in every dimension."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.5 + torch.rand(dim, generator=generator, dtype=torch.float64)
    shift = torch.randn(dim, generator=generator, dtype=torch.float64)
    return (torch.randn(count, dim, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)


def close(actual: torch.Tensor, expected, dtype: torch.dtype = torch.float64) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=RTOL[dtype], atol=RTOL[dtype] * scale)


def moments_of(batches: list[torch.Tensor], dim: int, **options) -> RunningMoments:
    moments = RunningMoments(dim, **options)
    for batch in batches:
        moments.update(batch)
    return moments


def tracker_of(batches: list[torch.Tensor], dim: int, prior: NiwPrior | None = None) -> NormalInverseWishart:
    tracker = NormalInverseWishart(dim, prior or NiwPrior())
    for batch in batches:
        tracker.update(batch)
    return tracker


def stack(batches: list[torch.Tensor], dim: int) -> np.ndarray:
    return torch.cat([torch.zeros(0, dim, dtype=torch.float64), *(batch.double() for batch in batches)]).numpy()


# --- RunningMoments ---


@relaxed
@given(st.lists(st.tuples(counts, seeds, dtypes), max_size=4), dims)
def test_moments(pieces, dim):
    batches = [rows(n, dim, seed, dtype) for n, seed, dtype in pieces]
    moments, x = moments_of(batches, dim), stack(batches, dim)
    assert (moments.dim, moments.count) == (dim, len(x))
    assert moments.mean().dtype == moments.m2().dtype == moments.variance().dtype == torch.float64
    close(moments.mean(), x.mean(0) if len(x) else np.zeros(dim))
    close(moments.m2(), ((x - x.mean(0)) ** 2).sum(0) if len(x) else np.zeros(dim))
    close(moments.variance(), x.var(0, ddof=1) if len(x) > 1 else np.zeros(dim))
    close(moments.stddev(), x.std(0, ddof=1) if len(x) > 1 else np.zeros(dim))


def test_unbiased_batches_weight_the_variance_of_each_batch():
    batches = [rows(n, 3, seed=n) for n in (4, 1, 6)]
    x = stack(batches, 3)
    exact = ((x - x.mean(0)) ** 2).sum(0)
    extra = sum(len(b) * b.numpy().var(0, ddof=1) - (len(b) - 1) * b.numpy().var(0, ddof=1) for b in batches[::2])
    close(moments_of(batches, 3, unbiased_batches=True).m2(), exact + extra)
    close(moments_of(batches, 3).m2(), exact)


# --- NormalInverseWishart ---


@relaxed
@given(
    st.lists(st.tuples(counts, seeds, dtypes), max_size=4),
    dims,
    st.tuples(st.sampled_from([0.0, 0.5, 3.0]), st.sampled_from([0.0, 1e-3, 2.0]), st.sampled_from([0.0, 2.5])),
)
def test_tracker_follows_the_update_of_the_method(pieces, dim, prior):
    batches = [rows(n, dim, seed, dtype) for n, seed, dtype in pieces]
    tracker = tracker_of(batches, dim, NiwPrior(kappa=prior[0], psi=prior[1], nu=prior[2]))
    # method.md, section 2, batch by batch
    m, kappa, psi, nu = np.zeros(dim), prior[0], prior[1] * np.eye(dim), prior[2]
    for batch in batches:
        x, n = batch.double().numpy(), len(batch)
        if n == 0:
            continue
        mean = x.mean(0)
        psi = psi + (x - mean).T @ (x - mean) + kappa * n / (kappa + n) * np.outer(mean - m, mean - m)
        m = m + n / (kappa + n) * (mean - m)
        kappa, nu = kappa + n, nu + n
    accuracy = torch.float64 if all(dtype == torch.float64 for *_, dtype in pieces) else torch.float32
    assert (tracker.dim, tracker.count, tracker.kappa, tracker.nu) == (dim, sum(map(len, batches)), kappa, nu)
    close(tracker.mean(), m, accuracy)
    close(tracker.psi(), psi, accuracy)
    close(tracker.psi(), tracker.psi().T)
    assert prior[0] > 0 or torch.equal(tracker.psi(), tracker.psi().T)
    assert tracker.has_covariance() == (nu > dim + 1)
    if tracker.has_covariance():
        assert tracker.covariance().dtype == torch.float64
        close(tracker.covariance(), psi / (nu - dim - 1), accuracy)
    else:
        with pytest.raises(ValueError, match=rf"nu > v \+ 1 = {dim + 1}, but nu is {nu:g}"):
            tracker.covariance()


# --- merging and copying, of both ---

TRACKERS = {
    "moments": (moments_of, lambda t: (t.mean(), t.m2(), t.variance())),
    "tracker": (tracker_of, lambda t: (t.mean(), t.psi())),
    "tracker with prior": (
        lambda batches, dim: tracker_of(batches, dim, NiwPrior(kappa=0.5, psi=0.1, nu=1.0)),
        lambda t: (t.mean(), t.psi()),
    ),
}


@pytest.mark.parametrize("kind", TRACKERS)
@relaxed
@given(data=st.data(), sizes=st.lists(counts, min_size=1, max_size=5), dim=dims)
def test_merge_is_concatenation_in_any_order(kind, data, sizes, dim):
    make, read = TRACKERS[kind]
    batches = [rows(n, dim, seed) for seed, n in enumerate(sizes)]
    whole = make([torch.cat(batches)], dim)
    pieces = [make([batch], dim) for batch in data.draw(st.permutations(batches))]
    while len(pieces) > 1:  # merge neighbours, as a tree of some random form
        index = data.draw(st.integers(0, len(pieces) - 2))
        pieces[index].merge(pieces.pop(index + 1))
    assert pieces[0].count == whole.count == sum(sizes)
    for actual, expected in zip(read(pieces[0]), read(whole), strict=True):
        close(actual, expected)


@pytest.mark.parametrize("kind", TRACKERS)
def test_merge_with_itself_and_with_nothing(kind):
    make, read = TRACKERS[kind]
    batch = rows(5, 3)
    twice, other = make([batch], 3), make([], 3)
    twice.merge(twice)
    for actual, expected in zip(read(twice), read(make([batch, batch], 3)), strict=True):
        close(actual, expected)
    before = read(twice)
    twice.merge(other)
    other.merge(twice)
    for tensors in (read(twice), read(other)):
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("kind", TRACKERS)
def test_copy_is_a_snapshot(kind):
    make, read = TRACKERS[kind]
    original = make([rows(5, 3)], 3)
    before, snapshot = [tensor.clone() for tensor in read(original)], original.copy()
    original.update(rows(4, 3, seed=1))
    assert (original.count, snapshot.count) == (9, 5)
    snapshot.merge(make([], 3))
    assert all(torch.equal(a, b) for a, b in zip(read(snapshot), before, strict=True))
    assert not torch.equal(read(original)[0], before[0])


@pytest.mark.parametrize("kind", TRACKERS)
def test_empty_batch_changes_nothing(kind):
    make, read = TRACKERS[kind]
    tracker = make([rows(5, 3)], 3)
    before = read(tracker)
    tracker.update(torch.zeros(0, 3))
    assert tracker.count == 5
    assert all(torch.equal(a, b) for a, b in zip(read(tracker), before, strict=True))


@pytest.mark.parametrize("mode", ["none", "diagonal", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_not_written_to(dtype, mode):
    keys, gradients, weight = rows(7, 3, 0, dtype), rows(7, 2, 1, dtype), rows(2, 3, 2, dtype)
    before = keys.clone(), gradients.clone()
    update = ModuleEditor(3, 2, whitening=WhiteningOptions(mode=mode)).edit(keys, gradients)
    moments_of([keys], 3)
    tracker_of([gradients], 2)
    solve_ridge(keys, gradients, 1.0)
    left, right = update.left.clone(), update.right.clone()
    update.add_to(weight)
    MasterWeight(weight).apply(update)
    update.norm()
    for tensor, expected in ((keys, before[0]), (gradients, before[1]), (update.left, left), (update.right, right)):
        assert torch.equal(tensor, expected)


# --- ridge ---


@relaxed
@given(counts, dims, dims, seeds, st.sampled_from([torch.float32, torch.float64]), st.floats(1e-2, 1e3))
def test_ridge_primal_dual_and_plain_solve(n, k, v, seed, dtype, ridge):
    keys, targets = rows(n, k, seed, dtype), rows(n, v, seed + 1, dtype)
    h, t = keys.double(), targets.double()
    expected = torch.linalg.solve(h.T @ h + ridge * torch.eye(k, dtype=torch.float64), h.T @ t)
    tolerance = torch.float64 if dtype == torch.float64 else torch.float32
    allowed = {"rtol": 1e-8, "atol": 1e-8} if tolerance == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    for form in ("auto", "primal", "dual"):
        found = solve_ridge(keys, targets, ridge, form)
        assert found.shape == (k, v)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, **allowed)
    update = ridge_update(keys, targets, ridge)
    assert (update.rank, update.left.shape, update.right.shape) == (n, (v, n), (n, k))
    torch.testing.assert_close(update.dense().double(), expected.T, **allowed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ridge_of_half_precision_is_computed_in_float32(dtype):
    keys, targets = rows(4, 3, 0, dtype), rows(4, 2, 1, dtype)
    found = solve_ridge(keys, targets, 1.0)
    assert found.dtype == torch.float32
    close(found, solve_ridge(keys.double(), targets.double(), 1.0), dtype)


@pytest.mark.parametrize("form", ["auto", "primal", "dual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_ridge_the_minimum_norm_solution(form, dtype):
    keys = rows(2, 5, 0, dtype)
    keys = torch.cat([keys, keys, keys[:1] + keys[1:]])  # 5 rows of rank 2
    targets = torch.cat([torch.eye(2), torch.eye(2), torch.ones(1, 2)]).to(dtype)
    found = solve_ridge(keys, targets, 0.0, form)
    torch.testing.assert_close(found, torch.linalg.pinv(keys) @ targets, rtol=1e-3, atol=1e-4)


# --- whitening ---


@relaxed
@given(st.integers(1, 6), seeds, st.sampled_from([torch.float32, torch.float64]))
def test_whitened_samples_have_identity_covariance(dim, seed, dtype):
    x = rows(40, dim, seed) @ rows(dim, dim, seed + 1)
    x = x + 0.3 * rows(40, dim, seed + 2)
    centred = x - x.mean(0)
    whitener = Whitener.full(torch.cov(x.T).reshape(dim, dim).to(dtype), floor=0.0, floor_mode="absolute")
    white = whitener.transform(centred.to(dtype))
    assert white.dtype == dtype
    assert (whitener.mode, whitener.floored) == ("full", 0)
    found = torch.cov(white.double().T).reshape(dim, dim)
    tolerance = 1e-8 if dtype == torch.float64 else 5e-2
    torch.testing.assert_close(found, torch.eye(dim, dtype=torch.float64), rtol=0, atol=tolerance)


def inverse_root(sigma: torch.Tensor, floor: float, floor_mode: str) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(sigma.double())
    if floor_mode == "relative":
        floor = floor * float(values.mean())
    return vectors @ torch.diag(values.clamp_min(floor).rsqrt()) @ vectors.T


@relaxed
@given(counts, dims, seeds, st.sampled_from([1e-6, 0.1, 1.0, 10.0]), st.sampled_from(["relative", "absolute"]))
def test_floored_whitening(n, dim, seed, floor, floor_mode):
    factor = rows(max(1, dim - 2), dim, seed)  # singular from dimension 3 on
    sigma = factor.T @ factor
    whitener = Whitener.full(sigma, floor=floor, floor_mode=floor_mode)
    x = rows(n, dim, seed + 1)
    expected = x @ inverse_root(sigma, floor, floor_mode)
    torch.testing.assert_close(
        whitener.transform(x), expected, rtol=1e-7, atol=1e-7 * (1 + float(expected.abs().sum()))
    )
    height = floor * float(sigma.trace()) / dim if floor_mode == "relative" else floor
    assert whitener.floor == pytest.approx(height)
    assert whitener.floored == int((torch.linalg.eigvalsh(sigma) < height).sum())
    root = whitener.transform(torch.eye(dim, dtype=torch.float64))
    torch.testing.assert_close(root, root.T, rtol=1e-7, atol=1e-7 * (1 + float(root.abs().max())))  # the symmetric root


@pytest.mark.parametrize("dtype", DTYPES)
def test_diagonal_and_no_whitening(dtype):
    x, stddev = rows(4, 3, 0, dtype), torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    white = Whitener.diagonal(stddev).transform(x)
    assert white.dtype == computed
    # eps is that of the dtype, which also keeps a dimension without any variance finite
    close(white, x.double() / (stddev + torch.finfo(computed).eps), dtype)
    same = Whitener.none().transform(x)
    assert same.dtype == computed
    assert torch.equal(same, x.to(computed))
    assert [w.mode for w in (Whitener.none(), Whitener.diagonal(stddev))] == ["none", "diagonal"]


# --- LowRankUpdate ---


def whole(rank: int, v: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> LowRankUpdate:
    """An update of small whole numbers, exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(-2, 3, (v, rank), generator=generator)
    return LowRankUpdate(left.to(dtype), torch.randint(-2, 3, (rank, k), generator=generator).to(dtype))


def weight_of(v: int, k: int, layout: str, dtype: torch.dtype, seed: int = 9) -> torch.Tensor:
    weight = torch.randint(-8, 9, (v, k), generator=torch.Generator().manual_seed(seed)).to(dtype)
    return weight if layout == "linear" else weight.T.contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@relaxed
@given(st.integers(0, 5), dims, dims, seeds, dtypes, st.sampled_from([torch.float32, torch.float64]))
def test_low_rank_update(layout, rank, v, k, seed, dtype, factors):
    update = whole(rank, v, k, seed, factors)
    dense = update.left @ update.right
    assert update.rank == rank
    assert torch.equal(update.dense(), dense)
    weight = weight_of(v, k, layout, dtype, seed)
    before = weight.clone()
    assert update.add_to(weight, layout) is None
    assert torch.equal(weight, before + (dense if layout == "linear" else dense.T).to(dtype))
    update.subtract_from(weight, layout)
    assert torch.equal(weight, before)
    assert update.norm() == pytest.approx(float(dense.norm()))
    other = whole(3, v, k, seed + 1, factors)
    assert update.inner(other) == pytest.approx(float((dense * other.dense()).sum()))
    assert update.inner(update) == pytest.approx(update.norm() ** 2)
    chosen = torch.arange(rank)[::2]
    share, rest = update.select(chosen), update.select(torch.arange(rank)[1::2])
    assert share.rank == len(chosen)
    assert torch.equal(share.dense() + rest.dense(), dense)


def test_add_to_takes_strided_and_trained_weights():
    update = whole(2, 3, 4, dtype=torch.float32)
    wide = torch.zeros(3, 8)
    update.add_to(wide[:, ::2])
    assert torch.equal(wide[:, ::2], update.dense())
    assert not wide[:, 1::2].any()
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    update.add_to(parameter)
    assert torch.equal(parameter.detach(), update.dense())
    assert parameter.grad is None


# --- LifelongNormalizer and ModuleEditor ---


def normalizer(mode: str = "full", k: int = 4, v: int = 3, floor: float = 0.1, floor_mode: str = "relative"):
    return LifelongNormalizer(k, v, whitening=WhiteningOptions(mode=mode, floor=floor, floor_mode=floor_mode))


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


def state(normalizer: LifelongNormalizer, probe: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    tracker = normalizer.value_tracker
    tensors = [normalizer.key_moments.mean(), normalizer.key_moments.m2(), normalizer.value_moments.m2()]
    tensors += [tracker.mean(), tracker.psi()] if tracker is not None else []
    return [*tensors, normalizer.normalize_keys(probe[0]), normalizer.normalize_value_gradients(probe[1])]


def assert_same_bits(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


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


# --- MasterWeight ---


def small(v: int, k: int, seed: int, dtype: torch.dtype) -> LowRankUpdate:
    """An update a thousand times smaller than a weight."""
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    return LowRankUpdate(rows(v, 2, seed, computed) * 1e-3, rows(2, k, seed + 1, computed))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=15)
@given(data=st.data(), v=dims, k=dims, seed=seeds, count=st.integers(1, 6))
def test_reverting_in_any_order_restores_the_bits(dtype, layout, data, v, k, seed, count):
    live = rows(v, k, seed, dtype) if layout == "linear" else rows(k, v, seed, dtype)
    before = live.clone()
    weight = MasterWeight(live, layout)
    updates = [small(v, k, seed + 10 * i, dtype) for i in range(count)]
    for update in updates:
        weight.apply(update)
    for update in data.draw(st.permutations(updates)):
        weight.revert(update)
    assert torch.equal(live, before)
    assert torch.equal(weight.master, before.to(weight.master.dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reverting_one_leaves_the_others(dtype, layout):
    shape = (5, 4) if layout == "linear" else (4, 5)
    updates = [small(5, 4, 10 * i, dtype) for i in range(6)]
    weight, others = (MasterWeight(rows(*shape, 1, dtype), layout) for _ in range(2))
    for index, update in enumerate(updates):
        weight.apply(update)
        if index != 2:
            others.apply(update)
    weight.revert(updates[2])
    assert torch.equal(weight.live, others.live)
    torch.testing.assert_close(weight.master, others.master, rtol=1e-7, atol=0)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_live_weight_is_the_master_rounded_once(dtype, exact):
    live = rows(6, 5, 0, dtype)
    before = live.double().clone()
    weight = MasterWeight(live, exact_revert=exact)
    full = dtype in (torch.float32, torch.float64)
    assert weight.live.data_ptr() == live.data_ptr()
    assert weight.master.dtype == (dtype if full else torch.float32)
    assert (weight.master.data_ptr() == live.data_ptr()) == full
    update = small(6, 5, 3, dtype)
    for _ in range(100):
        weight.apply(update)
    assert torch.equal(live, weight.master.to(dtype))
    expected = before + 100 * update.dense().double()
    # What is rounded away adds up over 100 updates, unless it is kept.
    rounding = torch.finfo(weight.master.dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(weight.master.double(), expected, rtol=0, atol=rounding * (1 if exact else 50))


def test_a_half_precision_weight_alone_would_lose_small_updates():
    update = LowRankUpdate(torch.full((1, 1), 1e-3), torch.ones(1, 1))
    with_master, without = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    weight = MasterWeight(with_master)
    for _ in range(100):
        weight.apply(update)
        update.add_to(without)
    assert without.item() == 1.0
    assert with_master.item() == pytest.approx(1.1, abs=4e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_clone_and_restore(dtype):
    live = rows(5, 4, 0, dtype)
    weight, update = MasterWeight(live), small(5, 4, 1, dtype)
    weight.apply(update)
    snapshot, before, master = weight.clone(), live.clone(), weight.master.clone()
    weight.apply(small(5, 4, 2, dtype))
    assert not torch.equal(weight.master, master)
    assert torch.equal(snapshot.live, before)
    weight.restore(snapshot)
    assert torch.equal(live, before)
    assert torch.equal(weight.master, master)
    weight.revert(update)
    assert torch.equal(live, rows(5, 4, 0, dtype))


def test_parameters_of_a_model():
    parameter = torch.nn.Parameter(rows(3, 4, 0, torch.bfloat16))
    weight = MasterWeight(parameter)
    weight.apply(LowRankUpdate(torch.ones(3, 1), torch.ones(1, 4)))
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert parameter.grad is None
    assert not weight.live.requires_grad
    assert torch.equal(parameter.detach(), (rows(3, 4, 0, torch.bfloat16).float() + 1).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
def test_a_bad_update_leaves_the_weight(dtype, bad):
    live = rows(3, 4, 0, dtype)
    before, weight = live.clone(), MasterWeight(live)
    left = torch.tensor([[1.0], [bad], [1.0]], dtype=torch.float64)
    update = LowRankUpdate(left, torch.full((1, 4), 1e200, dtype=torch.float64))
    for call in (weight.check, weight.apply):
        with pytest.raises(LinAlgError, match=r"NaN or infinite|beyond what"):
            call(update)
    assert torch.equal(live, before)
    assert torch.equal(weight.master, before.to(weight.master.dtype))


def test_an_update_beyond_float16_is_refused():
    live = torch.full((2, 2), 60000.0, dtype=torch.float16)
    weight, update = MasterWeight(live), LowRankUpdate(torch.full((2, 1), 100.0), torch.full((1, 2), 100.0))
    with pytest.raises(LinAlgError, match="could reach 70000, beyond what"):
        weight.apply(update)
    assert (live == 60000).all()
    MasterWeight(live.bfloat16()).apply(update)


# --- bad input: the message names the argument and what was wrong with it ---

M = torch.zeros
UPDATE = LowRankUpdate(M(3, 2), M(2, 4))
WRONG = {
    "moments dim": (lambda: RunningMoments(0), ValueError, ["dim", "0"]),
    "moments negative dim": (lambda: RunningMoments(-1), ValueError, ["dim", "-1"]),
    "moments columns": (lambda: RunningMoments(3).update(M(2, 4)), ValueError, ["batch", "[n, 3]", "[2, 4]"]),
    "moments vector": (lambda: RunningMoments(3).update(M(3)), ValueError, ["batch", "[3]"]),
    "moments integers": (lambda: RunningMoments(3).update(M(2, 3, dtype=torch.int64)), TypeError, ["batch", "Long"]),
    "moments complex": (lambda: RunningMoments(3).update(M(2, 3, dtype=torch.cfloat)), TypeError, ["batch", "Complex"]),
    "moments nothing": (lambda: RunningMoments(3).update(None), (TypeError, ValueError), ["batch"]),
    "moments merge": (lambda: RunningMoments(3).merge(RunningMoments(4)), ValueError, ["4", "3"]),
    "moments merge kinds": (
        lambda: RunningMoments(3).merge(RunningMoments(3, unbiased_batches=True)),
        ValueError,
        ["unbiased_batches"],
    ),
    "tracker dim": (lambda: NormalInverseWishart(0), ValueError, ["dim", "0"]),
    "tracker columns": (lambda: NormalInverseWishart(3).update(M(2, 4)), ValueError, ["batch", "[n, 3]", "[2, 4]"]),
    "tracker cube": (lambda: NormalInverseWishart(3).update(M(1, 2, 3)), ValueError, ["batch", "[1, 2, 3]"]),
    "tracker integers": (lambda: NormalInverseWishart(3).update(M(2, 3).int()), TypeError, ["batch", "Int"]),
    "tracker merge": (lambda: NormalInverseWishart(3).merge(NormalInverseWishart(4)), ValueError, ["4", "3"]),
    "tracker merge priors": (
        lambda: NormalInverseWishart(3).merge(NormalInverseWishart(3, NiwPrior(psi=1.0))),
        ValueError,
        ["prior"],
    ),
    "prior kappa": (lambda: NormalInverseWishart(3, NiwPrior(kappa=-1.0)), ValueError, ["kappa", "-1"]),
    "prior psi": (lambda: NormalInverseWishart(3, NiwPrior(psi=math.nan)), ValueError, ["psi", "nan"]),
    "prior nu": (lambda: NormalInverseWishart(3, NiwPrior(nu=math.inf)), ValueError, ["nu", "inf"]),
    "ridge rows": (lambda: solve_ridge(M(3, 4), M(2, 2), 1.0), ValueError, ["keys", "targets", "[3, 4]", "[2, 2]"]),
    "ridge vector": (lambda: solve_ridge(M(3), M(3, 2), 1.0), ValueError, ["keys", "[3]"]),
    "ridge integers": (lambda: solve_ridge(M(3, 4), M(3, 2).long(), 1.0), TypeError, ["targets", "Long"]),
    "ridge negative": (lambda: solve_ridge(M(3, 4), M(3, 2), -1.0), ValueError, ["ridge", "-1"]),
    "ridge nan": (lambda: ridge_update(M(3, 4), M(3, 2), math.nan), ValueError, ["ridge", "nan"]),
    "ridge form": (lambda: solve_ridge(M(3, 4), M(3, 2), 1.0, "fast"), ValueError, ["form", "'fast'"]),
    "whitening mode": (lambda: WhiteningOptions(mode="half"), ValueError, ["'half'", "'diagonal'"]),
    "whitening floor mode": (lambda: WhiteningOptions(floor_mode="low"), ValueError, ["floor_mode", "'low'"]),
    "whitener not square": (lambda: Whitener.full(M(2, 3)), ValueError, ["covariance", "[2, 3]"]),
    "whitener vector": (lambda: Whitener.full(M(3)), ValueError, ["covariance", "[3]"]),
    "whitener integers": (lambda: Whitener.full(M(3, 3).int()), TypeError, ["covariance", "Int"]),
    "whitener floor": (lambda: Whitener.full(torch.eye(3), floor=-0.5), ValueError, ["floor", "-0.5"]),
    "whitener floor nan": (lambda: Whitener.full(torch.eye(3), floor=math.nan), ValueError, ["floor", "nan"]),
    "whitener singular": (lambda: Whitener.full(M(3, 3), floor=0.0), LinAlgError, ["singular", "floor"]),
    "whitener stddev": (lambda: Whitener.diagonal(M(2, 2)), ValueError, ["stddev", "[2, 2]"]),
    "whitener columns": (lambda: Whitener.full(torch.eye(3)).transform(M(2, 4)), ValueError, ["[n, 3]", "[2, 4]"]),
    "diagonal columns": (lambda: Whitener.diagonal(M(3)).transform(M(2, 4)), ValueError, ["[n, 3]", "[2, 4]"]),
    "update ranks": (lambda: LowRankUpdate(M(3, 2), M(3, 4)), ValueError, ["left", "right", "[3, 2]", "[3, 4]"]),
    "update vector": (lambda: LowRankUpdate(M(3), M(2, 4)), ValueError, ["left", "[3]"]),
    "update dtypes": (lambda: LowRankUpdate(M(3, 2), M(2, 4).double()), TypeError, ["left", "Float", "Double"]),
    "update integers": (lambda: LowRankUpdate(M(3, 2).int(), M(2, 4).int()), TypeError, ["left", "Int"]),
    "update weight": (lambda: UPDATE.add_to(M(4, 3)), ValueError, ["weight", "[3, 4]", "[4, 3]"]),
    "update conv1d": (lambda: UPDATE.add_to(M(3, 4), "conv1d"), ValueError, ["weight", "[4, 3]", "[3, 4]"]),
    "update layout": (lambda: UPDATE.add_to(M(3, 4), "conv2d"), ValueError, ["layout", "'conv2d'"]),
    "update weight dtype": (lambda: UPDATE.subtract_from(M(3, 4).int()), TypeError, ["weight", "Int"]),
    "update inner": (
        lambda: UPDATE.inner(LowRankUpdate(M(4, 2), M(2, 3))),
        ValueError,
        ["inner product", "[3, 4]", "[4, 3]"],
    ),
    "update inner dtypes": (
        lambda: UPDATE.inner(LowRankUpdate(M(3, 2).double(), M(2, 4).double())),
        TypeError,
        ["inner product", "Float", "Double"],
    ),
    "update select": (lambda: UPDATE.select(M(1, 1).long()), ValueError, ["rows", "[1, 1]"]),
    "update select dtype": (lambda: UPDATE.select(M(1)), TypeError, ["rows", "Float"]),
    "update select range": (lambda: UPDATE.select(torch.tensor([2])), (ValueError, IndexError), ["range"]),
    "normalizer dims": (lambda: LifelongNormalizer(0, 3), ValueError, ["dim", "0"]),
    "normalizer unbiased": (lambda: LifelongNormalizer(4, 3, unbiased_batches=True), ValueError, ["unbiased_batches"]),
    "observe keys": (lambda: normalizer().observe(M(2, 5), M(2, 3)), ValueError, ["keys", "[n, 4]", "[2, 5]"]),
    "observe gradients": (lambda: normalizer().observe(M(2, 4), M(2, 4)), ValueError, ["value_gradients", "[2, 4]"]),
    "observe rows": (lambda: normalizer().observe(M(2, 4), M(3, 3)), ValueError, ["[2, 4]", "[3, 3]"]),
    "observe integers": (lambda: normalizer().observe(M(2, 4).int(), M(2, 3)), TypeError, ["keys", "Int"]),
    "observe pool": (lambda: normalizer().observe([M(2, 4)], [M(2, 3)] * 2), ValueError, ["1", "2"]),
    "observe mixture": (lambda: normalizer().observe(M(2, 4), [M(2, 3)]), TypeError, ["observe"]),
    "normalizer merge": (lambda: normalizer().merge(normalizer("diagonal")), ValueError, ["diagonal", "full"]),
    "normalize keys": (lambda: normalizer().normalize_keys(M(2, 3)), ValueError, ["keys", "[n, 4]", "[2, 3]"]),
    "normalize mode": (lambda: normalizer().effective_mode("half"), ValueError, ["'half'"]),
    "editor nothing": (lambda: ModuleEditor(None), ValueError, ["normalizer"]),
    "editor step_size": (lambda: ModuleEditor(4, 3, step_size=0.0), ValueError, ["step_size", "0"]),
    "editor step_size nan": (lambda: ModuleEditor(4, 3, step_size=math.nan), ValueError, ["step_size", "nan"]),
    "editor ridge": (lambda: ModuleEditor(4, 3, ridge=0.0), ValueError, ["ridge", "0"]),
    "editor ridge inf": (lambda: ModuleEditor(4, 3, ridge=math.inf), ValueError, ["ridge", "inf"]),
    "editor keys": (lambda: ModuleEditor(4, 3).edit(M(2, 5), M(2, 3)), ValueError, ["keys", "[n, 4]", "[2, 5]"]),
    "editor gradients": (lambda: ModuleEditor(4, 3).targets(M(2, 4), M(2)), ValueError, ["value_gradients", "[2]"]),
    "master integers": (lambda: MasterWeight(M(3, 4).int()), TypeError, ["live", "Int"]),
    "master vector": (lambda: MasterWeight(M(3)), ValueError, ["live", "[3]"]),
    "master layout": (lambda: MasterWeight(M(3, 4), "rows"), ValueError, ["layout", "'rows'"]),
    "master update": (lambda: MasterWeight(M(4, 3)).apply(UPDATE), ValueError, ["weight", "[3, 4]", "[4, 3]"]),
    "master conv1d": (lambda: MasterWeight(M(3, 4), "conv1d").check(UPDATE), ValueError, ["[4, 3]", "[3, 4]"]),
    "master revert": (lambda: MasterWeight(M(4, 3)).revert(UPDATE), ValueError, ["[3, 4]", "[4, 3]"]),
    "master snapshot": (lambda: MasterWeight(M(4, 3)).restore(MasterWeight(M(3, 4))), ValueError, ["snapshot"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    call, expected, words = WRONG[case]
    with pytest.raises(expected) as error:
        call()
    for word in words:
        assert word in str(error.value)
    assert "Exception raised from" not in str(error.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["keys", "value_gradients"])
@pytest.mark.parametrize("mode", MODES)
def test_values_that_are_not_finite_leave_the_statistics(mode, where, bad):
    shared, probe = normalizer(mode), (rows(4, 4, 77), rows(4, 3, 78))
    shared.observe(rows(9, 4), rows(9, 3, 1))
    before = state(shared, probe)
    turn = {"keys": rows(5, 4, 2), "value_gradients": rows(5, 3, 3)}
    turn[where][3, 1] = bad
    pool = [rows(2, 4, 5), turn["keys"]], [rows(2, 3, 6), turn["value_gradients"]]
    for call in (shared.observe, ModuleEditor(shared).edit):
        with pytest.raises(ValueError, match=f"^{where} contains NaN or infinite values"):
            call(turn["keys"], turn["value_gradients"])
    with pytest.raises(ValueError, match=f"^{where} contains NaN or infinite values"):
        shared.observe(*pool)
    assert shared.count == 9
    assert_same_bits(state(shared, probe), before)


def test_a_failing_edit_leaves_the_statistics():
    # Whole numbers cannot be spread: one dimension never varies, and a floor of 0 would divide by it.
    editor = ModuleEditor(4, 3, whitening=WhiteningOptions(floor=0.0, floor_mode="absolute"))
    gradients = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, -1.0], [0.0, 0.0, 5.0], [2.0, 0.0, 2.0]], dtype=torch.float64)
    editor.normalizer.observe(rows(4, 4), gradients)
    probe = rows(4, 4, 77), gradients
    before = state(editor.normalizer, probe)  # still diagonal
    with pytest.raises(LinAlgError, match="singular"):
        editor.edit(rows(4, 4, 1), gradients)
    assert editor.normalizer.count == 4
    assert_same_bits(state(editor.normalizer, probe), before)


# --- threads ---


@pytest.mark.parametrize(
    "call",
    [
        lambda a: solve_ridge(a, a, 1.0, "primal"),
        lambda a: Whitener.full(a @ a.T),
        lambda a: NormalInverseWishart(len(a)).update(a),
    ],
    ids=["solve_ridge", "Whitener.full", "NormalInverseWishart.update"],
)
def test_other_threads_run_during_a_call(call):
    matrix = rows(700, 700)
    stamps: list[float] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            stamps.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        # With the GIL held, the other thread could run before and after the call, but never in the middle of it.
        for _ in range(50):
            start = time.perf_counter()
            call(matrix)
            quarter = (time.perf_counter() - start) / 4
            if any(start + quarter < stamp < start + 3 * quarter for stamp in list(stamps)):
                return
    finally:
        stop.set()
        thread.join()
    pytest.fail("no other thread ran in the middle of any of 50 calls: the GIL is not released")


def test_threads_share_a_tracker_for_reading():
    tracker = tracker_of([rows(50, 20)], 20)
    expected, found = tracker.covariance(), []
    threads = [threading.Thread(target=lambda: found.append(tracker.covariance())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(covariance, expected) for covariance in found)
