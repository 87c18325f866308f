"""Running moments and the normal-inverse-Wishart tracker, against float64 NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stableedit_cpp.core import (
    MasterWeight,
    ModuleEditor,
    NiwPrior,
    WhiteningOptions,
    solve_ridge,
)
from support.core import DTYPES, close, counts, dims, dtypes, moments_of, relaxed, rows, seeds, stack, tracker_of


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


def test_options_say_what_they_are():
    for options in (NiwPrior(kappa=0.3, psi=1e-3), WhiteningOptions(mode="diagonal", floor=0.5, refresh=0.1)):
        assert repr(eval(repr(options))) == repr(options)
    assert repr(NiwPrior(nu=2)) == "NiwPrior(kappa=0.0, psi=0.0, nu=2.0)"
    assert repr(WhiteningOptions(floor_mode="absolute")) == (
        "WhiteningOptions(mode='full', floor=0.1, floor_mode='absolute', refresh=0.0, drift_limit=2.0, centred=True)"
    )
