"""Where MLPs and attention write what they found, by depth: what can be edited if nobody names modules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, TypeVar

from torch import nn

from stableedit_cpp.model.experts import expert_slices
from stableedit_cpp.model.modules import EditModule, describe_linear_maps, is_linear

__all__ = ["as_patterns", "default_edit_modules", "expert_outputs", "last_third", "output_projections"]

_T = TypeVar("_T")
Kind = Literal["mlp", "attention", "recurrent"]

# Where in the depth of the model the default modules lie: layers 22, 24, 26, 28 of 30.
_DEFAULT_DEPTHS = (22 / 30, 24 / 30, 26 / 30, 28 / 30)


def default_edit_modules(model: nn.Module, *, automatic: bool = False) -> list[str]:
    """Names of the MLP output projections of four layers in the last third of the language model; with an ``automatic``
    step those of attention in the last third but the last layer (those of MLPs where there are none). Of recurrent
    layers alone, as Mamba's, it is their output projections, by the same rule.

    Edits of attention outputs reach more paraphrases, in fewer passes, on SmolLM2 and on Gemma 3 alike
    (docs/closed-loop.md); four MLPs are what a number as a step size is stated for. All are found by their shape, not
    by their name, in the layers of the text decoder alone. In a mixture of experts the MLP is the expert that sees
    every token, if there is one, else all experts of a layer.

    Raises:
        ValueError: for an architecture without these. For MLPs also where at most a third of the layers hold one, or
            only early ones do, as in a mixture of experts whose first layers are dense (the message says what to name
            instead).
    """
    attention = output_projections(model, "attention")
    if automatic and attention:
        return last_third(attention)
    names = output_projections(model, "mlp")
    if not names and (experts := expert_outputs(model)):
        return [name for layer in (last_third(experts) if automatic else _late(experts)) for name in layer]
    if not names and not attention:
        names = output_projections(model, "recurrent")
    if not names:
        hint = ""
        if attention:
            late = as_patterns(last_third(attention))
            hint = f", e.g. the outputs of attention ({late}), or let choose_modules measure"
        raise ValueError(
            f"no default edit_modules are known for {type(model).__name__}; name them{hint}. {_why_no_mlp(model)} The "
            f"model has:\n{describe_linear_maps(model)}"
        )
    if automatic:
        return last_third(names)
    return _late(names)


def _late(layers: Sequence[_T]) -> list[_T]:
    """What is edited in one layer each, at four depths of the last third."""
    return [
        layers[index] for index in dict.fromkeys(min(int(d * len(layers)), len(layers) - 1) for d in _DEFAULT_DEPTHS)
    ]


def expert_outputs(model: nn.Module) -> list[list[str]]:
    """Names of the down projections of the experts of each layer that has some, from the first to the last; empty where
    none can be edited one by one."""
    inside = _of_decoder(model)
    layers = [list(expert_slices(name, part)) for name, part in model.named_modules() if id(part) in inside]
    return [names for names in layers if names]


def _why_no_mlp(model: nn.Module) -> str:
    """What stands in the place of MLPs of linear maps."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and "expert" in name:
            inside = re.sub(r"^.*?\.\d+\.", "", name)
            return (
                "It is a mixture of experts, and holds those of a layer in one tensor "
                f"({inside}, {list(parameter.shape)}), which is no linear map and of which a token sees a few slices."
            )
    return "Few layers, or only early ones, have an MLP of linear maps."


