"""Keys and value gradients made on the spot, with the spectrum of real ones."""

from __future__ import annotations

import math

import torch

from stableedit_cpp.core import LifelongNormalizer

# (k, v, number of edited modules): the published settings for ZsRE.
SHAPES = {
    "mistral-7b": (14336, 4096, 4),
    "llama-3-8b": (14336, 4096, 7),
    "gpt-j-6b": (16384, 4096, 17),
    "qwen2.5-7b": (18944, 3584, 15),
    "smollm2-135m": (1536, 576, 4),
}

# Eigenvalues of Sigma by quantile, largest first, relative to their mean. "smollm2": measured, 700 ZsRE requests on
# down_proj 22, 24, 26, 28, nu = 9,312 (v = 576). "steep": few directions carry nearly all of the variance.
SPECTRA = {
    "smollm2": {
        0.0: 40.4,
        0.005: 14.0,
        0.01: 8.5,
        0.02: 4.7,
        0.05: 3.1,
        0.1: 2.0,
        0.2: 1.24,
        0.3: 0.87,
        0.5: 0.495,
        0.7: 0.29,
        0.9: 0.162,
        0.95: 0.133,
        1.0: 0.049,
    },
    "steep": {0.0: 60.0, 0.02: 20.0, 0.05: 5.0, 0.1: 0.5, 0.5: 0.01, 1.0: 0.0005},
}
_SCALE = 9.2e-8  # mean eigenvalue where the spectrum was measured


def eigenvalues(name: str, dim: int) -> torch.Tensor:
    """``[dim]`` float64, largest first: interpolated between the quantiles on a logarithmic scale."""
    known = list(SPECTRA[name].items())
    values = []
    for index in range(dim):
        at = index / max(dim - 1, 1)
        right = next(i for i, (quantile, _) in enumerate(known) if quantile >= at)
        (low, first), (high, last) = known[max(right - 1, 0)], known[right]
        share = (at - low) / (high - low) if high > low else 0.0
        values.append(math.exp((1 - share) * math.log(first) + share * math.log(last)))
    values = torch.tensor(values, dtype=torch.float64)
    return values * (_SCALE / values.mean())


class Source:
    """Draws turns: Gaussian value gradients in a random basis, keys with decaying scales by dimension."""

    def __init__(self, key_dim: int, value_dim: int, device: torch.device, spectrum: str = "smollm2") -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)
        basis = torch.linalg.qr(self._normal(value_dim, value_dim))[0]
        self._values = eigenvalues(spectrum, value_dim).sqrt().float().to(device).unsqueeze(1) * basis.T
        self._mean = 1e-5 * self._normal(1, value_dim)
        self._keys = torch.logspace(0, -2, key_dim, device=device)
        self.key_dim = key_dim

    def gradients(self, rows: int) -> torch.Tensor:
        return torch.addmm(self._mean, self._normal(rows, len(self._values)), self._values)

    def keys(self, rows: int) -> torch.Tensor:
        return self._normal(rows, self.key_dim).mul_(self._keys)

    def turn(self, modules: int, rows: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Keys and value gradients of each module."""
        return [self.keys(rows) for _ in range(modules)], [self.gradients(rows) for _ in range(modules)]

    def _normal(self, rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=self.generator, device=self.device)


def observe_rows(normalizer: LifelongNormalizer, source: Source, rows: int, chunk: int = 1000) -> None:
    for begin in range(0, rows, chunk):
        count = min(chunk, rows - begin)
        normalizer.observe(source.keys(count), source.gradients(count))


def grow(empty: LifelongNormalizer, base: LifelongNormalizer, nu: int) -> LifelongNormalizer:
    """Statistics near a given nu: as if the rows of ``base`` had been seen nu / count times, by merging copies."""
    times = max(round(nu / base.count), 1)
    power = base.copy()
    while times:
        if times % 2:
            empty.merge(power)
        times //= 2
        if times:
            power.merge(power.copy())
    return empty
