"""The ridge solution, against plain solves in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stableedit_cpp.core import (
    ridge_update,
    solve_ridge,
)
from support.core import close, counts, dims, relaxed, rows, seeds


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
