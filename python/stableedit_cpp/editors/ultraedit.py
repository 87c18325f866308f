"""ULTRAEDIT: per-dimension Lifelong Normalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stableedit_cpp.editors.config import PLAIN, EditorConfig
from stableedit_cpp.editors.diagonal import DiagonalSolver
from stableedit_cpp.editors.editor import Editor
from stableedit_cpp.editors.registry import NamedEditor, register_editor

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
        preset = {"ridge": 1.0, "statistics": "shared", "unbiased_batches": True, **PLAIN}
        return cls(edit_modules=edit_modules, step_size=step_size, **(preset | changes))


class UltraEdit(Editor):
    """ULTRAEDIT (arXiv 2505.14679): keys and value gradients are standardised per dimension with running statistics,
    then solved like StableEdit. It needs no warm-up."""

    config: UltraEditConfig
    config_class = UltraEditConfig
    solver_class = DiagonalSolver
    edits_experts = True
    edits_split = True


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
