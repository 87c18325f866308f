"""Updates in factors, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stableedit_cpp.core import (
    LowRankUpdate,
)
from support.core import LAYOUTS, dims, dtypes, relaxed, seeds


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