def output_projections(model: nn.Module, kind: Kind) -> list[str]:
    """Names of the linear maps through which MLPs, attention or recurrent blocks write into the residual stream, from
    the first layer to the last; one a layer.

    Empty where there are none in the upper half of the text decoder's layers, or an MLP in at most a third of them.
    """
    find = {"mlp": _mlp_output, "attention": _attention_output, "recurrent": _recurrent_output}[kind]
    count, width = _text_size(model)
    found: dict[tuple, list[str]] = {}  # one entry for each place within a layer
    for name, layers in _layer_lists(model).items():
        places: dict[str, dict[int, str]] = {}
        for index, layer in enumerate(layers):
            for place, block in layer.named_modules():
                output = find(block, width)
                if output is not None:
                    inside = f"{place}.{output}".lstrip(".")
                    places.setdefault(inside, {})[index] = f"{name}.{index}.{inside}"
        for inside, members in places.items():
            # The dense first layers of a mixture of experts are an MLP, but not where facts can be edited.
            late = 2 * list(members)[2 * len(members) // 3] + 1 >= len(layers)
            if late and (kind != "mlp" or 3 * len(members) > len(layers)):
                names = list(members.values())
                # Adapters beside an MLP are of its shape, but narrower. The decoder comes after the encoder.
                inner = EditModule(inside, model.get_submodule(names[0])).shape[0]
                found[len(layers) == count, len(layers), inner, len(found)] = names
    return found[max(found)] if found else []


def last_third(names: Sequence[_T]) -> list[_T]:
    """Of names in the order of the layers, those of the last third but the very last, unless that is all there is."""
    begin = 2 * len(names) // 3
    return list(names[begin : max(begin + 1, len(names) - 1)])


def as_patterns(names: Sequence[str]) -> str:
    """Names that differ only in the number of the layer as one pattern, several with a space between:
    ``model.layers.{20..28}.mlp.down_proj``."""
    groups: dict[tuple[str, str], list[int]] = {}
    alone: list[str] = []
    for name in names:
        match = re.search(r"\.(\d+)\.", name)
        if match:
            groups.setdefault((name[: match.start()], name[match.end() :]), []).append(int(match[1]))
        else:
            alone.append(name)
    found = [(f"{head}.{_numbers(numbers)}.", tail) for (head, tail), numbers in groups.items()]
    experts: dict[tuple[str, str], list[int]] = {}  # whose number is at the end
    for head, tail in found:
        match = re.search(r"\.(\d+)$", tail)
        if match:
            experts.setdefault((head, tail[: match.start()]), []).append(int(match[1]))
    whole = [head + tail for head, tail in found if not re.search(r"\.\d+$", tail)]
    whole += [f"{head}{tail}.{_numbers(numbers)}" for (head, tail), numbers in experts.items()]
    return " ".join(whole + alone)


def _numbers(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"


def _text_size(model: nn.Module) -> tuple[int | None, int | None]:
    """Number of layers and width of the language model; None for what its config does not say."""
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if config is not None else None
    return getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)


def _layer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists of modules by name: those of what the model calls its decoder, which leaves out a vision tower; and not
    lists within those, such as the experts of a layer."""
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    lists = {name: part for name, part in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    inside = _of_decoder(model)
    return {name: part for name, part in lists.items() if id(part) in inside} or lists


def _of_decoder(model: nn.Module) -> set[int]:
    """Ids of the modules of what the model calls its decoder."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return {id(part) for part in decoder.modules()}


def _mlp_output(block: nn.Module, width: int | None) -> str | None:
    """Name of the linear map in a block that leads back to the width from which the others start; None if the block is
    no MLP.

    An MLP has one or two maps from width d to another width m (two with a gate, or one to 2m for both) and one from m
    back to d, beside which RWKV has a gate from d to d. Attention has other shapes: four maps, or one to 3d; and what
    has a convolution is a recurrent layer.
    """
    maps = _maps(block)
    if not 2 <= len(maps) <= 3:
        return None
    for down, (m, d) in reversed(maps.items()):
        ups = sorted(shape for name, shape in maps.items() if name != down)
        if m != d and width in (None, d) and ups in ([(d, m)], [(d, m)] * 2, [(d, 2 * m)], sorted([(d, m), (d, d)])):
            return down
    return None


def _attention_output(block: nn.Module, width: int | None) -> str | None:
    """Name of the last linear map to the width of the model, but a gate, in a block that calls itself attention and has
    others beside it; None if there is none."""
    if "attention" not in type(block).__name__.lower():
        return None
    maps = _maps(block)
    outputs = [name for name, (_, v) in maps.items() if width in (None, v) and "gate" not in name]
    return outputs[-1] if outputs and len(maps) > 1 else None


def _recurrent_output(block: nn.Module, width: int | None) -> str | None:
    """Name of the last linear map in a block with a convolution (Mamba), if it leads to the width of the model."""
    if not any(isinstance(child, nn.Conv1d) for child in block.children()):
        return None
    maps = [name for name, child in block.named_children() if is_linear(child)]
    return maps[-1] if maps and EditModule("", block.get_submodule(maps[-1])).shape[1] == width else None


def _maps(block: nn.Module) -> dict[str, tuple[int, int]]:
    """(k, v) of the linear maps in a block by name; none for a recurrent one, which has a convolution."""
    children = dict(block.named_children())
    if any(isinstance(child, nn.Conv1d) for child in children.values()):
        return {}
    return {name: EditModule(name, child).shape for name, child in children.items() if is_linear(child)}
