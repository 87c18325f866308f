"""Master weights: applying and reverting to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stableedit_cpp.core import (
    LowRankUpdate,
    MasterWeight,
)
from support.core import DTYPES, LAYOUTS, LinAlgError, dims, rows, seeds


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
