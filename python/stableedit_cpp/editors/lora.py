"""LoRA: an adapter is trained on each turn and merged into the weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import nn

from stableedit_cpp.core import LowRankUpdate
from stableedit_cpp.editors.config import PLAIN, EditorConfig
from stableedit_cpp.editors.registry import NamedEditor, register_editor
from stableedit_cpp.editors.trained import TrainedEditor, TrainedSolver
from stableedit_cpp.editors.trained_config import TrainedConfig
from stableedit_cpp.editors.training import Forward, Trainable
from stableedit_cpp.files.words import check_whole, with_nearest
from stableedit_cpp.model.modules import EditModule

__all__ = ["LoRA", "LoRAConfig"]

_QUERY_VALUE = ["model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.v_proj"]
_FAMILIES = {
    "llama-3-8b": _QUERY_VALUE,
    "mistral-7b": _QUERY_VALUE,
    "gemma-7b": _QUERY_VALUE,
    "qwen2.5-7b": _QUERY_VALUE,
    "gpt-j-6b": ["transformer.h.*.mlp.fc_in", "transformer.h.*.mlp.fc_out"],
}


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(TrainedConfig):
    """W <- W + merge (alpha / rank) B A, with A ``[rank, k]`` and B ``[v, rank]`` trained on the turn (peft's LoRA).

    Attributes:
        rank, alpha: of the adapter.
        dropout: on the adapter's input while it is trained, in [0, 1).
        merge: share of what was learnt that goes into the weights, in [0, 1]: 1 merges as peft does, less interpolates
            between the weights before and after (WikiBigEdit).
    """

    editor: ClassVar[str] = "lora"

    step_size: float = 5e-3
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    merge: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("rank", self.rank)
        self._check_positive("alpha", self.alpha)
        for name, inside in (("dropout", "[0, 1)"), ("merge", "[0, 1]")):
            value = getattr(self, name)
            self._check_number(name, value)
            if not 0 <= value <= 1 or (name == "dropout" and value == 1):
                raise ValueError(f"{name} must be in {inside}, not {value!r}")

    @classmethod
    def published(cls, model_family: str | None = None, **changes) -> LoRAConfig:
        """WikiBigEdit's LoRA with merging (arXiv 2503.05683) as its code has it: rank 4, alpha 8, dropout .1, Adam
        5e-3, 10 epochs ("steps" there) in batches of 32 over turns of 128, a token weighs like any other, a quarter of
        what was learnt is merged; queries and values of all layers.

        EasyEdit's AdaLoRA, whose ranks are never allocated, is not offered; its plain LoRA is rank 8, alpha 32 on one
        request at a time (``turn_size=1, micro_batch=1, merge=1.0``).

        Args:
            model_family: "llama-3-8b", "mistral-7b", "gemma-7b", "qwen2.5-7b" or "gpt-j-6b", for the modules; None
                leaves them to ``edit_modules``.

        Raises:
            ValueError: for a family that is not known, with those that are.
        """
        if model_family is not None and model_family not in _FAMILIES:
            raise ValueError(f"LoRA was not published for the model family {with_nearest(model_family, _FAMILIES)}")
        preset = {"edit_modules": None if model_family is None else _FAMILIES[model_family], "rank": 4, "alpha": 8.0}
        preset |= {"dropout": 0.1, "epochs": 10, "micro_batch": 32, "turn_size": 128, "average": "token", "merge": 0.25}
        preset |= {"shuffle": False, "stop_loss": 0.0, "stop_when_taken": False, "take_probability": 0.0}
        return cls(**(preset | PLAIN | changes))


class _Adapters(Trainable):
    """peft's LoRA layers around stand-ins for the modules: the model itself, which may serve meanwhile, has none."""

    def __init__(self, modules: Sequence[EditModule], weights: Mapping[str, torch.Tensor], config: LoRAConfig) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        super().__init__(modules, weights)
        self._merge = config.merge
        self._layers = nn.ModuleList([_stand_in(module, weights[module.name]) for module in modules])
        settings = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=[str(index) for index in range(len(modules))],
            fan_in_fan_out=modules[0].layout == "conv1d",
        )
        inject_adapter_in_model(settings, self._layers)
        self._layers.train(config.dropout > 0)
        for layer, module in zip(self._layers, modules, strict=True):  # half precision is no place to learn
            layer.lora_A.to(weights[module.name].dtype)
            layer.lora_B.to(weights[module.name].dtype)

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [parameter for parameter in self._layers.parameters() if parameter.requires_grad]

    def forward(self, module: EditModule) -> Forward:
        return self._layers[[one.name for one in self.modules].index(module.name)]

    def updates(self) -> dict[str, LowRankUpdate]:
        found = {}
        for layer, module in zip(self._layers, self.modules, strict=True):
            (name,) = layer.active_adapters
            left, right = layer.lora_B[name].weight, layer.lora_A[name].weight
            found[module.name] = LowRankUpdate(
                left.detach() * (self._merge * layer.scaling[name]), right.detach().clone()
            )
        return found


def _stand_in(module: EditModule, weight: torch.Tensor) -> nn.Module:
    """The module without its hooks, which the model calls already, and with the weight that training begins with."""
    stand_in = copy.copy(module.module)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(stand_in, hooks, OrderedDict())
    stand_in._parameters = dict(module.module._parameters)
    start = weight.to(module.dtype)
    if module.offloaded is not None or not torch.equal(start, module.weight):
        # A faster one, which is bound to the module's own weight, or accelerate's, which fetches that.
        stand_in.__dict__.pop("forward", None)
        if module.bias is not None:
            stand_in._parameters["bias"] = nn.Parameter(module.bias.detach(), requires_grad=False)
        stand_in._parameters["weight"] = nn.Parameter(start, requires_grad=False)
    return stand_in


class _Solver(TrainedSolver):
    config: LoRAConfig

    def make_trainable(self, weights: Mapping[str, torch.Tensor]) -> Trainable:
        return _Adapters(self.modules, weights, self.config)


class LoRA(TrainedEditor):
    """LoRA adapters, trained on each turn and merged stage by stage.

    Raises:
        ValueError: as ``Editor``; or where peft is not installed.
    """

    config: LoRAConfig
    config_class = LoRAConfig
    solver_class = _Solver

    def __init__(self, model: nn.Module, tokenizer, config: EditorConfig | None = None, **how) -> None:
        if find_spec("peft") is None:
            raise ValueError("the editor 'lora' needs peft, which is not installed: pip install 'stableedit-cpp[lora]'")
        super().__init__(model, tokenizer, config, **how)


register_editor(
    LoRA,
    NamedEditor("lora", LoRAConfig(), False, "LoRA: an adapter for each turn, trained until it has taken, then merged"),
    NamedEditor(
        "lora-published",
        LoRAConfig.published(),
        False,
        "LoRA as WikiBigEdit has it: 10 epochs a turn of 128, of which a quarter is merged",
    ),
)
