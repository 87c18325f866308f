"""What the tests of the core share: random rows, tolerances, NumPy references, and whole states to compare."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

from stableedit_cpp.core import (
    LifelongNormalizer,
    NiwPrior,
    NormalInverseWishart,
    RunningMoments,
    WhiteningOptions,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Half-precision input is computed in float32: results agree with float64 on the same (rounded) input.
RTOL = {torch.float16: 2e-5, torch.bfloat16: 2e-5, torch.float32: 2e-5, torch.float64: 1e-10}
LAYOUTS = ["linear", "conv1d"]
MODES = ["none", "diagonal", "full"]
LinAlgError = torch.linalg.LinAlgError

counts = st.integers(0, 9)
dims = st.integers(1, 6)
seeds = st.integers(0, 2**16)
dtypes = st.sampled_from(DTYPES)
relaxed = settings(deadline=None, max_examples=40)


def rows(count: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random rows with a mean and a scale of their own in every dimension."""
    generator = torch.Generator().manual_seed(seed)
    scale = 0.5 + torch.rand(dim, generator=generator, dtype=torch.float64)
    shift = torch.randn(dim, generator=generator, dtype=torch.float64)
    return (torch.randn(count, dim, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)


def close(actual: torch.Tensor, expected, dtype: torch.dtype = torch.float64) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=RTOL[dtype], atol=RTOL[dtype] * scale)


def moments_of(batches: list[torch.Tensor], dim: int, **options) -> RunningMoments:
    moments = RunningMoments(dim, **options)
    for batch in batches:
        moments.update(batch)
    return moments


def tracker_of(batches: list[torch.Tensor], dim: int, prior: NiwPrior | None = None) -> NormalInverseWishart:
    tracker = NormalInverseWishart(dim, prior or NiwPrior())
    for batch in batches:
        tracker.update(batch)
    return tracker


def stack(batches: list[torch.Tensor], dim: int) -> np.ndarray:
    return torch.cat([torch.zeros(0, dim, dtype=torch.float64), *(batch.double() for batch in batches)]).numpy()


def normalizer(mode: str = "full", k: int = 4, v: int = 3, floor: float = 0.1, floor_mode: str = "relative"):
    return LifelongNormalizer(k, v, whitening=WhiteningOptions(mode=mode, floor=floor, floor_mode=floor_mode))


def state(normalizer: LifelongNormalizer, probe: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    tracker = normalizer.value_tracker
    tensors = [normalizer.key_moments.mean(), normalizer.key_moments.m2(), normalizer.value_moments.m2()]
    tensors += [tracker.mean(), tracker.psi()] if tracker is not None else []
    return [*tensors, normalizer.normalize_keys(probe[0]), normalizer.normalize_value_gradients(probe[1])]


def assert_same_bits(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def inverse_root(sigma: torch.Tensor, floor: float, floor_mode: str) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(sigma.double())
    if floor_mode == "relative":
        floor = floor * float(values.mean())
    return vectors @ torch.diag(values.clamp_min(floor).rsqrt()) @ vectors.T
