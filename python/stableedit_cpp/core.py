"""The mathematics of StableEdit, computed by libstableedit on torch tensors of any device.

Everything here releases the GIL and raises ValueError, TypeError or torch.linalg.LinAlgError with a sentence.
"""

import torch  # noqa: F401 - the extension needs its types and its libraries

from stableedit_cpp._core import (
    LifelongNormalizer,
    LowRankUpdate,
    MasterWeight,
    ModuleEditor,
    NiwPrior,
    NormalInverseWishart,
    NullSpace,
    PastKeys,
    Patch,
    PolyakStep,
    RunningMoments,
    WeightChange,
    Whitener,
    WhiteningOptions,
    contribution,
    first_order_decrease,
    load_patch,
    load_safetensors,
    load_state,
    parse_patch,
    parse_safetensors,
    ridge_update,
    save_patch,
    save_safetensors,
    save_state,
    solve_ridge,
)

__all__ = [
    "LifelongNormalizer",
    "LowRankUpdate",
    "MasterWeight",
    "ModuleEditor",
    "NiwPrior",
    "NormalInverseWishart",
    "NullSpace",
    "PastKeys",
    "Patch",
    "PolyakStep",
    "RunningMoments",
    "WeightChange",
    "Whitener",
    "WhiteningOptions",
    "contribution",
    "first_order_decrease",
    "load_patch",
    "load_safetensors",
    "load_state",
    "parse_patch",
    "parse_safetensors",
    "ridge_update",
    "save_patch",
    "save_safetensors",
    "save_state",
    "solve_ridge",
]
