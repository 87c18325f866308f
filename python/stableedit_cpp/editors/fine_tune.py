"""Fine-tuning of a few weights on the edits: FT, FT-L, FT-M and LocFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn import functional as F

from stableedit_cpp.core import LowRankUpdate
from stableedit_cpp.editors.config import PLAIN
from stableedit_cpp.editors.dense import dense_update
from stableedit_cpp.editors.registry import NamedEditor, register_editor
from stableedit_cpp.editors.trained import TrainedEditor, TrainedSolver
from stableedit_cpp.editors.trained_config import TrainedConfig
from stableedit_cpp.editors.training import Forward, Trainable
from stableedit_cpp.files.words import with_nearest
from stableedit_cpp.model.modules import EditModule

__all__ = ["FineTune", "FineTuneConfig"]

Method = Literal["ft", "ft-l", "ft-m", "locft"]

_AS_RELEASED = {**PLAIN, "stop_when_taken": False, "take_probability": 0.0}
_METHODS: dict[str, dict[str, object]] = {
    "ft": {"objective": "prompt_last", "end_of_answer": False, "shuffle": False, "micro_batch": 64},
    "ft-l": {"objective": "prompt_last", "end_of_answer": False, "shuffle": False, "micro_batch": 64, "clamp": 5e-4},
    "ft-m": {"objective": "target", "end_of_answer": False, "shuffle": False, "micro_batch": 1},
    "locft": {"objective": "target", "end_of_answer": True, "micro_batch": 100, "cumulative": True},
}
_EASYEDIT = {
    "llama-3-8b": {"edit_modules": ["model.layers.21.mlp.down_proj"], "micro_batch": 1},
    "qwen2.5-7b": {"edit_modules": ["model.layers.27.mlp.down_proj"], "micro_batch": 1},
    "mistral-7b": {"edit_modules": ["model.layers.21.mlp.down_proj"], "micro_batch": 1},
}
_FAMILIES: dict[str, dict[str, dict[str, object]]] = {
    "ft": {
        "gpt2-xl": {"edit_modules": ["transformer.h.1.mlp.c_proj"]},
        "gpt-j-6b": {"edit_modules": ["transformer.h.21.mlp.fc_out"]},
        **_EASYEDIT,
    },
    "ft-l": {
        "gpt2-xl": {"edit_modules": ["transformer.h.0.mlp.c_proj"]},
        "gpt-j-6b": {"edit_modules": ["transformer.h.0.mlp.fc_out"], "clamp": 5e-5},
        "mistral-7b": {**_EASYEDIT["mistral-7b"], "clamp": 5e-5},
    },
    "ft-m": _EASYEDIT,
    "locft": {
        "llama-3-8b": {"edit_modules": ["model.layers.22.mlp.down_proj"]},
        "qwen2.5-7b": {"edit_modules": ["model.layers.6.mlp.down_proj"]},
        # The whole block; its two norms, which are no linear maps, stay as they are here.
        "mistral-7b": {"edit_modules": ["model.layers.23.*"], "step_size": 5e-5},
    },
}


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig(TrainedConfig):
    """Adam on the weights of ``edit_modules`` themselves.

    The defaults train breadth-first over each turn: LocFT's loss, shuffled batches of 10, in the form in which the
    model is asked, until all of the turn has taken. ``published`` is what was released.

    Attributes:
        clamp: after each step every entry of a weight is held within so much of what it was when the turn began
            (FT-L); None does not.
    """

    editor: ClassVar[str] = "fine-tune"

    clamp: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clamp is not None:
            self._check_positive("clamp", self.clamp)

    @classmethod
    def published(cls, model_family: str | None = None, method: Method = "locft", **changes) -> FineTuneConfig:
        """A method as it was released, on plain text.

        "ft" and "ft-l" (the ROME paper's baselines): Adam 5e-4, at most 25 epochs in the order of the turn, batches of
        64 (EasyEdit: 1), no step for a batch whose loss is below .01; all tokens of an answer are read after the prompt
        alone; "ft-l" clamps. "ft-m" (EasyEdit): cross-entropy along the answer, batches of 1. "locft" (LocFT-BF, arXiv
        2509.22072): that with the end of the answer, shuffled batches of 100, on all requests so far, from the unedited
        weights on: give it the whole stream as one turn (``turn_size``) for the paper's protocol.

        Args:
            model_family: "gpt2-xl", "gpt-j-6b", "llama-3-8b", "qwen2.5-7b" or "mistral-7b", where the method was
                published for it: which modules are edited, and what else is that model's own. None takes the method
                without these.

        Raises:
            ValueError: for a method or family that is not known, with those that are.
        """
        if method not in _METHODS:
            raise ValueError(f"unknown method {with_nearest(str(method), _METHODS)}")
        own = {} if model_family is None else _FAMILIES[method].get(model_family)
        if own is None:
            raise ValueError(
                f"{method} was not published for the model family {with_nearest(model_family, _FAMILIES[method])}"
            )
        return cls(**(_AS_RELEASED | _METHODS[method] | own | changes))


class _Weights(Trainable):
    def __init__(self, modules: Sequence[EditModule], weights: Mapping[str, torch.Tensor], clamp: float | None) -> None:
        super().__init__(modules, weights)
        self._leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
        self._clamp = clamp

    @property
    def parameters(self) -> list[torch.Tensor]:
        return list(self._leaves.values())

    def forward(self, module: EditModule) -> Forward:
        leaf, bias, flipped = self._leaves[module.name], module.bias, module.layout == "conv1d"

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            weight = leaf.to(hidden.dtype)
            return F.linear(hidden, weight.t() if flipped else weight, bias)

        return forward

    def after_step(self) -> None:
        if self._clamp is not None:
            with torch.no_grad():
                for name, leaf in self._leaves.items():
                    leaf.clamp_(self.weights[name] - self._clamp, self.weights[name] + self._clamp)

    def updates(self) -> dict[str, LowRankUpdate]:
        return {
            module.name: dense_update(self._leaves[module.name] - self.weights[module.name], module.layout)
            for module in self.modules
        }


class _Solver(TrainedSolver):
    config: FineTuneConfig

    def make_trainable(self, weights: Mapping[str, torch.Tensor]) -> Trainable:
        return _Weights(self.modules, weights, self.config.clamp)


class FineTune(TrainedEditor):
    """Fine-tuning of the edited modules' weights on each turn, over the kept output of the layers below them."""

    config: FineTuneConfig
    config_class = FineTuneConfig
    solver_class = _Solver


def _published(method: Method, summary: str) -> NamedEditor:
    return NamedEditor(method, FineTuneConfig.published(method=method), False, summary)


register_editor(
    FineTune,
    NamedEditor(
        "fine-tune", FineTuneConfig(), False, "Adam on the edited weights, turn by turn, until the turn has taken"
    ),
    _published("ft", "fine-tuning as ROME's baseline: the answer is read after the prompt alone"),
    _published("ft-l", "the same with every entry of a weight clamped to near what it was"),
    _published("ft-m", "fine-tuning along the answer, batches of 1, as EasyEdit has it"),
    _published("locft", "LocFT-BF: along the answer and its end, all requests so far from the unedited weights on"),
)
