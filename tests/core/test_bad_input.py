"""Bad input: the message names the argument and what was wrong with it, and nothing changes."""

from __future__ import annotations

import math

import pytest
import torch

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
from support.core import MODES, LinAlgError, assert_same_bits, normalizer, rows, state

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
