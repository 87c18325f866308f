"""Sets of modules that a model could be edited in, to measure which of them is the best."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from stableedit_cpp.model.modules import describe_linear_maps, find_modules
from stableedit_cpp.model.outputs import default_edit_modules, expert_outputs, last_third, output_projections
from stableedit_cpp.model.packed import packed_maps

__all__ = ["RULE", "candidate_modules"]

# What is edited where nobody names modules or measures: default_edit_modules(automatic=True).
RULE = "attention, last third"


def candidate_modules(model: nn.Module) -> dict[str, list[str]]:
    """Sets of module names by a description, the fixed rule first where the model has modules for it, and then from the
    cheapest to the dearest: a pass runs the layers from the lowest edited one up, forwards and backwards.

    Only what can be edited is among them, and no set twice. In a mixture of experts it is what every token runs through
    (a shared expert, attention), without a shared one also all experts of a layer; dense first layers are not
    offered.

    Raises:
        ValueError: if the model has neither MLPs nor attention nor recurrent blocks that could be edited, or these are
            quantised.
    """
    found: dict[str, list[str]] = {}
    for name, modules in _sets(model):
        if modules and modules not in found.values() and _editable(model, modules):
            found[name] = modules
    packed = not found and next((m for _, modules in _sets(model) for m in packed_maps(model, modules)), None)
    if packed:
        raise ValueError(
            f"modules are chosen by editing each in turn, which would make all of them dense, and {packed} has "
            "quantised weights; name edit_modules, or choose them on the model that is not quantised"
        )
    if not found:
        raise ValueError(
            f"no modules to choose from are known for {type(model).__name__}: it has neither MLPs, attention nor "
            "recurrent blocks with outputs that can be edited; name edit_modules. The model has:\n"
            f"{describe_linear_maps(model)}"
        )
    return found


def _sets(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    mlp, attention = output_projections(model, "mlp"), output_projections(model, "attention")
    yield RULE, last_third(attention)
    yield "MLP, last third", last_third(mlp)
    yield "MLP, four of the last third", default_edit_modules(model) if mlp else []
    yield "MLP, every second of the upper half", mlp[len(mlp) // 2 : -1 : 2]
    yield "MLP, middle third", mlp[len(mlp) // 3 : 2 * len(mlp) // 3]
    if not mlp and (experts := expert_outputs(model)):
        yield "experts, four of the last third", default_edit_modules(model)
        yield "experts, last third", [name for layer in last_third(experts) for name in layer]
    if not mlp and not attention:
        recurrent = output_projections(model, "recurrent")
        yield "recurrent, last third", last_third(recurrent)
        yield "recurrent, every second of the upper half", recurrent[len(recurrent) // 2 : -1 : 2]


def _editable(model: nn.Module, modules: list[str]) -> bool:
    try:
        find_modules(model, modules)
    except ValueError:  # quantised, tied, not in memory
        return False
    return True
