"""What one request contributed to an update: the difference to the update that its turn would have had without it."""

from __future__ import annotations

import torch

from stableedit_cpp.core import LowRankUpdate
from stableedit_cpp.editors import AppliedPass

__all__ = ["contribution"]


def contribution(applied: AppliedPass, owned: torch.Tensor) -> dict[str, LowRankUpdate]:
    """The share of some rows of a pass, by module name; subtracting it leaves the update of the other rows alone.

    An update is D^T = X^T Y with X = M^(-1) V and M = Y H^T + c I: for the plain ridge solution Y = H and c = ridge;
    with past keys, A = weight C + ridge I, it is Y = H A^(-1) and c = 1. Its terms X_i Y_i are no contributions: keys
    of different requests are nearly parallel, so these terms are large and cancel each other, and taking some away
    leaves a broken model. Solving the same system without the rows S, with R for the others, differs from it by

        D^T - D_R^T = X_S^T (Y_S - M_SR M_RR^(-1) Y_R)

    which is the request's own term with the part of its key that the others' keys explain taken out. It has rank |S|
    and needs no target and no model.

    Args:
        applied: the pass, with the keys it was computed from.
        owned: which rows are taken out, ``[n]`` bool.

    Returns:
        Updates of rank |S|; empty if no row is owned.
    """
    if not owned.any():
        return {}
    return {
        name: _share(update, applied.captured.keys[name], owned, applied.ridge)
        for name, update in applied.updates.items()
    }


def _share(update: LowRankUpdate, keys: torch.Tensor, owned: torch.Tensor, ridge: float) -> LowRankUpdate:
    right = update.right.double()  # Y; M is ill-conditioned, and it is small
    keys = keys.to(right)
    diagonal = ridge if torch.equal(keys.to(update.right), update.right) else 1.0
    inside = owned.to(right.device).nonzero().flatten()
    outside = (~owned).to(right.device).nonzero().flatten()
    own, rest = right[inside], right[outside]
    across = own @ keys[outside].T
    among = rest @ keys[outside].T
    among.diagonal().add_(diagonal)
    own = own - across @ torch.linalg.solve(among, rest)
    return LowRankUpdate(update.left[:, inside].contiguous(), own.to(update.right).contiguous())
