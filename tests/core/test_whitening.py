"""Floored inverse square roots, against eigendecompositions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stableedit_cpp.core import (
    Whitener,
)
from support.core import DTYPES, close, counts, dims, inverse_root, relaxed, rows, seeds


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
