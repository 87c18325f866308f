"""RECT: of a change, only the entries that are largest beside the weight itself."""

from __future__ import annotations

import torch

from stableedit_cpp.core import LowRankUpdate
from stableedit_cpp.editors.dense import dense_update

__all__ = ["rect"]

_SMALL = 1e-8  # beside a weight, as released


def rect(update: LowRankUpdate, weight: torch.Tensor, share: float, layout: str = "linear") -> LowRankUpdate:
    """Keep the share of entries of a change D with the largest abs(D / (W + 1e-8)), and none of the others (Gu et al.
    2024, arXiv 2401.04700, which keeps .4).

    The result has no low rank and no rows: nothing of it belongs to one request.

    Args:
        update: of ``[v, k]``. weight: before it, in ``layout``.
        share: in (0, 1]; 1 keeps the update as it is. Of entries as large as the last that is kept, all are.
    """
    if share == 1.0:
        return update
    change = update.dense()
    change = change.t() if layout == "conv1d" else change
    relative = (change / (weight.detach().to(change) + _SMALL)).abs()
    kept = max(1, round(share * relative.numel()))
    least = relative.flatten().kthvalue(relative.numel() - kept + 1).values
    return dense_update(torch.where(relative >= least, change, 0.0), layout)
