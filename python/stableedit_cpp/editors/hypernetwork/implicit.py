"""The gradient of a loss through the solution of a ridge system, without a matrix of the weight's size."""

from __future__ import annotations

import torch

from stableedit_cpp.core import LowRankUpdate, ridge_update

__all__ = ["PassedThrough"]


class PassedThrough:
    """Collects what a loss asks of one module's update, and gives its gradient with respect to what was solved.

    The update D^T = X^T H, X = A V, A = (H H^T + ridge I)^(-1), was added to the weight; a loss then has keys Hl
    ``[m, k]`` and output gradients Gl ``[m, v]`` at that weight, over all positions, so dL/dD = Hl^T Gl. With
    B = H dL/dD ``[n, v]``,

        dL/dV = A B,    dL/d(log ridge) = -ridge <dL/dV, X>

    The released code of MALMEN solves k x k systems and forms dL/dD ``[k, v]``; this needs B and one more solution with
    A, which ``ridge_update`` has for any right side.

    Args:
        keys: H ``[n, k]``. update: of ``ridge_update(keys, V, ridge)``.
    """

    def __init__(self, keys: torch.Tensor, update: LowRankUpdate, ridge: float) -> None:
        self._keys = keys
        self._solution = update.left.t()
        self._ridge = ridge
        self._sum = torch.zeros_like(self._solution)

    def add(self, loss_keys: torch.Tensor, output_gradients: torch.Tensor) -> None:
        """Some of the positions of the loss: Hl ``[m, k]`` and Gl ``[m, v]``."""
        here = self._keys
        self._sum += (here @ loss_keys.to(here).t()) @ output_gradients.to(here)

    def add_penalty(self, weight: float) -> None:
        """``weight * ||D||^2`` is a part of the loss."""
        if weight > 0:
            self._sum += 2.0 * weight * ((self._keys @ self._keys.t()) @ self._solution)  # H D

    def gradients(self) -> tuple[torch.Tensor, float]:
        """dL/dV ``[n, v]`` and dL/d(log ridge)."""
        gradient = ridge_update(self._keys, self._sum, self._ridge).left.t()
        return gradient, -self._ridge * float((gradient * self._solution).sum(dtype=torch.float64))
