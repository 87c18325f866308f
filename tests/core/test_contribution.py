"""The contribution of answer tokens, through the bindings, against solving their turn without them."""

from __future__ import annotations

import pytest
import torch

from stableedit_cpp import core
from stableedit_cpp.editors import AppliedPass
from stableedit_cpp.model.capture import CapturedTurn

V, K, N, RIDGE, WEIGHT = 5, 12, 9, 0.3, 0.7


def solve(keys: torch.Tensor, targets: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    """D^T of the normal equations, [v, k]."""
    system = keys.T @ keys + WEIGHT * past.T @ past + RIDGE * torch.eye(K, dtype=torch.float64)
    return torch.linalg.solve(system, keys.T @ targets).T


@pytest.mark.parametrize("with_past", [False, True], ids=["plain", "past keys"])
@pytest.mark.parametrize("rows", [[0], [3, 4, 8], list(range(N)), []], ids=str)
def test_subtracting_it_leaves_the_solution_of_the_others(rows, with_past):
    torch.manual_seed(0)
    # Nearly parallel, as keys of a language model are.
    direction = torch.randn(K, dtype=torch.float64) * 3
    keys, past = (direction + 0.1 * torch.randn(n, K, dtype=torch.float64) for n in (N, 20))
    targets = torch.randn(N, V, dtype=torch.float64)
    past_keys = core.PastKeys(K)
    if with_past:
        past_keys.update(past)
    else:
        past = torch.zeros(1, K, dtype=torch.float64)
    update = core.ridge_update(keys, targets, RIDGE, past_keys=past_keys, past_key_weight=WEIGHT)
    torch.testing.assert_close(update.dense(), solve(keys, targets, past))

    owned = torch.zeros(N, dtype=torch.bool)
    owned[rows] = True
    captured = CapturedTurn({"m": keys}, {"m": targets}, torch.arange(N), torch.zeros(N), *[torch.empty(0)] * 2)
    share = AppliedPass(captured, {"m": update}, torch.arange(N), RIDGE, with_past).contribution(owned)["m"]
    assert share.rank == len(rows)
    torch.testing.assert_close(update.dense() - share.dense(), solve(keys[~owned], targets[~owned], past))


def test_it_needs_the_ridge_or_the_keys():
    update = core.LowRankUpdate(torch.ones(V, 2), torch.ones(2, K))
    owned = torch.tensor([True, False])
    for arguments in ({}, {"ridge": 1.0, "keys": update.right}):
        with pytest.raises(ValueError, match=r"either ridge .* or keys"):
            core.contribution(update, owned, **arguments)
    with pytest.raises(ValueError, match="ridge must be finite and positive, but it is 0"):
        core.contribution(update, owned, ridge=0.0)
    with pytest.raises(TypeError, match="owned must be bool"):
        core.contribution(update, owned.long(), ridge=1.0)
