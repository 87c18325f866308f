"""AlphaEdit: MEMIT's targets, written where the keys of ordinary text have next to nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from stableedit_cpp.core import LowRankUpdate, NullSpace, PastKeys, ridge_update
from stableedit_cpp.editors.config import PLAIN
from stableedit_cpp.editors.families import family_named
from stableedit_cpp.editors.locate import LocateEditor, LocateSolver
from stableedit_cpp.editors.locate_config import LocateConfig
from stableedit_cpp.editors.registry import NamedEditor, register_editor
from stableedit_cpp.files.words import check_whole
from stableedit_cpp.model.modules import EditModule

__all__ = ["AlphaEdit", "AlphaEditConfig"]

# What differs from the defaults below, by model family: that of the released settings; for Qwen2.5 what NAS and RLSEdit
# take, and for Mistral MEMIT's of EasyEdit, since the authors have none for either.
_PUBLISHED = {
    "llama-3-8b": {"target_learning_rate": 0.1},
    "gpt-j-6b": {},
    "gpt2-xl": {"target_steps": 20},
    "qwen2.5-7b": {"target_learning_rate": 0.1},
    "mistral-7b": {"target_clamp": 4.0, "target_decay": 1e-3},
}
_QWEN = [f"model.layers.{layer}.mlp.down_proj" for layer in range(7, 12)]


@dataclass(frozen=True, kw_only=True)
class AlphaEditConfig(LocateConfig):
    """AlphaEdit, which holds the keys of earlier turns, too.

    Attributes:
        threshold: eigenvalues of the second moment of keys over text below it span what is free to edit, > 0.
        threshold_mode: "relative" to the mean eigenvalue, which suits keys of any scale, or "absolute" (published). An
            absolute one leaves nothing free where keys are larger, and everything where they are smaller: then P = I.
        ridge: L2 of the released code; 1 in the paper.
        past_key_weight: weight of the keys of earlier turns, 1 as published.
        sketch_rank: keep those in a sketch of so many rows instead of a ``[k, k]`` matrix; None is exact.
    """

    editor: ClassVar[str] = "alphaedit"

    threshold: float = 1.0
    threshold_mode: Literal["relative", "absolute"] = "relative"
    ridge: float = 10.0
    past_key_weight: float = 1.0
    sketch_rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("threshold", self.threshold)
        self._check_choice("threshold_mode", ("relative", "absolute"))
        check_whole("sketch_rank", self.sketch_rank, none=True)

    @classmethod
    def published(cls, model_family: str, **changes) -> AlphaEditConfig:
        """The settings of the released code for a model family (``editors.families.FAMILIES``): absolute threshold
        2e-2, L2 10, in plain text without an end of answers.

        Raises:
            ValueError: for an unknown family.
        """
        modules = _QWEN if model_family == "qwen2.5-7b" else family_named(model_family).modules
        preset = {"edit_modules": modules, "threshold": 2e-2, "threshold_mode": "absolute", "ridge": 10.0}
        preset |= PLAIN | _PUBLISHED[model_family]
        return cls(**(preset | changes))


class _Solver(LocateSolver):
    """D = (p sum of past h h^T + H^T H + ridge I)^(-1) H^T R for projected keys H P, past ones as well."""

    config: AlphaEditConfig

    def __init__(self, modules: Sequence[EditModule], config: AlphaEditConfig) -> None:
        super().__init__(modules, config)
        self.spaces: dict[str, NullSpace] = {}
        for past in self.past_keys.values():
            past.restore(PastKeys(past.dim, config.sketch_rank))

    def begin(self, name: str, moment: torch.Tensor, dtype: torch.dtype) -> None:
        relative = self.config.threshold_mode == "relative"
        try:
            space = NullSpace(moment, self.config.threshold, relative=relative)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        self.spaces[name] = space.to(dtype)

    def solve_located(
        self, name: str, keys: torch.Tensor, residuals: torch.Tensor, ridge: float = 1.0
    ) -> tuple[LowRankUpdate, torch.Tensor]:
        keys = self.spaces[name].project(keys)
        past = self.past_keys.get(name)
        how = {} if past is None else {"past_keys": past, "past_key_weight": self.config.past_key_weight}
        return ridge_update(keys, residuals, self.config.ridge * ridge, **how), keys


class AlphaEdit(LocateEditor):
    """AlphaEdit (Fang et al. 2025, arXiv 2410.02355). In module i of L, with MEMIT's keys H and targets, a turn is
    equivalent to

        R = (z - z_now) / (L - i)
        P = U @ U.T                                                 # eigenvectors of C0 = E[h h^T] below the threshold
        D = torch.linalg.solve(P @ (H.T @ H + Cp) + ridge * I, P @ H.T @ R)
        weight += D.T;  Cp += H.T @ H

    computed from projected keys H P, which is the same and needs neither P nor Cp. As released, except: the second
    moment is a mean over tokens and never their sum, the default threshold is relative, and what MEMIT's docstring
    says. ``published`` has the absolute one.
    """

    config: AlphaEditConfig
    config_class = AlphaEditConfig
    solver_class = _Solver


register_editor(
    AlphaEdit,
    NamedEditor(
        "alphaedit",
        AlphaEditConfig(),
        False,
        "AlphaEdit: MEMIT's targets in the null space of the keys of text; needs text_statistics",
    ),
)
