"""MEMIT: many facts at once into several MLPs, held off the keys of ordinary text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from stableedit_cpp.core import LowRankUpdate, PastKeys, ridge_update
from stableedit_cpp.editors.config import PLAIN
from stableedit_cpp.editors.families import family_named
from stableedit_cpp.editors.locate import LocateEditor, LocateSolver
from stableedit_cpp.editors.locate_config import LocateConfig
from stableedit_cpp.editors.registry import NamedEditor, register_editor
from stableedit_cpp.model.modules import EditModule

__all__ = ["MEMIT", "MEMITConfig"]

# What differs from the defaults below, by model family: that of the released settings, and for Qwen2.5 and Mistral, for
# which there are none, those of EasyEdit (of which Mistral's are reported to stall).
_PUBLISHED = {
    "llama-3-8b": {"target_learning_rate": 0.1},
    "gpt-j-6b": {},
    "gpt2-xl": {"text_weight": 20000.0, "target_steps": 20},
    "qwen2.5-7b": {"target_clamp": 4.0, "target_decay": 1e-3},
    "mistral-7b": {"target_clamp": 4.0, "target_decay": 1e-3},
}


@dataclass(frozen=True, kw_only=True)
class MEMITConfig(LocateConfig):
    """MEMIT: one batch after another, none of which knows the earlier ones.

    Attributes:
        text_weight: w of the second moment of keys over text, > 0.
        ridge: beside w C0, in units of the mean of its diagonal; MEMIT has none, and what is solved in float64 does not
            feel 1e-6 of it.
        past_key_weight: weight of the keys of earlier turns; 1 is MEMIT_seq of AlphaEdit's repository.
    """

    editor: ClassVar[str] = "memit"

    text_weight: float = 15000.0
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("text_weight", self.text_weight)

    @classmethod
    def published(cls, model_family: str, **changes) -> MEMITConfig:
        """The settings of the released code for a model family (``editors.families.FAMILIES``), in plain text without
        an end of answers.

        Raises:
            ValueError: for an unknown family.
        """
        family = {"edit_modules": family_named(model_family).modules, **_PUBLISHED[model_family]}
        return cls(**(family | PLAIN | changes))


class _Solver(LocateSolver):
    """D = (w C0 + p sum of past h h^T + H^T H + ridge)^(-1) H^T R, in float64."""

    config: MEMITConfig

    def __init__(self, modules: Sequence[EditModule], config: MEMITConfig) -> None:
        super().__init__(modules, config)
        self._text: dict[str, PastKeys] = {}  # where no past keys come to it, it stays as it is, factor and all
        self._ridges: dict[str, float] = {}

    @property
    def holds_keys(self) -> bool:
        return True

    def begin(self, name: str, moment: torch.Tensor, dtype: torch.dtype) -> None:
        weight = self.config.text_weight
        self._ridges[name] = self.config.ridge * weight * float(moment.diagonal().mean())
        if name in self.past_keys:
            self.past_keys[name].restore(PastKeys.seeded(moment, weight / self.config.past_key_weight))
        else:
            self._text[name] = PastKeys.seeded(moment, weight)

    def solve_located(
        self, name: str, keys: torch.Tensor, residuals: torch.Tensor, ridge: float = 1.0
    ) -> tuple[LowRankUpdate, torch.Tensor]:
        past, weight = self.past_keys.get(name), self.config.past_key_weight
        if past is None:
            past, weight = self._text[name], 1.0
        how = {"past_keys": past, "past_key_weight": weight}
        update = ridge_update(keys.double(), residuals.double(), self._ridges[name] * ridge, **how)
        return LowRankUpdate(update.left.to(keys.dtype), update.right.to(keys.dtype)), keys


class MEMIT(LocateEditor):
    """MEMIT (Meng et al. 2023, arXiv 2210.07229). In module i of L, with the keys H and what is still missing of the
    targets at the last layer, a turn is equivalent to

        R = (z - z_now) / (L - i)
        D = torch.linalg.solve(w * C0 + H.T @ H, H.T @ R)           # C0 = E[h h^T] over text; float64
        weight += D.T

    and of module i + 1 keys and z_now are looked at anew. As released, except: subjects are located by their
    characters; the loss is read from the model's own last layer, whatever its number; contexts belong to the editor and
    not to the process.
    """

    config: MEMITConfig
    config_class = MEMITConfig
    solver_class = _Solver


register_editor(
    MEMIT,
    NamedEditor(
        "memit", MEMITConfig(), False, "MEMIT: targets at the subject, held off the keys of text; needs text_statistics"
    ),
    NamedEditor(
        "memit-seq", MEMITConfig(past_key_weight=1.0), False, "MEMIT that holds the keys of earlier turns, too"
    ),
)
