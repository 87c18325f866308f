"""The contribution of a request against solving its turn without it."""

from __future__ import annotations

import pytest
import torch

from stableedit_cpp.core import LowRankUpdate
from stableedit_cpp.editors import AppliedPass
from stableedit_cpp.lifelong.contribution import contribution
from stableedit_cpp.model.capture import CapturedTurn

V, K, N, RIDGE = 5, 12, 9, 0.3


def solve(keys: torch.Tensor, targets: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    """D^T of the normal equations, [v, k]."""
    system = keys.T @ keys + past + RIDGE * torch.eye(K, dtype=torch.float64)
    return torch.linalg.solve(system, keys.T @ targets).T


@pytest.mark.parametrize("with_past", [False, True], ids=["plain", "past keys"])
@pytest.mark.parametrize("rows", [[0], [3, 4, 8], list(range(N)), []], ids=str)
def test_subtracting_it_leaves_the_solution_of_the_others(rows, with_past):
    torch.manual_seed(0)
    # Nearly parallel, as keys of a language model are.
    keys = torch.randn(K, dtype=torch.float64) * 3 + 0.1 * torch.randn(N, K, dtype=torch.float64)
    targets = torch.randn(N, V, dtype=torch.float64)
    past = torch.randn(20, K, dtype=torch.float64)
    past = past.T @ past if with_past else torch.zeros(K, K, dtype=torch.float64)
    right = torch.linalg.solve(past + RIDGE * torch.eye(K, dtype=torch.float64), keys.T).T if with_past else keys
    system = right @ keys.T + (1.0 if with_past else RIDGE) * torch.eye(N, dtype=torch.float64)
    update = LowRankUpdate(torch.linalg.solve(system, targets).T.contiguous(), right.contiguous())
    torch.testing.assert_close(update.dense(), solve(keys, targets, past))

    empty = torch.empty(0)
    captured = CapturedTurn({"m": keys}, {"m": targets}, torch.arange(N), torch.zeros(N), empty, empty)
    owned = torch.zeros(N, dtype=torch.bool)
    owned[rows] = True
    share = contribution(AppliedPass(captured, {"m": update}, torch.arange(N), RIDGE), owned)
    assert bool(share) == bool(rows)
    if rows:
        assert share["m"].rank == len(rows)
        left = update.dense() - share["m"].dense()
        torch.testing.assert_close(left, solve(keys[~owned], targets[~owned], past))
