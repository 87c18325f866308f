"""The mathematics of StableEdit, computed by libstableedit on torch tensors of any device.

Everything here releases the GIL and raises ValueError, TypeError or torch.linalg.LinAlgError with a sentence.
"""

from stableedit_cpp._core import (
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

__all__ = [
    "LifelongNormalizer",
    "LowRankUpdate",
    "MasterWeight",
    "ModuleEditor",
    "NiwPrior",
    "NormalInverseWishart",
    "RunningMoments",
    "Whitener",
    "WhiteningOptions",
    "ridge_update",
    "solve_ridge",
]
