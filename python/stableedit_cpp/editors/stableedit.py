"""StableEdit: whitening with the running covariance of the value gradients."""

from __future__ import annotations

from stableedit_cpp.core import LifelongNormalizer, WhiteningOptions
from stableedit_cpp.editors.config import StableEditConfig
from stableedit_cpp.editors.editor import Editor
from stableedit_cpp.editors.solver import Solver

__all__ = ["StableEdit"]


class _Solver(Solver):
    config: StableEditConfig

    def _make_normalizer(self, key_dim: int, value_dim: int) -> LifelongNormalizer:
        config = self.config
        whitening = WhiteningOptions(
            mode=config.whitening, floor=config.floor, floor_mode=config.floor_mode, refresh=config.refresh
        )
        return LifelongNormalizer(key_dim, value_dim, whitening=whitening)

    def _warm_up_mode(self) -> str | None:
        return self.config.warm_up_whitening


class StableEdit(Editor):
    """StableEdit (Algorithm 1). Warm up on a training stream first; without it the first turns rest on few samples.

    Equivalent, for one module and one turn with keys H and value gradients G, to::

        normalizer.observe(H, G)                                  # (m, kappa, Psi, nu), key mean and std
        g_hat = (G - m) @ inverse_root(floored(Psi / (nu - v - 1)))
        V = -step_size * h_hat.square().sum(1, keepdim=True) * g_hat
        weight += torch.linalg.solve(H.T @ H + ridge * I, H.T @ V).T
    """

    config: StableEditConfig
    config_class = StableEditConfig
    solver_class = _Solver
