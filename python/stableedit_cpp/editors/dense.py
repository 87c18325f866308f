"""A change of a whole weight as an update: what training leaves behind has no low rank."""

from __future__ import annotations

import torch

from stableedit_cpp.core import LowRankUpdate

__all__ = ["dense_update"]


def dense_update(change: torch.Tensor, layout: str = "linear") -> LowRankUpdate:
    """``change`` in factors, one of which is the identity; their product is the change, bit for bit.

    It costs the smaller dimension squared beside the change itself, and goes through everything that an update does:
    masters, journal, patches, geometry.

    Args:
        change: of a weight in its module's layout, ``[v, k]`` or for "conv1d" ``[k, v]``; float32 or float64.
    """
    change = (change.t() if layout == "conv1d" else change).detach().contiguous()
    v, k = change.shape
    identity = torch.eye(min(v, k), dtype=change.dtype, device=change.device)
    return LowRankUpdate(identity, change) if v <= k else LowRankUpdate(change, identity)
