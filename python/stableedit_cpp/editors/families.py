"""Models for which locate-and-edit methods have been published, and which layers others take."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from stableedit_cpp.files.words import with_nearest
from stableedit_cpp.model.outputs import output_projections

__all__ = ["FAMILIES", "Family", "family_named", "located_modules"]

_COUNT, _DEPTH = 5, 1 / 8  # of the layers elsewhere: as Llama 3 has them, 4 to 8 of 32


class Family(NamedTuple):
    """What a published setting was made for.

    Attributes:
        model_type: of its config. layers: how many the model has.
        edited: first and last layer that are edited. module: name of the edited map, with ``{}`` for the layer.
    """

    model_type: str
    layers: int
    edited: tuple[int, int]
    module: str

    @property
    def modules(self) -> list[str]:
        """By name, from the first layer to the last."""
        return [self.module.format(layer) for layer in range(self.edited[0], self.edited[1] + 1)]


_DOWN = "model.layers.{}.mlp.down_proj"
FAMILIES = {
    "llama-3-8b": Family("llama", 32, (4, 8), _DOWN),
    "gpt-j-6b": Family("gptj", 28, (3, 8), "transformer.h.{}.mlp.fc_out"),
    "gpt2-xl": Family("gpt2", 48, (13, 17), "transformer.h.{}.mlp.c_proj"),
    "qwen2.5-7b": Family("qwen2", 28, (4, 8), _DOWN),
    "mistral-7b": Family("mistral", 32, (4, 8), _DOWN),
}


def family_named(name: str) -> Family:
    """
    Raises:
        ValueError: for one that is not known, with the nearest.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown model family {with_nearest(name, FAMILIES)}")
    return FAMILIES[name]


def located_modules(model: nn.Module) -> list[str]:
    """Names of the modules that are edited if nobody names any: of a model of a published family those published for
    it, else the MLP outputs of five layers, or a third of them where that is less, from an eighth of the depth on.

    Raises:
        ValueError: for a model without MLP outputs that can be told by their shape.
    """
    config = model.config.get_text_config(decoder=True)
    names = {name for name, _ in model.named_modules()}
    for family in FAMILIES.values():
        known = config.model_type == family.model_type and config.num_hidden_layers == family.layers
        if known and names.issuperset(family.modules):
            return family.modules
    outputs = output_projections(model, "mlp")
    if not outputs:
        raise ValueError(f"no default edit_modules are known for {type(model).__name__}; name them")
    begin = round(_DEPTH * len(outputs))
    return outputs[begin : begin + max(1, min(_COUNT, len(outputs) // 3))]
