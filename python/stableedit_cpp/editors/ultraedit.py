"""ULTRAEDIT: per-dimension Lifelong Normalization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from stableedit_cpp.core import LifelongNormalizer, WhiteningOptions
from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.editors.editor import Editor
from stableedit_cpp.editors.registry import NamedEditor, register_editor
from stableedit_cpp.editors.solver import Solver
from stableedit_cpp.model.capture import CapturedTurn
from stableedit_cpp.model.modules import EditModule

__all__ = ["UltraEdit", "UltraEditConfig"]


@dataclass(frozen=True, kw_only=True)
class UltraEditConfig(EditorConfig):
    """ULTRAEDIT: Lifelong Normalization per dimension, ridge 1, no warm-up.

    Attributes:
        unbiased_batches: weight the unbiased variance of each micro-batch with its size in the running variance, as
            the published code does, instead of the exact update.
    """

    editor: ClassVar[str] = "ultraedit"

    ridge: float = 1.0
    unbiased_batches: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_flag("unbiased_batches")

    @classmethod
    def published(cls, *, edit_modules: list[str] | None = None, step_size: float, **changes) -> UltraEditConfig:
        """The procedure of the published code: pooled statistics, diagonal, ridge 1, variance unbiased within a
        micro-batch, turns of 100 in micro-batches of 10."""
        preset = {"ridge": 1.0, "statistics": "shared", "unbiased_batches": True}
        return cls(edit_modules=edit_modules, step_size=step_size, **(preset | changes))


class _Solver(Solver):
    config: UltraEditConfig

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
        sizes = torch.bincount(captured.micro_batch).tolist()
        device = captured.keys[modules[0].name].device
        for module in modules:
            keys += captured.keys[module.name].to(device).split(sizes)
            gradients += captured.value_gradients[module.name].to(device).split(sizes)
        self.normalizers[group].observe(keys, gradients)


class UltraEdit(Editor):
    """ULTRAEDIT (arXiv 2505.14679): keys and value gradients are standardised per dimension with running statistics,
    then solved like StableEdit. It needs no warm-up."""

    config: UltraEditConfig
    config_class = UltraEditConfig
    solver_class = _Solver


register_editor(
    UltraEdit,
    NamedEditor("ultraedit", UltraEditConfig(), False, "ULTRAEDIT: diagonal, ridge 1, no warm-up, exact variance"),
    NamedEditor(
        "ultraedit-published",
        UltraEditConfig.published(step_size=UltraEditConfig.step_size),
        False,
        "ULTRAEDIT as its code has it: variance unbiased within each micro-batch",
    ),
)
