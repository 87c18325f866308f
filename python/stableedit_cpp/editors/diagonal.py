"""Running statistics per dimension, as ULTRAEDIT has them: what several editors normalise with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stableedit_cpp.core import LifelongNormalizer, WhiteningOptions
from stableedit_cpp.editors.solver import Solver
from stableedit_cpp.model.capture import CapturedTurn
from stableedit_cpp.model.modules import EditModule

__all__ = ["DiagonalSolver"]


class DiagonalSolver(Solver):
    """Standardises keys and value gradients per dimension; its config has ``unbiased_batches``."""

    def _make_normalizer(self, key_dim: int, value_dim: int) -> LifelongNormalizer:
        whitening = WhiteningOptions(mode="diagonal")
        return LifelongNormalizer(
            key_dim, value_dim, whitening=whitening, unbiased_batches=self.config.unbiased_batches
        )

    def _observe(self, group: str, modules: Sequence[EditModule], captured: CapturedTurn) -> None:
        if not self.config.unbiased_batches:
            return super()._observe(group, modules, captured)
        # The published variance depends on the batches it is fed with: one micro-batch of one module at a time.
        keys: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        count = int(captured.micro_batch.max()) + 1
        device = captured.keys[modules[0].name].device
        for module in modules:
            own, of_outputs, seen = captured.rows_of(module)
            of_batch = captured.micro_batch if seen is None else captured.micro_batch[seen.cpu()]
            sizes = torch.bincount(of_batch, minlength=count).tolist()
            keys += [part for part in own.to(device).split(sizes) if len(part)]
            gradients += [part for part in of_outputs.to(device).split(sizes) if len(part)]
        if keys:
            self.normalizers[group].observe(keys, gradients)
